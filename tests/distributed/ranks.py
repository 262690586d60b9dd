"""Runs a function on several gloo ranks, each a process of its own that is forked from one which has torch loaded."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable, Collection
from typing import Any

from warm import PROCESSES


def run_ranks(
    function: Callable[..., Any], *args: Any, world_size: int = 2, seconds: float = 90, dying: Collection[int] = ()
) -> list[Any]:
    """Return, by rank, what ``function(*args)`` returned; it finds itself launched as torchrun would have done.

    Of a rank that is to die, it is the exit code of its process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receivers, processes = [], []
    for rank in range(world_size):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_rank, args=(function, args, rank, world_size, port, sender), daemon=True)
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    try:
        results, errors = [], []
        for rank, receiver in enumerate(receivers):
            if rank in dying:
                results.append(None)
                continue
            assert receiver.poll(seconds), f"rank {rank} did not answer within {seconds} s"
            ended_well, result = receiver.recv()
            if ended_well:
                results.append(pickle.loads(result))
            else:
                errors.append(f"rank {rank}: {result}")
        assert not errors, "\n".join(errors)
        for rank in dying:
            processes[rank].join(seconds)
            results[rank] = processes[rank].exitcode
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, sender: Any
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "NODE_RANK": "0", "WORLD_SIZE": str(world_size),
    }  # fmt: skip
    try:
        # By value: the process may be gone before what it shares is read.
        sender.send((True, pickle.dumps(function(*args))))
    except BaseException:
        sender.send((False, traceback.format_exc()))
