"""A process that trains nothing: it starts the replicas, starts them again when they die, and knows who is alive."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd, _hydra_subprocess_cmd
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed import PrefixStore, TCPStore

from lightning_optcore.distributed.launcher import _is_multirun
from lightning_optcore.distributed.replica_group import packed, serving_store, unpacked

T = TypeVar("T")
# Where a replica finds the lighthouse and the store of its supervisor.
LIGHTHOUSE, STORE = "OPTCORE_LIGHTHOUSE", "OPTCORE_STORE"
_POLL_SECONDS = 0.05


def active_key(pid: int) -> str:
    """Return the key that a replica sets in the supervisor's store when it knows the state of the training."""
    return f"active/{pid}"


class Start:
    """What replicas do in common before they know each other, in the supervisor's store.

    One that is started again finds what was said, and goes through it alone.
    """

    def __init__(self, store: PrefixStore, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.calls = 0

    def barrier(self) -> None:
        """Wait until all have come here once."""
        self.calls += 1
        self.store.set(f"{self.calls}/{self.rank}", "")
        self.store.wait([f"{self.calls}/{rank}" for rank in range(self.world_size)])

    def broadcast(self, value: T) -> T:
        """Return what rank 0 said here the first time."""
        self.calls += 1
        key = str(self.calls)
        if self.rank == 0 and not self.store.check([key]):
            cast(Any, self.store).set(key, packed(value).numpy().tobytes())
        return cast(T, unpacked(torch.frombuffer(bytearray(self.store.get(key)), dtype=torch.uint8)))


def supervise(
    commands: Sequence[Sequence[str]],
    *,
    max_restarts: int,
    timeout: float,
    heartbeat_timeout: float,
    host: str = "127.0.0.1",
    environment: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> int:
    """Run replicas until they have finished, and start again those that die while others go on.

    Args:
        commands: One for a replica, by rank.
        max_restarts: How often each is started again.
        timeout: Seconds that replicas wait for one which is alive and does not answer.
        heartbeat_timeout: Seconds of silence after which one is taken for dead.
        host: The only address at which the lighthouse and the store listen.
        environment: Of the replicas; by default that of this process.
        cwd: Where they run.

    Returns:
        0 if one of them finished and none failed after that, otherwise the exit code of the last one that trained.
    """
    os.environ.setdefault("RUST_LOG", "error")  # torchft tells every step otherwise.
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(
        bind=f"{host}:0",
        min_replicas=1,
        join_timeout_ms=int(timeout * 1000),
        quorum_tick_ms=50,
        heartbeat_timeout_ms=int(heartbeat_timeout * 1000),
    )
    store = serving_store(host, timeout)
    shared = {
        **(os.environ if environment is None else environment),
        # It tells the name of the machine, which need not lead to the address at which it listens.
        LIGHTHOUSE: f"http://{host}:{lighthouse.address().rsplit(':', 1)[1]}",
        STORE: f"{host}:{store.port}",
        "NODE_RANK": "0",
        "WORLD_SIZE": str(len(commands)),
    }
    replicas = _Replicas(commands, shared, store, cwd, max_restarts)
    before = _on_sigterm(_end)
    try:
        return replicas.run()
    finally:
        replicas.kill()
        _on_sigterm(before)
        lighthouse.shutdown()


class _Replicas:
    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environment: Mapping[str, str],
        store: TCPStore,
        cwd: str | None,
        max_restarts: int,
    ) -> None:
        self.commands, self.environment, self.store, self.cwd = commands, environment, store, cwd
        self.restarts_left = [max_restarts] * len(commands)
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int) -> None:
        environment = {**self.environment, "LOCAL_RANK": str(rank)}
        self.running[rank] = subprocess.Popen(self.commands[rank], env=environment, cwd=self.cwd)

    def is_active(self, rank: int) -> bool:
        replica = self.running[rank]
        return replica.poll() is None and self.store.check([active_key(replica.pid)])

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        for rank in list(self.running if ranks is None else ranks):
            replica = self.running.pop(rank)
            replica.kill()
            replica.wait()

    def run(self) -> int:
        for rank in range(len(self.commands)):
            self.start(rank)
        finished = False
        while self.running:
            codes = {rank: replica.poll() for rank, replica in self.running.items()}
            finished = finished or 0 in codes.values()
            for rank, code in codes.items():
                if code is None:
                    continue
                del self.running[rank]
                if code and not self._goes_on_without(rank, code, finished):
                    return code if code > 0 else 128 - code
            if finished:
                # Whoever still waits to be let in has come too late.
                self.kill([rank for rank in self.running if not self.is_active(rank)])
            time.sleep(_POLL_SECONDS)
        return 0

    def _goes_on_without(self, rank: int, code: int, finished: bool) -> bool:
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        if finished:
            rank_zero_warn(f"replica {rank} {how}, when another one had finished")
            return code < 0
        if not any(self.is_active(other) for other in self.running):
            rank_zero_warn(f"replica {rank} {how}, and no other one is left that knows the state of the training")
            return False
        if not self.restarts_left[rank]:
            rank_zero_warn(f"replica {rank} {how}: its restarts are used up, and the others go on without it")
            return True
        self.restarts_left[rank] -= 1
        rank_zero_info(f"replica {rank} {how}: it is started again, {self.restarts_left[rank]} restarts are left")
        self.start(rank)
        return True


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _on_sigterm(handler: signal._HANDLER) -> signal._HANDLER:
    # Handlers can be set by the main thread only.
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, handler)


class SupervisorLauncher(_Launcher):
    """Makes the process that calls ``fit`` the one that starts the replicas and waits for them.

    Args:
        num_processes: How many replicas.
        run: Runs their commands in a folder, and returns the exit code.
    """

    is_interactive_compatible = False

    def __init__(self, num_processes: int, run: Callable[..., int]) -> None:
        self.num_processes, self.run = num_processes, run

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any
    ) -> NoReturn:
        """Run the replicas, and end with them: they run the rest of the program.

        Raises:
            MisconfigurationException: In a multirun, which would end with its first job.
        """
        if _is_multirun():
            raise MisconfigurationException(
                "strategy=optcore_elastic in a multirun: the process that calls fit ends with its replicas; expected a "
                "run for each job"
            )
        _set_num_threads_if_needed(num_processes=self.num_processes)
        commands, cwd = _commands(self.num_processes)
        if trainer is not None:
            # Here nothing was trained that they could save or report.
            cast(Any, trainer).callbacks.clear()
            trainer.loggers.clear()
        raise SystemExit(self.run(commands, cwd=cwd))

    def kill(self, signum: Any) -> None:
        """Nothing: who is supervised ends with `launch`."""


def _commands(num_processes: int) -> tuple[list[Sequence[str]], str | None]:
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return [_basic_subprocess_cmd()] * num_processes, None
    commands = [_hydra_subprocess_cmd(local_rank) for local_rank in range(num_processes)]
    return [command for command, _ in commands], commands[0][1]
