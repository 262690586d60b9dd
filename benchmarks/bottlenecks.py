"""Training runs with one bottleneck each, whose cause is known because it was put there.

Every cause is written in two unlike ways, ``a`` and ``b``: thresholds may be tuned on the one half and are tested on
the other. Healthy runs stand beside them.
"""

from __future__ import annotations

import gc
import http.server
import mmap
import multiprocessing
import os
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import AdvancedProfiler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_optcore.callbacks import PerformanceProfiler
from lightning_optcore.profiling.profile_report import ProfileReport

FEATURES = 256
BATCH = 64


class Samples(Dataset[Any]):
    """Random vectors whose fetching can be made dear."""

    def __init__(self, count: int = 64 * 400, before: Callable[[int], None] | None = None) -> None:
        self.inputs = torch.randn(4096, FEATURES)
        self.count = count
        self.before = before

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.before is not None:
            self.before(index)
        return self.inputs[index % 4096], index % 10


class Stream(IterableDataset[Any]):
    """The same without an order of its own."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.inputs = torch.randn(4096, FEATURES)
        self.before = before

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for index in range(64 * 400):
            self.before(index)
            yield self.inputs[index % 4096], index % 10


class Network(LightningModule):
    """An MLP whose step takes a few milliseconds on one core."""

    def __init__(self, width: int = 768, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(FEATURES, width), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@dataclass
class Case:
    """One run.

    Args:
        model: What is trained.
        loader: Its data.
        val_loader: What it is validated on.
        trainer: Arguments of the Trainer.
        callbacks: Beside the profiler.
        around: What is there while it runs, e.g. another process.
        steps: Length of the fit.
    """

    model: LightningModule
    loader: Any
    val_loader: Any = None
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: list[Callback] = field(default_factory=list)
    around: Callable[[], Any] | None = None
    steps: int = 150


def loader_of(
    dataset: Any = None, batch_size: int = BATCH, shuffle: bool | None = None, **options: Any
) -> DataLoader[Any]:
    """Return a loader, shuffled where its dataset can be."""
    dataset = dataset if dataset is not None else Samples()
    shuffle = not isinstance(dataset, IterableDataset) if shuffle is None else shuffle
    return DataLoader(dataset, batch_size, shuffle=shuffle, **options)


def spin(seconds: float) -> None:
    """Keep the core busy for so much CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def _sort_text(index: int) -> None:
    for _ in range(2):
        sorted(str(i * 7919 % 1009) for i in range(400))


def _wait_for_socket(index: int) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.settimeout(0.0005)
        one.listen()
        with suppress(TimeoutError):
            one.accept()


class _DiskFile:
    """A file that is read past the page cache, or is thrown out of it before every batch."""

    def __init__(self, direct: bool) -> None:
        self.folder = tempfile.TemporaryDirectory(
            prefix="optcore-disk-", dir=os.environ.get("OPTCORE_DISK", "/var/tmp")
        )
        self.path = Path(self.folder.name) / "data"
        self.size = 16 << 20
        self.path.write_bytes(os.urandom(self.size))
        self.direct = direct
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def __call__(self, index: int) -> None:
        block = 1 << 18
        start = (index * 2654435761 % (self.size // block)) * block
        if self.direct:
            handle = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            os.preadv(handle, [mmap.mmap(-1, block)], start)
        else:
            handle = os.open(self.path, os.O_RDONLY)
            if index % BATCH == 0:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(handle, block, (index % BATCH) * block)
        os.close(handle)


class _Server:
    """Serves bytes over HTTP, or raw, from a process of its own, at a limited rate."""

    def __init__(self, raw: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.raw = raw
        self.process = multiprocessing.get_context("fork").Process(target=self._serve, daemon=True)

    def _serve(self) -> None:
        payload = os.urandom(100_000)
        if self.raw:
            with socket.create_server(("127.0.0.1", self.port)) as server:
                while True:
                    peer, _ = server.accept()
                    with peer:
                        time.sleep(0.001)
                        peer.sendall(payload)
        else:

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    time.sleep(0.001)
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(payload)

                def log_message(self, *_: Any) -> None:
                    pass

            http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler).serve_forever()

    @contextmanager
    def running(self) -> Iterator[None]:
        # Not through multiprocessing's list of children: it is no worker.
        self.process.start()
        multiprocessing.process._children.discard(self.process)  # type: ignore[attr-defined]
        time.sleep(0.3)
        try:
            yield
        finally:
            self.process.kill()
            self.process.join()

    def __call__(self, index: int) -> None:
        if index % 8:
            return
        if self.raw:
            with socket.create_connection(("127.0.0.1", self.port)) as peer:
                while peer.recv(65536):
                    pass
        else:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/").read()


def _slow_collate(samples: list[Any]) -> Any:
    batch = torch.utils.data.default_collate(samples)
    for _ in range(3):
        torch.stack([torch.sort(sample.repeat(20)).values for sample in batch[0]])
    return batch


def _waiting_collate(samples: list[Any]) -> Any:
    time.sleep(0.02)
    return torch.utils.data.default_collate(samples)


class SlowTransfer(Network):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        spin(0.008)
        return batch


class SlowCopy(Network):
    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        big = batch[0].repeat(400, 1).double().float()
        return [big[: len(batch[0])].clone(), batch[1]]


class ManyItems(Network):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        # By the clock: a count of calls is no bottleneck where Python is fast and the backward pass is not.
        end = time.perf_counter() + 0.025
        while time.perf_counter() < end:
            for _ in range(1_000):
                loss.item()
        return loss


class SlowMetric(Network):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            for _ in range(4):
                torch.linalg.svdvals(batch[0].T @ batch[0])
        return loss


class ManyMoments(Network):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-4, foreach=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0][:4], batch[1][:4]], batch_idx)


