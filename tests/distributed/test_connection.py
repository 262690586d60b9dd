from __future__ import annotations

import os
import socket
import threading
import time

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ranks import run_ranks

from lightning_optcore.distributed._compat import default_store, set_timeout
from lightning_optcore.distributed.connection import connect
from lightning_optcore.distributed.gathering import gather


def environment() -> LightningEnvironment:
    ranks = LightningEnvironment()
    ranks.set_world_size(int(os.environ["WORLD_SIZE"]))
    ranks.set_global_rank(int(os.environ["RANK"]))
    return ranks


def connect_twice() -> list[object]:
    results: list[object] = []
    for _ in range(2):
        store = connect(environment(), "gloo", start_timeout=20.0)
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        total = torch.tensor([float(rank)])
        torch.distributed.all_reduce(total)
        results += [
            total.item(),
            gather(store, "names", rank, world_size, rank),
            gather(default_store(), "again", rank, 2, rank),
        ]
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return results


def test_groups_start_one_after_another_at_one_address():
    assert run_ranks(connect_twice) == [[1.0, [0, 1], [0, 1]] * 2] * 2


def connect_late(late: int) -> str:
    rank = int(os.environ["RANK"])
    if rank == late:
        time.sleep(2.0)
    connect(environment(), "gloo", start_timeout=20.0)
    torch.distributed.barrier()  # rank 0, which serves the store, is not gone while another one connects
    return "connected"


@pytest.mark.parametrize("late", [0, 1])
def test_a_late_rank_is_awaited(late):
    assert run_ranks(connect_late, late) == ["connected"] * 2


def connect_without(missing: int) -> str:
    rank = int(os.environ["RANK"])
    if rank == missing:
        time.sleep(7)
        os._exit(0)
    try:
        connect(environment(), "gloo", start_timeout=3.0, retry_attempts=1)
    except TimeoutError as error:
        if rank == 0:
            time.sleep(1.0)  # others ask its store who is missing
        return str(error)
    return "connected"


def test_a_rank_that_does_not_come_is_named_by_the_others():
    ranks = run_ranks(connect_without, 1, world_size=3, dying=[1], seconds=20)[::2]
    port = ranks[0].split("127.0.0.1:")[1].split()[0]
    expected = f"rank 1 of 3 did not come to 127.0.0.1:{port} within 3 s: see their output"
    assert all(said.startswith(expected) for said in ranks)


def test_rank_zero_that_does_not_come_is_named():
    _, said = run_ranks(connect_without, 0, dying=[0], seconds=20)
    assert said.startswith("rank 0 does not answer at MASTER_ADDR=127.0.0.1, MASTER_PORT=")


def connect_where_another_listens() -> str:
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        try:
            connect(environment(), "gloo", start_timeout=3.0, retry_attempts=1)
        except MisconfigurationException as error:
            return str(error)
    return "connected"


def test_a_port_that_is_taken_is_named_with_what_to_do():
    (said,) = run_ranks(connect_where_another_listens, world_size=1)
    assert said.startswith("rank 0 cannot listen at MASTER_ADDR=127.0.0.1, MASTER_PORT=")
    assert "set another MASTER_PORT" in said


def connect_where_another_listens_still() -> str:
    server = socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    threading.Timer(1.0, server.close).start()
    connect(environment(), "gloo", start_timeout=20.0)
    return "connected"


def test_a_port_that_becomes_free_is_taken():
    assert run_ranks(connect_where_another_listens_still, world_size=1) == ["connected"]


def wait_in_vain() -> str:
    connect(environment(), "gloo", start_timeout=20.0)
    torch.distributed.barrier()
    set_timeout(1.0)
    if torch.distributed.get_rank() == 1:
        time.sleep(4)
        os._exit(0)
    try:
        torch.distributed.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        return str(error)
    return "the other rank came"


def test_the_timeout_of_collectives_is_another_one_than_that_of_the_start():
    said, _ = run_ranks(wait_in_vain, dying=[1])
    assert "1000ms" in said
