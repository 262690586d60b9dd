from __future__ import annotations

import time

import numpy as np
import pytest
from lightning.pytorch.profilers import SimpleProfiler

from lightning_optcore.profiling import collector as columns
from lightning_optcore.profiling.collector import Collector
from lightning_optcore.profiling.device_clock import DeviceClock
from lightning_optcore.profiling.phases import BACKWARD, FORWARD, LOGGING, PHASES, VALIDATION, phase_of
from lightning_optcore.profiling.slots import HEAD, TIME, UNSPLIT
from lightning_optcore.profiling.system import Sampler

FETCH = "[_TrainingEpochLoop].train_dataloader_next"
STEP = "[Strategy]SingleDeviceStrategy.training_step"


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize(
    ("action", "phase"),
    [
        (FETCH, "data_wait"),
        (STEP, "forward"),
        ("[LightningModule]Net.optimizer_step", "optimizer"),
        ("optimizer_step", "optimizer"),  # as manual optimization reports it
        ("[LightningModule]Net.transfer_batch_to_device", "transfer"),
        ("[Callback]ModelCheckpoint{'monitor': 'a.b'}.on_train_batch_end", "checkpoint"),
        ("[Callback]LearningRateMonitor.on_train_batch_start", "callback"),
        ("[LightningModule]Net.on_train_batch_end", "callback"),
        ("[LightningModule]Net.setup", "other"),
        ("save_checkpoint", "checkpoint"),
        ("run_training_batch", "other"),
    ],
)
def test_every_action_has_its_phase(action, phase):
    assert phase_of(action)[0] == phase


def test_time_belongs_to_the_innermost_action():
    collector = Collector()
    with collector.profile("[LightningModule]Net.optimizer_step"):
        with collector.profile(STEP):
            spin(0.02)
        with collector.profile("[Strategy]SingleDeviceStrategy.backward"):
            spin(0.04)
    seconds = collector.seconds()
    assert seconds[FORWARD] == pytest.approx(0.02, abs=0.005)
    assert seconds[BACKWARD] == pytest.approx(0.04, abs=0.005)
    assert seconds["optimizer"] < 0.005


def test_the_phases_add_up_to_the_time_that_passed():
    start = time.perf_counter()
    collector = Collector()
    for _ in range(20):
        collector.start(FETCH)
        spin(0.001)
        collector.stop(FETCH)
        with collector.profile(STEP):
            spin(0.001)
        spin(0.001)
    assert sum(collector.seconds().values()) == pytest.approx(time.perf_counter() - start, abs=0.003)


def test_every_fetch_begins_a_step_and_old_steps_are_overwritten():
    collector = Collector(capacity=8)
    for _ in range(20):
        collector.start(FETCH)
        collector.stop(FETCH)
    rows = collector.rows()
    assert collector.steps == 20
    assert len(rows) == 8
    assert (rows[1:, TIME] > rows[:-1, TIME]).all(), "oldest first"
    assert rows[:, columns.STEP].tolist() == list(range(12, 20))
    assert (rows[1:, HEAD + columns.FETCH] >= rows[:-1, HEAD + columns.FETCH]).all()


def test_inside_a_whole_nothing_is_timed_apart():
    collector = Collector()
    with collector.whole(VALIDATION), collector.profile(STEP), collector.part(LOGGING):
        spin(0.01)
    seconds = collector.seconds()
    assert seconds[FORWARD] == seconds[LOGGING] == 0
    assert seconds[VALIDATION] == pytest.approx(0.01, abs=0.005)


def test_outside_of_a_whole_a_part_is_timed_apart():
    collector = Collector()
    with collector.profile(STEP), collector.part(LOGGING):
        spin(0.01)
    assert collector.seconds()[LOGGING] == pytest.approx(0.01, abs=0.005)
    assert collector.stack == []


def test_an_exception_leaves_the_stack_as_it_was():
    collector = Collector()
    with pytest.raises(RuntimeError), collector.profile(STEP), collector.profile(FETCH):
        raise RuntimeError
    assert collector.stack == []
    collector.stop("never started")
    assert collector.stack == []


def test_the_users_profiler_hears_of_every_action():
    theirs = SimpleProfiler()
    collector = Collector(theirs)
    for _ in range(3):
        with collector.profile(STEP):
            pass
        collector.start(FETCH)
        collector.stop(FETCH)
    assert len(theirs.recorded_durations[STEP]) == 3
    assert len(theirs.recorded_durations[FETCH]) == 3
    assert collector.recorded_durations is theirs.recorded_durations


