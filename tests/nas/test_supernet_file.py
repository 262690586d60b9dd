"""A trained supernet as a file, and what inherits from it."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from lightning.pytorch import LightningModule
from one_shot_searches import cells, edges
from oneshot_spaces import Layers, Widths
from torch import nn

from lightning_optcore.models import Classifier
from lightning_optcore.nas import architecture_space, retrain, save_architecture
from lightning_optcore.nas.space import ArchitectureError
from lightning_optcore.nas.supernet import SupernetError, random_architecture, sub_network, supernet
from lightning_optcore.nas.supernet_file import (
    TrainedSupernet,
    inheriting_modules,
    load_supernet,
    save_supernet,
)

SMALL = {"width": 4, "op_1": "conv3", "op_2": "skip", "input_2": 1}


def trained(space, module=Classifier, kind="sampled"):
    """As if: what the weights are does not matter, but that they are these."""
    torch.manual_seed(0)
    whole = module(space.complete(supernet(space.new_model_space(), kind)))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
    return whole, TrainedSupernet(kind, {"kind": kind}, whole.state_dict(), 1.5, {"width": 4})


def test_it_is_read_as_it_was_written(tmp_path):
    _, one = trained(cells())
    read = load_supernet(save_supernet(tmp_path / "supernet.ckpt", one))
    assert (read.kind, read.trained_as, read.seconds, read.architecture) == (
        "sampled", {"kind": "sampled"}, 1.5, {"width": 4},
    )  # fmt: skip
    assert all(torch.equal(weights, one.state_dict[name]) for name, weights in read.state_dict.items())
    assert [path.name for path in tmp_path.iterdir()] == ["supernet.ckpt"]


class Evil:
    def __reduce__(self):
        return open, ("touched", "w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"supernet\.ckpt: No such file or directory; name the supernet\.ckpt of a search"),
        (b"half", r"supernet\.ckpt: does not load with weights_only=True"),
        ({"state_dict": {}}, r"supernet\.ckpt: no supernet; name the supernet\.ckpt of a search"),
        (torch.zeros(1), r"supernet\.ckpt: no supernet"),
        ({"version": 2}, "version 2: expected 1"),
        ({"trained_as": {"seed": 1}}, "its fingerprint is not that of what it says it was trained as"),
        ({"kind": Evil()}, "does not load with weights_only=True"),
    ],
)
def test_what_is_no_supernet(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "supernet.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict) and "state_dict" not in content:
        save_supernet(path, trained(cells())[1])
        torch.save({**torch.load(path, weights_only=True), **content}, path)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SupernetError, match=message):
        load_supernet(path)
    assert not (tmp_path / "touched").exists()


def test_a_pickle_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "supernet.ckpt"
    path.write_bytes(pickle.dumps({"version": 1}))
    with pytest.raises(SupernetError, match=r"supernet\.ckpt: does not load with weights_only=True"):
        load_supernet(path)


@pytest.mark.parametrize("make", [cells, edges])
def test_a_module_begins_with_its_share_of_the_weights(make):
    """Behind what was put around the space, too."""
    space = make()
    whole, one = trained(space)
    inherited = inheriting_modules(one, space, Classifier)
    network = next(part for part in whole.modules() if hasattr(part, "supernet_kind"))
    architecture = random_architecture(network, random.Random(1))
    module, again = inherited(architecture).eval(), inherited(architecture).eval()
    images = torch.rand(4, 1, 8, 8)
    expected = sub_network(network, architecture).eval()
    if make is edges:
        expected = nn.Sequential(whole.network[0], expected)
    torch.testing.assert_close(module(images), expected(images))
    # Neither the supernet nor the next one is touched by what becomes of a module.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    torch.testing.assert_close(again(images), expected(images))


class WithHead(LightningModule):
    """Weights beside the network, which is there under two names."""

    def __init__(self, network, features=4):
        super().__init__()
        self.network, self.head = network, nn.Linear(features, 2)
        self.both = nn.Sequential(self.network, self.head)

    def forward(self, x):
        return self.both(x)


def test_what_a_module_has_beside_its_network_is_inherited():
    space = architecture_space(Widths())
    whole, one = trained(space, WithHead)
    module = inheriting_modules(one, space, WithHead)({"width": 4, "kernel": 3, "depth": 1})
    assert torch.equal(module.head.weight, whole.head.weight)
    assert module.both[0] is module.network
    assert module.network.head.in_features == 4
    assert module(torch.rand(2, 1, 6, 6)).shape == (2, 2)


def test_weights_of_another_space_or_module_are_refused():
    _, one = trained(cells())
    with pytest.raises(
        SupernetError, match=r"the weights of the supernet are of another space or module: .*Missing key"
    ):
        inheriting_modules(one, edges(), Classifier)
    with pytest.raises(SupernetError, match=r"of another space or module: .*Missing key"):
        inheriting_modules(one, cells(), WithHead)
    with pytest.raises(ArchitectureError, match="width=5: expected one of 4, 8"):
        inheriting_modules(one, cells(), Classifier)({**SMALL, "width": 5})

    class ByWidth(WithHead):
        """What it has beside the network depends on it."""

        def __init__(self, network):
            super().__init__(network, 4 if hasattr(network, "supernet_kind") else 3)

    space = architecture_space(Widths())
    _, one = trained(space, ByWidth)
    with pytest.raises(
        SupernetError, match=r"what ByWidth has beside its network cannot be inherited: .*size mismatch"
    ):
        inheriting_modules(one, space, ByWidth)({"width": 4, "kernel": 3, "depth": 1})


def test_a_learned_one_is_inherited_from_as_well():
    space = architecture_space(Layers())
    whole, one = trained(space, Classifier, "darts")
    module = inheriting_modules(one, space, Classifier)({"a": 1, "depth": 2}).eval()
    expected = sub_network(whole.network, {"a": 1, "depth": 2}).eval()
    images = torch.rand(4, 1, 6, 6)
    torch.testing.assert_close(module(images), expected(images))


def test_an_architecture_is_trained_again_from_its_share(tmp_path):
    space = cells()
    whole, one = trained(space)
    where = {
        "_target_": "lightning_optcore.nas.spaces.cnn_cell", "widths": [4, 8], "num_stages": 1, "num_nodes": 2,
    }  # fmt: skip
    options = {
        "path": str(save_architecture(tmp_path / "one.json", SMALL)),
        "space": where,
        "module": {"_target_": "lightning_optcore.models.Classifier", "_partial_": True},
    }
    weights = str(save_supernet(tmp_path / "supernet.ckpt", one))
    images = torch.rand(4, 1, 8, 8)
    inherited = retrain(**options, weights=weights).eval()
    torch.testing.assert_close(inherited(images), sub_network(whole.network, SMALL).eval()(images))
    assert not torch.equal(retrain(**options).network.head.weight, inherited.network.head.weight)
    with pytest.raises(SupernetError, match=r"name the supernet\.ckpt of a search"):
        retrain(**options, weights=str(tmp_path / "none.ckpt"))
    with pytest.raises(SupernetError, match="of another space or module"):
        retrain(**{**options, "space": {**where, "widths": [4, 8, 16]}}, weights=weights)