class ClosurePenalty(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() == 2:
                    torch.linalg.qr(parameter[:, :256])
        return loss


class SlowOptimizer(Network):
    def configure_optimizers(self) -> Any:
        return ClosurePenalty(self.parameters(), lr=1e-2)


class LogsALot(Network):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for i in range(250):
            self.log(f"metric/{i}", loss)
        return loss


class SlowLogger(DummyLogger):
    """A service that takes its time."""

    def __init__(self) -> None:
        super().__init__()

    def log_metrics(self, *_: Any, **__: Any) -> None:
        time.sleep(0.01)


class Spinning(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        spin(0.008)


class Snooping(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            torch.histc(parameter.grad.repeat(8) if parameter.dim() == 1 else parameter.grad.repeat(4, 1))


class SlowValidation(Network):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        time.sleep(0.02)


class MakesCycles(Network):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        gc.collect()
        return super().training_step(batch, batch_idx)


class HoldsCycles(Network):
    """Many objects in cycles: the collector's thresholds do the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [[i] for i in range(400_000)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for _ in range(3):
            ring = [[None] for _ in range(6_000)]
            for one in ring:
                one[0] = one  # type: ignore[call-overload]
        return super().training_step(batch, batch_idx)


class KeepsGraphs(Network):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # Nothing goes backwards through this graph, so nothing frees it.
        self.losses.append(self.net(batch[0]).mean())
        return super().training_step(batch, batch_idx)


class KeepsBatches(Callback):
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kept.append(batch[0].repeat(8, 1))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def neighbours(count: int, *, numeric: bool = False) -> Iterator[None]:
    """Keep other processes busy meanwhile."""
    context = multiprocessing.get_context("fork")
    busy = [context.Process(target=_numeric if numeric else _endless, daemon=True) for _ in range(count)]
    for one in busy:
        one.start()
        multiprocessing.process._children.discard(one)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.join()


def _endless() -> None:
    while True:
        pass


def _numeric() -> None:
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((300, 300))
    while True:
        matrix @ matrix


def _checkpointing(folder: str, weights_only: bool) -> list[Callback]:
    return [
        ModelCheckpoint(
            folder, every_n_train_steps=1 if not weights_only else 2, save_top_k=1, save_weights_only=weights_only
        )
    ]


def _case(model: LightningModule | None = None, loader: Any = None, **options: Any) -> Case:
    return Case(model if model is not None else Network(), loader if loader is not None else loader_of(), **options)


def _served(raw: bool) -> Case:
    server = _Server(raw)
    return _case(loader=loader_of(Samples(before=server)), around=server.running)


def _validating(model: LightningModule, count: int, interval: int) -> Case:
    return _case(model, val_loader=loader_of(Samples(count)), trainer={"val_check_interval": interval})


# (cause, half) -> how to make the run in an empty folder
CASES: dict[tuple[str, str], Callable[[str], Case]] = {
    ("data.latency", "a"): lambda _: _case(loader=loader_of(Samples(before=lambda _: time.sleep(0.0003)))),
    ("data.latency", "b"): lambda _: _case(loader=loader_of(Stream(_wait_for_socket))),
    ("data.cpu", "a"): lambda _: _case(loader=loader_of(Samples(before=lambda _: spin(0.0003)))),
    ("data.cpu", "b"): lambda _: _case(loader=loader_of(Samples(before=_sort_text))),
    ("data.workers", "a"): lambda _: _case(
        loader=loader_of(Samples(before=lambda _: time.sleep(0.0006)), num_workers=1, persistent_workers=True)
    ),
    ("data.workers", "b"): lambda _: _case(loader=loader_of(Samples(before=_sort_text), num_workers=1)),
    ("data.disk", "a"): lambda _: _case(loader=loader_of(Samples(before=_DiskFile(direct=True)))),
    ("data.disk", "b"): lambda _: _case(loader=loader_of(Samples(before=_DiskFile(direct=False)), shuffle=False)),
    ("data.collate", "a"): lambda _: _case(loader=loader_of(collate_fn=_slow_collate)),
    ("data.collate", "b"): lambda _: _case(loader=loader_of(collate_fn=_waiting_collate, num_workers=1)),
    ("network", "a"): lambda _: _served(raw=False),
    ("network", "b"): lambda _: _served(raw=True),
    ("transfer", "a"): lambda _: _case(SlowTransfer()),
    ("transfer", "b"): lambda _: _case(SlowCopy()),
    ("compute", "a"): lambda _: _case(ManyItems()),
    ("compute", "b"): lambda _: _case(SlowMetric()),
    ("launch_overhead", "a"): lambda _: _case(Network(32, 2), loader_of(batch_size=1)),
    ("launch_overhead", "b"): lambda _: _case(Network(16, 24), loader_of(batch_size=4)),
    ("optimizer", "a"): lambda _: _case(ManyMoments(1536, 3)),
    ("optimizer", "b"): lambda _: _case(SlowOptimizer(512, 2)),
    ("logging", "a"): lambda _: _case(LogsALot()),
    ("logging", "b"): lambda _: _case(trainer={"logger": SlowLogger(), "log_every_n_steps": 1}),
    ("callback", "a"): lambda _: _case(callbacks=[Spinning()]),
    ("callback", "b"): lambda _: _case(callbacks=[Snooping()]),
    ("validation", "a"): lambda _: _validating(SlowValidation(), 64 * 4, 10),
    ("validation", "b"): lambda _: _validating(Network(), 64 * 30, 15),
    ("checkpoint", "a"): lambda folder: _case(
        callbacks=_checkpointing(folder, weights_only=False), trainer={"enable_checkpointing": True}
    ),
    ("checkpoint", "b"): lambda folder: _case(
        callbacks=_checkpointing(folder, weights_only=True), trainer={"enable_checkpointing": True}
    ),
    ("garbage_collection", "a"): lambda _: _case(MakesCycles()),
    ("garbage_collection", "b"): lambda _: _case(HoldsCycles()),
    ("oversubscription", "a"): lambda _: _case(around=lambda: threads(16)),
    ("oversubscription", "b"): lambda _: _case(Network(512, 6), around=lambda: threads(6)),
    ("memory.leak", "a"): lambda _: _case(KeepsGraphs(), steps=500),
    ("memory.leak", "b"): lambda _: _case(callbacks=[KeepsBatches()], steps=500),
    ("noisy_neighbour", "a"): lambda _: _case(around=lambda: neighbours(4)),
    ("noisy_neighbour", "b"): lambda _: _case(around=lambda: neighbours(6, numeric=True)),
    ("config", "a"): lambda _: _case(trainer={"detect_anomaly": True}),
    ("config", "b"): lambda folder: _case(trainer={"profiler": AdvancedProfiler(folder, "advanced")}),
}


class WithAdam(Network):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Convolutions(Network):
    def __init__(self) -> None:
        super().__init__(8, 1)
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 16, 16)), nn.Conv2d(1, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, 2), nn.ReLU(),
            nn.Flatten(), nn.Linear(24 * 36, 10),
        )  # fmt: skip


class Recurrent(Network):
    def __init__(self) -> None:
        super().__init__(8, 1)
        self.lstm = nn.LSTM(16, 64, batch_first=True)
        self.net = nn.Linear(64, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden, _ = self.lstm(batch[0].unflatten(1, (16, 16)))
        return nn.functional.cross_entropy(self.net(hidden[:, -1]), batch[1])


class Attention(Network):
    def __init__(self) -> None:
        super().__init__(8, 1)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.net = nn.Sequential(
            nn.Unflatten(1, (8, 32)), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(256, 10)
        )


class Manual(Network):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()  # type: ignore[union-attr]


HEALTHY: dict[str, Callable[[str], Case]] = {
    "mlp": lambda _: _case(),
    "mlp, adam": lambda _: _case(WithAdam()),
    "convolutions": lambda _: _case(Convolutions()),
    "lstm": lambda _: _case(Recurrent()),
    "transformer": lambda _: _case(Attention()),
    "manual optimization": lambda _: _case(Manual()),
    "accumulation": lambda _: _case(WithAdam(), trainer={"accumulate_grad_batches": 4}),
    "one worker": lambda _: _case(loader=loader_of(num_workers=1)),
    "logger and validation": lambda folder: _case(
        val_loader=loader_of(Samples(64 * 5)), trainer={"logger": CSVLogger(folder), "val_check_interval": 60}
    ),
    "checkpoints at times": lambda folder: _case(
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=100)], trainer={"enable_checkpointing": True}
    ),
}


def run(make: Callable[[str], Case], seed: int = 0, **profiler: Any) -> ProfileReport:
    """Make a run and return its profile.

    Args:
        make: Makes the case.
        seed: Of everything random.
        profiler: Arguments of the profiler.
    """
    seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory(prefix="optcore-bottleneck-") as folder:
        case = make(folder)
        callback = PerformanceProfiler(**{"live": False, "output_dir": folder, **profiler})
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_steps": case.steps,
            "max_time": {"seconds": 12},
            "default_root_dir": folder,
        }
        trainer = Trainer(**{**settings, **case.trainer}, callbacks=[*case.callbacks, callback])
        try:
            with case.around() if case.around is not None else threading.Lock():
                trainer.fit(case.model, case.loader, case.val_loader)
        finally:
            torch.autograd.set_detect_anomaly(False)
        assert callback.report is not None
        return callback.report
