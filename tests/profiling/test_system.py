from __future__ import annotations

import multiprocessing
import time
from types import SimpleNamespace

import pytest

from lightning_optcore.profiling.cgroups import cgroup_files
from lightning_optcore.profiling.system import Sampler
from lightning_optcore.profiling.system_readers import NvmlReader, ProcReader, PsutilReader, new_row


def busy() -> None:
    while True:
        pass


def test_samples_come_at_the_interval_and_none_is_lost_silently():
    sampler = Sampler(interval=0.02)
    sampler.start()
    time.sleep(0.5)
    sampler.stop()
    assert sampler.samples + sampler.dropped >= 20
    table = sampler.table()
    assert (table["time"][1:] > table["time"][:-1]).all()
    assert table["rss"][-1] > 1e6
    assert 0 < table["memory_used"][-1] < 1
    sampler.close()


def test_it_can_be_switched_off_and_on():
    sampler = Sampler(interval=0.02)
    sampler.start()
    sampler.stop()
    count = sampler.samples
    time.sleep(1.0)
    assert sampler.samples == count
    assert not sampler.running
    sampler.start()
    time.sleep(0.1)
    sampler.close()
    assert sampler.samples > count
    assert sampler.dropped < 30, "what was not to be sampled was not dropped"
    assert sampler.failures == {}


def test_ticks_are_samples_for_whoever_looks_next():
    sampler = Sampler(interval=0.01)
    sampler.start()
    sampler.relax()
    ticks = 0
    for _ in range(30):
        time.sleep(0.011)
        if time.perf_counter_ns() >= sampler.due:
            sampler.tick()
            ticks += 1
    table = sampler.table()
    sampler.close()
    assert ticks > 10
    assert ticks < len(table["time"]) <= sampler.samples
    assert (table["time"][1:] > table["time"][:-1]).all()
    assert (table["cpu"][1:] >= table["cpu"][:-1]).all()


class Broken:
    """Fails between two steps, and when it is asked for what moves slowly."""

    due = 0.0

    def glance(self, *_):
        raise OSError("gone")

    fill = seldom = glance

    def close(self):
        pass


def test_a_source_that_fails_costs_neither_the_run_nor_the_others():
    sampler = Sampler(interval=0.01, readers=[Broken(), PsutilReader()])
    sampler.start()
    sampler.tick()
    time.sleep(0.05)
    sampler.close()
    assert sampler.failures == {"Broken": "OSError: gone"}
    assert sampler.table()["rss"][-1] > 1e6


def test_old_samples_are_overwritten():
    sampler = Sampler(interval=0.01, capacity=5)
    sampler.start()
    time.sleep(0.2)
    sampler.close()
    table = sampler.table()
    assert len(table["time"]) == 5
    assert (table["time"][1:] > table["time"][:-1]).all()


def test_workers_count_and_their_time_is_not_lost_when_they_end():
    reader = ProcReader()
    row = new_row()

    def look() -> None:
        reader.fill(row, reader.glance(time.perf_counter_ns()))

    worker = multiprocessing.get_context("fork").Process(target=busy, daemon=True)
    worker.start()
    try:
        time.sleep(0.3)
        reader.seldom(row)
        look()
        assert row[9] == 1
        used = row[10]
        assert used > 0.05
    finally:
        worker.kill()
        worker.join()
    look()
    reader.seldom(row)
    look()
    assert row[9] == 0
    assert row[10] >= used
    reader.close()


def test_workers_that_come_later_have_their_share_of_the_time():
    sampler = Sampler(interval=0.02)
    sampler.start()
    worker = multiprocessing.get_context("fork").Process(target=busy, daemon=True)
    worker.start()
    try:
        time.sleep(1.5)
        sampler.close()
    finally:
        worker.kill()
        worker.join()
    table = sampler.table()
    used, seconds = (table[name][-1] - table[name][0] for name in ("worker_cpu", "worker_time"))
    assert 1 < seconds < 10
    assert 0.1 < used / seconds < 1.1


def test_without_proc_psutil_tells_what_it_can():
    sampler = Sampler(interval=0.02, readers=[PsutilReader()])
    sampler.start()
    time.sleep(0.1)
    sampler.close()
    table = sampler.table()
    assert table["rss"][-1] > 1e6
    assert table["cpu"][-1] > 0
    assert sampler.failures == {}


class FakeNvml:
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.calls = 0
        self.fails = False
        self.shut_down = False

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMemoryInfo(self, device):
        self.calls += 1
        if self.fails:
            raise RuntimeError("GPU is lost")
        return SimpleNamespace(used=(50, 95)[device], total=100)

    def nvmlDeviceGetUtilizationRates(self, device):
        return SimpleNamespace(gpu=(10, 80)[device])

    def nvmlDeviceGetTemperature(self, device, sensor):
        return 60 + device

    def nvmlDeviceGetPowerUsage(self, device):
        return 100_000

    def nvmlShutdown(self):
        self.shut_down = True


def test_gpus_are_read_seldom_and_may_fail_half_way():
    nvml = FakeNvml()
    sampler = Sampler(interval=0.01, readers=[NvmlReader(nvml)])
    sampler.start()
    sampler._sample(seldom=True)
    table = sampler.table()
    assert (table["gpu_busy"][-1], table["gpu_memory"][-1]) == (80, 0.95)
    assert (table["gpu_temperature"][-1], table["gpu_power"][-1]) == (61, 200)
    nvml.fails = True
    sampler._sample(seldom=True)
    sampler.close()
    assert sampler.failures == {"NvmlReader": "RuntimeError: GPU is lost"}
    assert nvml.calls < sampler.samples * 2
    assert nvml.shut_down


def test_the_cgroup_of_this_process_is_found_where_there_is_one():
    for key, path in cgroup_files().items():
        assert key in ("memory_limit", "memory_now", "memory_stat", "cpu_stat")
        assert path.startswith("/sys/fs/cgroup")


@pytest.mark.parametrize("interval", [0.05])
def test_what_runs_after_a_sample_runs_in_its_thread(interval):
    import threading

    seen = []
    sampler = Sampler(interval, on_sample=lambda: seen.append(threading.current_thread().name))
    sampler.start()
    time.sleep(0.3)
    sampler.close()
    assert set(seen) == {"optcore-sampler"}
