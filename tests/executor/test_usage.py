"""What a machine uses, also with a fake NVML: there is no GPU here."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from lightning_optcore.executor.usage import benchmark, gpu_names, machine_usage


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: i)
    rates = lambda handle: SimpleNamespace(gpu=40 * (handle + 1))  # noqa: E731
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", rates)


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    usage = machine_usage()
    assert "gpu_percent" not in usage and gpu_names() == []
    assert 0 < usage["memory_percent"] < 100 and usage["disk_free_bytes"] > 0 and benchmark(0.01) > 0


def test_the_gpus_of_this_process(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_usage()["gpu_percent"] == 60 and gpu_names() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert gpu_names() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpu_names() == []


def test_a_gpu_that_does_not_tell_how_busy_it_is(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", refuse)
    assert "gpu_percent" not in machine_usage()
