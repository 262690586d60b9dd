from __future__ import annotations

import time
import warnings

import pytest
from lightning.pytorch import Callback
from ranks import run_ranks
from trained import Digits, fitted

from lightning_optcore.distributed.rank_times import RankTimes, straggler_of


def times(*own):
    return [RankTimes(rank, "host", data, compute, 100.0) for rank, (data, compute) in enumerate(own)]


@pytest.mark.parametrize(
    ("own", "rank", "cause"),
    [
        ([(1, 80), (1, 82), (1, 79)], None, None),
        ([(1, 60), (1, 90), (1, 62)], 1, "compute"),
        ([(30, 60), (1, 62), (1, 60)], 0, "data"),
        ([(1, 40), (1, 41)], None, "link"),
        # It is slower by half, but that is 2 of 100 ms.
        ([(1, 4), (1, 6)], None, "link"),
    ],
)
def test_what_keeps_ranks_waiting(own, rank, cause):
    found = straggler_of(times(*own))
    assert (rank, cause) == (None, None) if found is None else (found.rank, found.cause) == (rank, cause)


class Slow(Digits):
    """Of rank 1 the step, or the data before it, takes long."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def training_step(self, batch, batch_idx):
        if self.what == "compute" and self.global_rank == 1:
            time.sleep(0.03)
        return super().training_step(batch, batch_idx)


class SlowData(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_rank == 1:
            time.sleep(0.03)


def warned_of(what, way):
    callbacks = (SlowData(),) if what == "data" else ()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = fitted(way, {}, module=Slow(what), callbacks=callbacks, log_every_n_steps=10)
    told = [str(one.message) for one in caught if "keeps the others waiting" in str(one.message)]
    return told, trainer.strategy.rank_times, float(trainer.callback_metrics["optcore/rank_imbalance"])


@pytest.mark.parametrize("way", ["none", "bf16", "diloco"])
@pytest.mark.parametrize("what", ["compute", "data"])
def test_the_slow_rank_is_named_with_its_cause(what, way):
    (told, found, imbalance), (told_by_other, *_) = run_ranks(warned_of, what, way)
    assert any(one.startswith("rank 1 ") and f"longer{' for its data' * (what == 'data')}" in one for one in told)
    assert not told_by_other
    assert straggler_of(found).rank == 1 and straggler_of(found).cause == what
    assert imbalance > 1.2
