"""What several tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from lightning.pytorch import Callback, LightningModule, Trainer
from postgresql_server import Server, programs

from lightning_optcore import Latency, Measurement


def needs_package(present: bool, package: str) -> None:
    """Skip where Debian's ``package`` is not installed; fail in CI, which installs it."""
    if not present:
        reason = f"needs Debian's package: apt-get install {package}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture
def fashion_mnist() -> Path:
    """The folder of FashionMNIST's IDX files."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    needs_package(folder.is_dir(), "dataset-fashion-mnist")
    return folder


@pytest.fixture
def browser() -> str:
    """Path of a Chromium."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    needs_package(found is not None, "chromium")
    return str(found)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """A PostgreSQL server of this process's tests, started by the first that needs it."""
    folder = programs()
    needs_package(folder is not None, "postgresql")
    assert folder is not None
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture
def postgresql(postgresql_server: Server) -> Iterator[str]:
    """The URL, with its password, of an empty database on the server."""
    name = postgresql_server.new_database()
    yield postgresql_server.url(name)
    postgresql_server.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What a new store is opened with: in a file, and on a server."""
    return str(tmp_path / "new" / "optcore.db") if request.param == "sqlite" else request.getfixturevalue("postgresql")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Take back what a test left in the environment: with ``LOCAL_RANK``, Lightning starts no ranks any more."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet Trainer on the CPU whose files go to ``tmp_path``."""

    def make(*callbacks: Callback, **options: Any) -> Trainer:
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(callbacks=list(callbacks), **{**settings, **options})

    return make


@pytest.fixture
def make_measurement() -> Callable[..., Measurement]:
    def make(**changes: Any) -> Measurement:
        values: dict[str, Any] = {
            "params": 10,
            "flops": 20,
            "size_bytes": 400,
            "latency_ms": {1: Latency(0.5, 0.6, 0.01, 100), 32: Latency(4.0, 5.0, 0.1, 100)},
            "throughput": {1: 2000.0, 32: 8000.0},
            "peak_memory_bytes": 1_000_000,
            "quality": {"val/acc": 0.9},
            "device": "cpu",
            "num_threads": 1,
            "hardware": "a processor",
            "versions": {"torch": "2.13.0"},
            "measured_at": "2026-01-01T00:00:00+00:00",
        }
        return Measurement(**{**values, **changes})

    return make


class ChildCaller(LightningModule):
    """Its steps call ``self.net(x)``; ``forward`` is not used by any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the steps of this module never call forward")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.net(images.flatten(1)), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images.flatten(1))
        self.log("val/loss", torch.nn.functional.cross_entropy(logits, labels))
        self.log("val/acc", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.fixture
def child_caller() -> LightningModule:
    torch.manual_seed(0)
    return ChildCaller()


@pytest.fixture
def optcore(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in ``tmp_path`` as a user would; its output comes back, whatever its exit code."""

    def run(*arguments: str, cwd: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return warm.run([sys.executable, "-m", "lightning_optcore.cli", *arguments], cwd=cwd, env=env)

    return run
