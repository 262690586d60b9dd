"""What is known of a rank, and the error that names the one that failed."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

_COMMUNICATION = re.compile(r"gloo|nccl|ucc|Connection (closed|reset)|Broken pipe|collective", re.IGNORECASE)
_TIMEOUT = re.compile(r"tim(ed|e) ?out", re.IGNORECASE)


@dataclass(frozen=True)
class Process:
    """A process, so that no other is taken for it.

    Attributes:
        rank: Its rank.
        host: Name of its host.
        pid: Its number there.
        started: When it started, in seconds since 1970.
        machine: What is the same for processes that see each other by number and by loopback.
    """

    rank: int
    host: str
    pid: int
    started: float
    machine: str

    @classmethod
    def here(cls, rank: int) -> Process:
        """Return this process."""
        return cls(rank, socket.gethostname(), os.getpid(), psutil.Process().create_time(), _machine())

    def find(self) -> psutil.Process | None:
        """Return it if it is still there and can be seen from here."""
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.pid)
            if self.machine == _machine() and abs(found.create_time() - self.started) < 1:
                return found
        return None

    def is_stopped(self) -> bool:
        """Whether it was stopped by a signal (``SIGSTOP``), as far as can be seen from here."""
        found = self.find()
        with contextlib.suppress(psutil.Error):
            return found is not None and found.status() == psutil.STATUS_STOPPED
        return False


@dataclass(frozen=True)
class State:
    """What was last heard of a rank.

    Attributes:
        process: Its process.
        step: Its last optimizer step.
        phase: What it does.
        still: Seconds for which step and phase are the same.
        silent: Seconds since it was heard.
        waits: Whether a collective of it has waited in vain.
    """

    process: Process
    step: int
    phase: str
    still: float
    silent: float
    waits: bool = False


@dataclass(frozen=True)
class Failure:
    """A rank that failed.

    Attributes:
        process: Its process.
        step: Its last optimizer step that is known of.
        phase: What it did.
        what: ``died``, ``stalled`` or ``failed``.
        detail: What else is known; may be empty.

    Example:
        >>> print(Failure(Process(1, "a", 4711, 0.0, ""), 57, "backward", "died"))
        rank 1 (a, pid 4711) died after step 57 in backward
    """

    process: Process
    step: int
    phase: str
    what: str
    detail: str = ""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Failure:
        """Return what ``dataclasses.asdict`` made plain."""
        return cls(**{**fields, "process": Process(**fields["process"])})

    def __str__(self) -> str:
        who = f"rank {self.process.rank} ({self.process.host}, pid {self.process.pid})"
        return f"{who} {self.what} after step {self.step} in {self.phase}" + (f": {self.detail}" if self.detail else "")


class RankFailure(RuntimeError):
    """Training cannot go on, because a rank failed: another one than that which raises this.

    Attributes:
        failure: What is known of it.
    """

    def __init__(self, failure: Failure, advice: str = "") -> None:
        super().__init__(failure, advice)
        self.failure = failure
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.failure}{self.advice and f'. {self.advice}'}"

    @property
    def rank(self) -> int:
        """The rank that failed."""
        return self.failure.process.rank

    @property
    def host(self) -> str:
        """Its host."""
        return self.failure.process.host

    @property
    def pid(self) -> int:
        """Its process."""
        return self.failure.process.pid

    @property
    def step(self) -> int:
        """Its last optimizer step that is known of."""
        return self.failure.step

    @property
    def phase(self) -> str:
        """What it did."""
        return self.failure.phase


def is_communication_error(error: BaseException | None) -> bool:
    """Whether an error is one of the process group's, so that the cause may be another rank.

    Example:
        >>> is_communication_error(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
        True
        >>> is_communication_error(ValueError("shapes differ"))
        False
    """
    return any(
        isinstance(one, torch.distributed.DistError)
        or (isinstance(one, RuntimeError) and _COMMUNICATION.search(str(one)) is not None)
        for one in _chain(error)
    )


def is_timeout(error: BaseException | None) -> bool:
    """Whether a process group waited for as long as it may."""
    return is_communication_error(error) and any(_TIMEOUT.search(str(one)) for one in _chain(error))


def behind(states: Iterable[State], rank: int, alive: float) -> State | None:
    """Return the rank for which the others wait, when a collective of this rank has waited in vain.

    Args:
        states: What is known of the ranks.
        rank: This rank.
        alive: Seconds for which a rank may be silent and be alive.

    Returns:
        One that is silent, or else the one with the fewest steps that does not wait itself; None if all wait.

    Example:
        >>> processes = [Process(rank, "a", rank, 0.0, "") for rank in range(3)]
        >>> states = [State(one, 57, "backward", 30.0, 0.1, waits=one.rank != 2) for one in processes]
        >>> behind(states, rank=0, alive=5.0).process.rank
        2
    """
    others = [state for state in states if state.process.rank != rank]
    if silent := [state for state in others if state.silent > alive]:
        return max(silent, key=lambda state: state.silent)
    return min((s for s in others if not s.waits), key=lambda s: (s.step, -s.still), default=None)


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _machine() -> str:
    """Return what tells machines and containers apart: processes with the same one share loopback and pids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts += [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("net", "pid")]
    return " ".join(parts)
