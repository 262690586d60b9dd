"""Every space of NNI's hub with every kind of supernet: two batches, what was found, and its weights.

What cannot be is refused in a sentence that says why, and what serves.
"""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from oneshot_spaces import Classifier, loader, nas

from lightning_optcore.callbacks import DifferentiableSearch, SampledTraining
from lightning_optcore.nas import LightningEvaluator, search
from lightning_optcore.nas.supernet import (
    SupernetError,
    best_architecture,
    choose,
    sample_of,
    smallest,
    sub_network,
    supernet,
)

CELLS = {"width": 4, "num_cells": 3, "dataset": "cifar"}
TRANSFORMER = {
    "search_embed_dim": (48, 96),
    "search_mlp_ratio": (2.0, 3.0),
    "search_num_heads": (3,),
    "search_depth": (2, 3),
    "patch_size": 16,
    "img_size": 64,
}
# Name, options, pixels, and the kinds that are refused.
SPACES = {
    "NasBench201": ({"stem_out_channels": 8, "num_modules_per_stack": 1}, 32, {}),
    "DARTS": (CELLS, 32, {"proxyless": "is a cell; kind=darts"}),
    "ENAS": (CELLS, 32, {"proxyless": "is a cell; kind=darts"}),
    "NASNet": (CELLS, 32, {"proxyless": "is a cell; kind=darts"}),
    "MobileNetV3Space": (
        {"num_labels": 10, "width_multipliers": (0.25, 0.5)},
        32,
        {"proxyless": r"`stem\.0` \(MutableConv2d\) chooses a size"},
    ),
    "ProxylessNAS": ({"num_labels": 10, "width_mult": 0.25}, 32, {}),
    "ShuffleNetSpace": ({"num_labels": 10}, 64, {}),
    "AutoFormer": ({**TRANSFORMER, "num_labels": 10}, 64, {"proxyless": "`patch_embed` .* chooses a size"}),
    "NasBench101": (
        {"stem_out_channels": 8, "num_stacks": 1},
        32,
        dict.fromkeys(("sampled", "darts", "gumbel_darts", "proxyless"), "any number of inputs; expected n_chosen"),
    ),
}
# NNI builds these anew.
NOTHING_INHERITED = {"DARTS", "ENAS", "NASNet"}


@pytest.fixture(autouse=True)
def quiet(caplog):
    logging.getLogger("nni").setLevel(logging.ERROR)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", ["sampled", "darts", "gumbel_darts", "proxyless"])
def test_a_space_of_the_hub(make_trainer, name, kind):
    options, pixels, refused = SPACES[name]
    seed_everything(0, verbose=False)
    space = getattr(nas.hub, name)(**options)
    if kind in refused:
        with pytest.raises(SupernetError, match=refused[kind]):
            supernet(space, kind)
        return
    network = supernet(space, kind)
    search = SampledTraining() if kind == "sampled" else DifferentiableSearch(learning_rate=0.1)
    make_trainer(search, limit_train_batches=2).fit(Classifier(network), loader(8, pixels, channels=3, size=2))
    architecture = smallest(network) if kind == "sampled" else best_architecture(network)
    sample_of(network, architecture)
    images = torch.randn(2, 3, pixels, pixels)
    if name in NOTHING_INHERITED:
        with pytest.raises(SupernetError, match=f"NNI builds a sub-network of {name} anew"):
            sub_network(network, architecture)
        assert space.freeze(sample_of(network, architecture))(images) is not None
        return
    alone = sub_network(network.eval(), architecture)
    with torch.no_grad():
        output = alone(images)
        if kind in ("sampled", "proxyless"):
            choose(network, architecture)
            torch.testing.assert_close(output, network(images), rtol=1e-4, atol=1e-4)
    built = space.freeze(sample_of(network, architecture))
    assert {k: v.shape for k, v in alone.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}


class Images(LightningDataModule):
    def __init__(self, pixels):
        super().__init__()
        self.pixels = pixels

    def train_dataloader(self):
        return loader(8, self.pixels, channels=3, size=4)

    def val_dataloader(self):
        return loader(4, self.pixels, channels=3, size=4, shuffle=False)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [*(("random_one_shot", name) for name in SPACES), ("darts", "DARTS"), ("proxyless", "NasBench201")],
)
def test_a_space_of_the_hub_is_searched_by_one_supernet(tmp_path, strategy, name):
    options, pixels, refused = SPACES[name]
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    evaluate = LightningEvaluator(
        getattr(nas.hub, name)(**options),
        Classifier,
        partial(Images, pixels),
        trainer=partial(Trainer, **trainer, **quiet),
        measure={"batch_sizes": (1,), "rounds": 1},
    )

    def run():
        return search(
            evaluate.space, evaluate, objectives=["val/loss", "params"], strategy=strategy, max_trials=2, show=False
        )

    if strategy == "random_one_shot" and ("sampled" in refused or name in NOTHING_INHERITED):
        message = refused.get(
            "sampled", f"strategy=random_one_shot: NNI builds a sub-network of {name} anew.*; one of darts,"
        )
        with pytest.raises(SupernetError, match=message):
            run()
        return
    found = run()
    assert [trial.failure for trial in found.history] == [None] * (2 if strategy == "random_one_shot" else 1)
