from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_optcore.profiling.audit import audit

pytestmark = pytest.mark.filterwarnings("ignore")


def keys(trainer, loader=None) -> dict[str, bool]:
    return {one.key: one.sure for one in audit(trainer, loader)}


def test_a_plain_run_has_nothing_that_surely_costs(make_trainer):
    assert not any(keys(make_trainer()).values())


def test_anomaly_detection_surely_costs(make_trainer):
    assert keys(make_trainer(detect_anomaly=True))["detect_anomaly"]


@pytest.mark.parametrize("profiler", ["advanced", "pytorch"])
def test_a_slow_profiler_surely_costs(make_trainer, profiler):
    assert keys(make_trainer(profiler=profiler))["profiler"]


def test_what_may_cost_is_mentioned(make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=5)
    trainer = make_trainer(
        checkpoint, logger=CSVLogger(tmp_path), log_every_n_steps=1, enable_checkpointing=True, max_epochs=3
    )
    loader = DataLoader(torch.zeros(8, 2), num_workers=2)
    found = keys(trainer, loader)
    assert {"log_every_n_steps", "every_n_train_steps", "persistent_workers"} <= set(found)
    assert not any(found.values())


def test_deterministic_algorithms_are_mentioned(make_trainer):
    torch.use_deterministic_algorithms(True)
    try:
        assert keys(make_trainer())["deterministic"] is False
    finally:
        torch.use_deterministic_algorithms(False)
