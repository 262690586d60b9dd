from __future__ import annotations

import numpy as np
import pytest

from lightning_optcore.profiling.collector import Collector
from lightning_optcore.profiling.evidence import LoaderFacts, gather
from lightning_optcore.profiling.system import Sampler
from lightning_optcore.profiling.system_readers import COLUMNS
from lightning_optcore.profiling.timeline import timeline


@pytest.fixture
def ten_seconds(monkeypatch) -> Collector:
    """Steps of ten milliseconds."""
    now = 0

    def clock() -> int:
        return now

    monkeypatch.setattr("lightning_optcore.profiling.collector.perf_counter_ns", clock)
    collector = Collector()
    for _ in range(1001):
        collector.mark_step()
        now += 10_000_000
    return collector


def samples(**columns: np.ndarray) -> dict[str, np.ndarray]:
    time = np.arange(0.05, 10, 0.1)
    return {name: np.zeros(len(time)) for name in COLUMNS} | {"time": time} | columns


def stairs(time: np.ndarray, readings: list[float]) -> np.ndarray:
    """Return, of every moment, when was read last."""
    return np.array(readings)[np.searchsorted(readings, time, side="right") - 1]


def test_a_rate_is_that_between_its_own_readings(ten_seconds):
    time = np.arange(0.05, 10, 0.1)
    machine, own = stairs(time, [0.0, 1.05, 2.35, 4.55, 7.05]), stairs(time, [0.0, 3.05, 8.05])
    system = samples(machine_time=machine, machine_busy=1.5 * machine, own_time=own, main_wait=0.4 * own)
    cpu = gather(ten_seconds, system, LoaderFacts()).cpu
    assert cpu.machine == pytest.approx(1.5)
    assert cpu.waiting == pytest.approx(0.4)
    shown = timeline(ten_seconds, system, bins=10)["system"]["waiting for a core"]
    assert shown[:8] == pytest.approx([0.4] * 8, abs=0.02)


@pytest.mark.parametrize(
    ("megabytes", "steady"), [(lambda t: 100 + 20 * t, True), (lambda t: 100 + 200 * (t > 5), False)]
)
def test_memory_that_is_read_seldom_is_judged_by_its_readings(ten_seconds, megabytes, steady):
    time = np.arange(0.05, 10, 0.1)
    readings = [0.0, *np.cumprod([1.2] * 13)]
    own = stairs(time, readings)
    assert own[-1] < 9
    system = samples(own_time=own, rss=1e6 * megabytes(own))
    memory = gather(ten_seconds, system, LoaderFacts()).memory
    assert memory.steadiness == pytest.approx(float(steady), abs=0.1)
    if steady:
        assert memory.mb_per_step == pytest.approx(0.2, rel=0.05)


def test_what_workers_took_between_two_looks_is_no_steady_growth(ten_seconds):
    time = np.arange(0.05, 10, 0.1)
    looked = stairs(time, [0.0, 3.05, 6.05, 9.05])
    memory = gather(
        ten_seconds, samples(own_time=time, seldom_time=looked, worker_rss=20e6 * looked), LoaderFacts()
    ).memory
    assert memory.total_mb > 50
    assert memory.steadiness == 0


def test_the_sampler_says_when_it_read_what():
    sampler = Sampler(interval=0.01)
    sampler.start()
    for _ in range(5):
        sampler.tick()
    sampler.close()
    table = sampler.table()
    for name in ("own_time", "seldom_time", "machine_time", "worker_time"):
        assert (table[name] > 0).all()
        assert (table[name] <= table["time"]).all()
        assert table[name][0] == table["time"][0]
