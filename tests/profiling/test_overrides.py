from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from lightning_optcore.data import Digits
from lightning_optcore.profiling.overrides import Overrides, composed_by_hydra
from lightning_optcore.profiling.recommendations import Advice


@pytest.fixture
def overrides():
    with initialize_config_module("lightning_optcore.conf", version_base="1.3"):

        def composed(more):
            return compose("train", overrides=["callbacks=[default,profiler]", "trainer=cpu", *more])

        trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
        objects = {"trainer": [trainer], "loader": [Digits()], "ModelCheckpoint": [ModelCheckpoint()]}
        yield Overrides(objects, composed)


@pytest.mark.parametrize(
    ("advice", "override"),
    [
        (Advice("loader", "num_workers", 4, (1.5, 2.0), "why"), "data.num_workers=4"),
        (Advice("trainer", "log_every_n_steps", 50, (1.5, 2.0), "why"), "trainer.log_every_n_steps=50"),
        (Advice("trainer", "val_check_interval", 40, (1.5, 2.0), "why"), "+trainer.val_check_interval=40"),
        (Advice("ModelCheckpoint", "every_n_train_steps", 100, (1.5, 2.0), "why"),
         "+callbacks.model_checkpoint.every_n_train_steps=100"),
        (Advice("ModelCheckpoint", "", None, (1.5, 2.0), "why"), "~callbacks.model_checkpoint"),
    ],
)  # fmt: skip
def test_the_node_that_built_the_object_is_found_and_composes(overrides, advice, override):
    found = overrides.recommendation(advice)
    assert found.override == override
    assert found.applies
    assert found.expected_speedup == (1.5, 2.0)


def test_what_no_node_built_is_an_argument(overrides):
    found = overrides.recommendation(Advice("LearningRateMonitor", "logging_interval", "epoch", (1.0, 1.1), "why"))
    assert found.override == "LearningRateMonitor(logging_interval=epoch)"
    assert not found.applies
    assert LearningRateMonitor


def test_an_argument_that_nobody_takes_is_no_override(overrides):
    found = overrides.recommendation(Advice("loader", "prefetch_factor", 4, (1.0, 1.1), "why"))
    assert found.override == "DataLoader(prefetch_factor=4)"


def test_advice_for_the_code_has_no_override(overrides):
    found = overrides.recommendation(Advice("", "gc.freeze()", None, (1.0, 1.5), "because"))
    assert (found.override, found.why) == ("", "gc.freeze(): because")


def test_outside_of_hydra_there_is_nothing_to_compose():
    assert composed_by_hydra() is None
