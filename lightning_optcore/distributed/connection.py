"""The start of a process group: within the time allowed for it, or with an error that says who is missing."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_optcore.distributed._compat import default_store
from lightning_optcore.distributed.gathering import begin_anew

log = logging.getLogger(__name__)

_MAX_PAUSE = 5.0  # seconds between attempts
# Groups made so far at one address, whose store may be the same.
_groups: Counter[str] = Counter()


def restart_count() -> int:
    """Return how often torchrun has started the ranks anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def connect(
    environment: ClusterEnvironment,
    backend: str,
    *,
    start_timeout: float = 300.0,
    retry_attempts: int = 3,
    **options: Any,
) -> torch.distributed.Store:
    """Start the default process group, if there is none yet, and return its store.

    The timeout of its collectives is ``start_timeout`` at first; see :func:`set_timeout`.

    Args:
        environment: Knows the address, the rank and the number of ranks.
        backend: ``"gloo"``, ``"nccl"``, ...
        start_timeout: Seconds within which all ranks must have come.
        retry_attempts: How often a busy port, or one that nobody listens at yet, is tried again within this time.
        options: For ``torch.distributed.init_process_group``.

    Raises:
        MisconfigurationException: If the port is taken by another program.
        TimeoutError: If ranks do not come; names them.
    """
    if torch.distributed.is_initialized():
        return default_store()
    rank, world_size = environment.global_rank(), environment.world_size()
    host, port = environment.main_address, environment.main_port
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
    until = time.monotonic() + start_timeout
    store = _open_store(host, port, rank, world_size, until, retry_attempts)
    place = f"{host}:{port}"
    # torchrun serves one store for all of its restarts: what dead ranks left there would be taken for that of new ones.
    prefix = f"lightning_optcore/group/{restart_count()}-{world_size}-{_groups[place]}"
    store = torch.distributed.PrefixStore(prefix, store)
    _groups[place] += 1
    _await_all(store, rank, world_size, place, start_timeout, until)
    torch.distributed.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=start_timeout),
        **options,
    )
    begin_anew()
    if backend == "nccl":
        atexit.register(_destroy_dist_connection)
    rank_zero_info(f"distributed_backend={backend}: {world_size} ranks at {place}")
    return store


def _open_store(
    host: str, port: int, rank: int, world_size: int, until: float, retry_attempts: int
) -> torch.distributed.Store:
    # torchrun's agent serves the store itself, for all of its restarts.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    for attempt in range(retry_attempts + 1):
        left = max(1.0, until - time.monotonic())
        try:
            return torch.distributed.TCPStore(
                host,
                port,
                world_size,
                is_master=serves,
                timeout=timedelta(seconds=left if serves else left / (retry_attempts + 1 - attempt)),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except torch.distributed.DistError as error:
            pause = min(_MAX_PAUSE, 0.5 * 2**attempt)
            if attempt == retry_attempts or time.monotonic() + pause > until:
                raise _unreachable(host, port, serves, error) from error
            log.warning("[rank %d] cannot use %s:%d yet, trying again: %s", rank, host, port, _first_line(error))
            time.sleep(pause)
    raise AssertionError("unreachable")


def _unreachable(host: str, port: int, serves: bool, error: Exception) -> Exception:
    if serves:
        return MisconfigurationException(
            f"rank 0 cannot listen at MASTER_ADDR={host}, MASTER_PORT={port}: {_first_line(error)}. End the program"
            " that does (perhaps an earlier run), or set another MASTER_PORT (torchrun: --master-port, or --standalone)"
        )
    return TimeoutError(
        f"rank 0 does not answer at MASTER_ADDR={host}, MASTER_PORT={port}: {_first_line(error)}. See whether it"
        " started, and whether this host reaches it"
    )


def _await_all(
    store: torch.distributed.Store, rank: int, world_size: int, place: str, start_timeout: float, until: float
) -> None:
    keys = [f"here/{i}" for i in range(world_size)]
    try:
        store.set(keys[rank], f"{socket.gethostname()}, pid {os.getpid()}")
        store.wait(keys, timedelta(seconds=max(1.0, until - time.monotonic())))
    except torch.distributed.DistError as error:
        raise TimeoutError(_missing(store, keys, place, start_timeout)) from error


def _missing(store: torch.distributed.Store, keys: list[str], place: str, start_timeout: float) -> str:
    try:
        missing = [i for i, key in enumerate(keys) if not store.check([key])]
    except torch.distributed.DistError:
        return f"the store at {place} is gone before all ranks had come; see the error of rank 0"
    who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
    advice = "see their output, and whether they use this MASTER_ADDR and MASTER_PORT"
    if 0 in missing:
        advice += "; rank 0 is missing although something answers there: perhaps an earlier run, which is to be ended"
    return f"{who} of {len(keys)} did not come to {place} within {start_timeout:g} s: {advice}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