def test_hooks_that_nobody_overrode_are_not_timed():
    from lightning.pytorch import Callback

    class Mine(Callback):
        def on_train_batch_end(self, *_):
            pass

    mine = Mine()
    collector = Collector(resolve=lambda action: mine)
    with collector.profile("[Callback]Mine.on_train_batch_start"):
        spin(0.002)
    assert collector.seconds()["callback"] == 0
    with collector.profile("[Callback]Mine.on_train_batch_end"):
        spin(0.002)
    assert collector.by_detail(collector.snapshot())["Mine"] > 0.001


def test_more_callbacks_than_slots_share_one():
    collector = Collector()
    for i in range(100):
        with collector.profile(f"[Callback]Mine{i}.on_train_batch_end"):
            pass
    assert collector.seconds()["callback"] > 0


class FakeClock:
    """The collector's clock, which only a test moves on."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def spin(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    clock = FakeClock()
    for module in ("collector", "spans"):
        monkeypatch.setattr(f"lightning_optcore.profiling.{module}.perf_counter_ns", clock)
    return clock


def short_steps(collector: Collector, clock: FakeClock, steps: int, now_and_then: float = 0.0) -> None:
    """Run steps of .4 ms, three parts forward and one part other; every 50th has a callback that takes longer."""
    for step in range(steps):
        collector.start(FETCH)
        collector.stop(FETCH)
        with collector.profile(STEP):
            clock.spin(0.0003)
        clock.spin(0.0001)
        if step % 50 == 49 and now_and_then:
            with collector.profile("[Callback]Mine.on_train_batch_end"):
                clock.spin(now_and_then)
    collector.mark_step()


def detailed(collector: Collector) -> np.ndarray:
    """Return of every step whether it was timed in detail."""
    grown = np.diff(collector.rows(), axis=0)
    return np.repeat(grown[:, HEAD + UNSPLIT] == 0, grown[:, columns.STEP])


def test_of_short_steps_one_in_eight_is_timed_in_detail_and_stands_for_all(clock):
    collector = Collector()
    short_steps(collector, clock, 1000)
    seconds = collector.seconds()
    assert 0.08 < detailed(collector)[64:].mean() < 0.16
    assert seconds[FORWARD] == pytest.approx(0.3)
    assert seconds["other"] == pytest.approx(0.1)
    # The same of any steps, by step.
    grown = collector.divided(np.diff(collector.rows(300)[:, HEAD:], axis=0))
    assert (grown[:, UNSPLIT] == 0).all()
    assert grown[:, PHASES.index(FORWARD)] == pytest.approx(0.0003e9 * np.diff(collector.rows(300)[:, columns.STEP]))


def test_what_happens_now_and_then_is_timed_in_every_step(clock):
    collector = Collector()
    short_steps(collector, clock, 1000, now_and_then=0.005)
    assert not detailed(collector)[64:][49::50].all(), "some of the callback's steps are not detailed"
    assert collector.by_detail(collector.snapshot())["Mine"] == pytest.approx(20 * 0.005)
    assert collector.seconds()[FORWARD] == pytest.approx(0.3)


def test_longer_steps_are_all_timed_in_detail(clock):
    collector = Collector()
    for _ in range(100):
        collector.start(FETCH)
        collector.stop(FETCH)
        with collector.profile(STEP):
            clock.spin(0.021)
    assert detailed(collector).all()


def test_steps_that_become_longer_are_timed_in_detail_again(clock):
    collector = Collector()
    short_steps(collector, clock, 200)
    assert not detailed(collector)[-64:].all()
    for _ in range(160):
        with collector.profile(FETCH):
            clock.spin(0.021)
    assert detailed(collector)[-32:].all()
    assert collector.detailed


def test_a_device_that_is_timed_has_all_steps(clock):
    class Event:
        def record(self):
            pass

        def query(self):
            return False

    collector = Collector(device=DeviceClock(Event))
    short_steps(collector, clock, 200)
    assert detailed(collector).all()


def test_samples_come_at_their_interval_where_few_steps_are_detailed(clock, monkeypatch):
    monkeypatch.setattr("lightning_optcore.profiling.system.perf_counter_ns", clock)
    collector = Collector()
    sampler = collector.sampler = Sampler(interval=0.1, readers=[])
    sampler.due = 0
    for _ in range(1000):
        collector.start(FETCH)
        collector.stop(FETCH)
        clock.spin(0.01)
    assert not detailed(collector).all()
    assert len(sampler._waiting) == pytest.approx(100, abs=5)
    gaps = np.diff([taken for taken, *_ in sampler._waiting]) / 1e9
    assert gaps.max() < 0.15, "none is left out"
