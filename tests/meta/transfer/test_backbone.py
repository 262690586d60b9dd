from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_optcore.meta.transfer import TransferError, load_backbone
from lightning_optcore.models import CNN, MLP


class Wrapped(LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network


def test_a_checkpoint_of_lightning_gives_all_but_the_head(tmp_path, make_trainer):
    trained, new = CNN(8, 2), CNN(8, 2, num_classes=3)
    trainer = make_trainer()
    trainer.strategy.connect(trained)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    head = {name: value.clone() for name, value in new.state_dict().items() if name.startswith("head")}
    found = load_backbone(new, tmp_path / "a.ckpt")
    assert found.head == ("head.2.weight", "head.2.bias") and not found.missing and not found.mismatched
    assert not found.unexpected
    for name, value in new.state_dict().items():
        assert torch.equal(value, head[name] if name in head else trained.state_dict()[name])


@pytest.mark.parametrize("wrapped", ["own", "source", "none"])
def test_names_may_have_a_prefix_more_or_less(wrapped):
    source, own = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    expected = source[0].weight.detach().clone()
    source = Wrapped(source) if wrapped == "source" else source
    load_backbone(Wrapped(own) if wrapped == "own" else own, lambda: source)
    assert torch.equal(own[0].weight, expected)


def test_another_architecture_is_refused_and_nothing_is_changed():
    new, source = CNN(8, 2), CNN(4, 3)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with pytest.raises(TransferError, match=r"another architecture than this CNN: it has features\.0\.weight \(4, 1"):
        load_backbone(new, source)
    assert all(torch.equal(value, before[name]) for name, value in new.state_dict().items())


def test_what_fits_is_loaded_on_demand():
    new, source = MLP(16, 3), MLP(16, 2)
    with pytest.raises(TransferError, match=r"it lacks net\.7\.weight|has net\.5\.weight \(10, 16\), here \(16, 16\)"):
        load_backbone(new, source)
    found = load_backbone(new, source, strict=False)
    assert found.loaded == ("net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias")
    assert found.mismatched["net.5.weight"] == ((16, 16), (10, 16))
    assert torch.equal(new.net[3].weight, source.net[3].weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tensors", r"cannot be read as tensors and plain data"),
        ([1, 2], r"holds a list, expected a state dict"),
        ({"state_dict": {"far": torch.zeros(2)}}, r"holds nothing for a MLP: it has far; expected net\.1\.weight"),
        ({"module": nn.Linear(2, 2)}, r"cannot be read as tensors and plain data .*torch\.save\(module\.state_dict"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content, message):
    path = tmp_path / "a.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(TransferError, match=message):
        load_backbone(MLP(16, 2), path)


def test_a_function_that_makes_no_module_is_refused():
    with pytest.raises(TransferError, match="the function returned a dict, expected a module"):
        load_backbone(MLP(16, 2), dict)
