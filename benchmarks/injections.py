"""What makes a training run slow, one thing each: functions, networks, callbacks, and what runs beside it."""

from __future__ import annotations

import gc
import http.server
import mmap
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from plain_training import BATCH, Network
from torch import Tensor


def spin(seconds: float) -> None:
    """Keep the core busy for so much CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def sort_text(index: int) -> None:
    for _ in range(_sorts()):
        sorted(str(i * 7919 % 1009) for i in range(50))


@cache
def _sorts() -> int:
    """Return how often it takes a third of a millisecond of this machine: to sort faster would be no bottleneck."""
    taken = []
    for _ in range(200):
        start = time.thread_time()
        sorted(str(i * 7919 % 1009) for i in range(50))
        taken.append(time.thread_time() - start)
    return round(0.0003 / statistics.median(taken))


def wait_for_socket(index: int) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.settimeout(0.0005)
        one.listen()
        with suppress(TimeoutError):
            one.accept()


class DiskFile:
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


class Server:
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


def slow_collate(samples: list[Any]) -> Any:
    batch = torch.utils.data.default_collate(samples)
    for _ in range(3):
        torch.stack([torch.sort(sample.repeat(20)).values for sample in batch[0]])
    return batch


def waiting_collate(samples: list[Any]) -> Any:
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
