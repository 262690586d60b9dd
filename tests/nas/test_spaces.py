"""Every space that comes along: built at random, trained on real digits, and searched."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_optcore.data import Digits
from lightning_optcore.models import Classifier
from lightning_optcore.nas import LightningEvaluator, search, spaces

NAMES = ["mlp", "cnn_cell", "resnet_widths", "transformer", "mobilenet_v3", "nasbench201"]
TRAINER = partial(
    Trainer,
    max_epochs=1,
    accelerator="cpu",
    limit_train_batches=2,
    limit_val_batches=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)


@pytest.mark.parametrize("name", NAMES)
def test_two_trials_on_real_digits(name, tmp_path):
    space = getattr(spaces, name)()
    rng = np.random.default_rng(0)
    for _ in range(3):
        architecture = json.loads(json.dumps(space.choices.sample(rng)))
        network = space.build(architecture).eval()
        assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    evaluator = LightningEvaluator(
        space, Classifier, Digits, trainer=TRAINER, measure={"batch_sizes": (1,), "rounds": 2}
    )
    found = search(
        space, evaluator, objectives=["val/acc", "params", "latency_ms"], strategy="random", max_trials=2, show=False
    )
    assert [trial.failure for trial in found.history] == [None, None]
    for trial in found.history:
        assert trial.objectives["params"] == evaluator.estimate(trial.architecture)["params"]
        assert trial.objectives["latency_ms"] > 0


def test_the_widths_of_an_mlp_are_those_of_its_layers():
    space = spaces.mlp(width="choice(8,16)", depth="range(1,4)", activation="choice(relu,silu)")
    # Of depth 1, 2 and 3: 2, 4 and 8 widths, of two activations each.
    assert space.choices.size == 2 * (2 + 4 + 8)
    network = space.build({"depth": 2, "width_1": 8, "width_2": 16, "activation": "silu"})
    assert [layer.out_features for layer in network.layers if isinstance(layer, torch.nn.Linear)] == [8, 16, 10]


def test_a_space_goes_to_other_processes():
    space = spaces.mlp(width="choice(8,16)", depth="range(1,3)")

    def evaluate(architecture):
        return {"params": sum(one.numel() for one in space.build(architecture).parameters())}

    found = search(space, evaluate, objectives="params", strategy="random", max_trials=4, n_jobs=2, show=False)
    assert all(trial.objectives["params"] >= 8 * 65 + 90 for trial in found.history)


def test_a_patch_that_does_not_divide_the_image_is_named():
    with pytest.raises(ValueError, match="patch_size=3: does not divide image_size=8"):
        spaces.transformer(patch_size=3)
