"""Collectives among replicas that come and go: threads of one process, each a replica, and a real lighthouse."""

from __future__ import annotations

import ctypes
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from pickle import UnpicklingError
from typing import Any

import psutil
import pytest
import torch

from lightning_optcore.distributed.replica_group import (
    Member,
    OutOfStepError,
    ReplicaGroup,
    packed,
    serving_store,
    unpacked,
    who_goes_on,
)

ONE = Member(0, "", 1, completed=7, since=0, joining=False, admits=True, collective="gradients", link="a")
TWO = replace(ONE, rank=1)
NEW = replace(ONE, rank=2, completed=0, joining=True, admits=False, collective="join", link="")


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        pytest.param([TWO, ONE], [0, 1], id="all"),
        pytest.param([NEW, TWO], [1, 2], id="one joins"),
        pytest.param([NEW, TWO, replace(ONE, admits=False)], [0, 1], id="not now"),
        pytest.param([NEW, TWO, replace(ONE, admits=False, completed=6)], [0, 1, 2], id="who is behind is not asked"),
        pytest.param([NEW, TWO, replace(ONE, completed=5)], [1, 2], id="who is far behind is left"),
        pytest.param([ONE, replace(TWO, collective="x", since=3)], [0], id="who came later does something else"),
        pytest.param([replace(NEW, fit=2), ONE], [0], id="another fit"),
        pytest.param([NEW, replace(NEW, rank=0)], [], id="not all have come"),
        pytest.param([NEW, replace(NEW, rank=1), replace(NEW, rank=0)], [0, 1, 2], id="all begin"),
    ],
)
def test_who_goes_on(present, expected):
    assert [member.rank for member in who_goes_on(present, world_size=3)] == expected


def test_replicas_that_do_different_things_are_told():
    with pytest.raises(OutOfStepError, match=r"rank 0 does 'barrier x', rank 1 does 'gradients'"):
        who_goes_on([replace(ONE, collective="barrier x"), TWO], world_size=2)


def test_what_is_received_executes_nothing():
    value = {"weights": torch.ones(2), "epoch": 3, "name": None}
    assert torch.equal(unpacked(packed(value))["weights"], value["weights"])
    with pytest.raises(UnpicklingError):
        unpacked(packed(os.system))


def test_a_store_listens_on_one_address():
    store = serving_store("127.0.0.1", 5.0)
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == store.port] == ["127.0.0.1"]
    with socket.create_connection(("127.0.0.1", store.port), timeout=5):
        pass


@pytest.fixture
def lighthouse() -> Iterator[str]:
    os.environ.setdefault("RUST_LOG", "error")
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=5000, quorum_tick_ms=20, heartbeat_timeout_ms=600
    )
    yield f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}"
    server.shutdown()


class Thread:
    """A replica in a thread."""

    def __init__(self, rank: int, world_size: int, lighthouse: str) -> None:
        self.group = ReplicaGroup(rank, world_size, lighthouse, timeout=5.0)
        self.pool = ThreadPoolExecutor(1)
        self.joined = self.pool.submit(self.group.join, lambda begins: {"begins": begins, "of": rank})

    def sum(self, value: float, admits: bool = False) -> Any:
        return self.pool.submit(
            self.group.sum, "sum", lambda leads: [torch.tensor([value, float(leads)])], admits=admits
        )

    def die(self) -> None:
        self.group._heartbeat.shutdown()
        self.group._leave()


def test_members_come_and_go(lighthouse):
    first, second = (Thread(rank, 2, lighthouse) for rank in (0, 1))
    assert first.joined.result(20) is None
    assert second.joined.result(20) == {"begins": True, "of": 0}
    assert [one.sum(value) for one, value in ((first, 1.0), (second, 2.0))][1].result(20)[0].tolist() == [3.0, 1.0]
    gathered = [t.pool.submit(t.group.gather, "names", packed(t.group.rank)) for t in (first, second)]
    assert [unpacked(one) for one in gathered[0].result(20)] == [0, 1]

    # The first one dies, and the second one does alone what it began with it.
    waiting = second.sum(5.0)
    first.die()
    assert waiting.result(20)[0].tolist() == [5.0, 1.0]
    assert second.group.ranks == (1,)

    # It comes back as another process would, and waits until it is let in.
    again = Thread(0, 2, lighthouse)
    assert second.sum(6.0).result(20)[0].tolist() == [6.0, 1.0]
    assert not again.joined.done()
    while True:
        alone = second.sum(7.0, admits=True)
        wait([alone, again.joined], timeout=20, return_when=FIRST_COMPLETED)
        if again.joined.done():
            break
    assert again.joined.result(20) == {"begins": False, "of": 1}
    assert again.group.completed == second.group.completed
    assert again.sum(1.0, admits=True).result(20)[0].tolist() == [8.0, 1.0] == alone.result(20)[0].tolist()


def thread_states() -> int:
    """Return how many threads Python has known so far, with the one that this starts."""
    states: list[int] = []
    python = ctypes.pythonapi
    python.PyThreadState_Get.restype, python.PyThreadState_GetID.restype = ctypes.c_void_p, ctypes.c_uint64

    def ask() -> None:
        states.append(python.PyThreadState_GetID(ctypes.c_void_p(python.PyThreadState_Get())))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return states[0]


def test_gloo_makes_no_python_thread_during_a_fork(lighthouse):
    """The child would inherit the lock that this takes."""
    forked: list[int] = []
    forks = True
    # Of these, what is registered first is called last.
    os.register_at_fork(before=lambda: forked.append(thread_states()) if forks else None)
    replicas = [Thread(rank, 2, lighthouse) for rank in (0, 1)]
    for replica in replicas:
        replica.joined.result(20)
    for _ in range(20):
        other = replicas[1].sum(1.0)
        replicas[0].group.sum("sum", lambda leads: [torch.ones(2)])
        other.result(20)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.005)
        assert thread_states() == forked[-1] + 1
    forks = False


def test_who_missed_a_result_is_given_it(lighthouse):
    first, second = (Thread(rank, 2, lighthouse) for rank in (0, 1))
    first.joined.result(20), second.joined.result(20)
    link = second.group._link

    class Breaks:
        """Does what it is told, and loses the answer."""

        def allreduce(self, tensors: list[torch.Tensor]) -> None:
            link.allreduce(tensors).wait()
            tensors[0].zero_()
            raise RuntimeError("Connection closed by peer")

        def abort(self) -> None:
            link.abort()

    second.group._link = Breaks()
    lost, done = second.sum(2.0, admits=True), first.sum(1.0, admits=True)
    assert done.result(20)[0].tolist() == [3.0, 1.0]
    following = first.sum(10.0, admits=True)
    assert lost.result(20)[0].tolist() == [3.0, 1.0]
    assert second.sum(20.0, admits=True).result(20)[0].tolist() == [30.0, 1.0] == following.result(20)[0].tolist()
    assert first.group.completed == second.group.completed == 2


def test_who_does_something_else_is_told(lighthouse):
    first, second = (Thread(rank, 2, lighthouse) for rank in (0, 1))
    first.joined.result(20), second.joined.result(20)
    nothing = torch.empty(0, dtype=torch.uint8)
    both = [first.pool.submit(first.group.gather, "barrier", nothing)]
    both.append(second.pool.submit(second.group.gather, "broadcast", nothing))
    for one in both:
        with pytest.raises(OutOfStepError, match="and others do not"):
            one.result(20)


def test_of_two_who_differ_the_one_who_came_later_is_left(lighthouse):
    first, second = (Thread(rank, 2, lighthouse) for rank in (0, 1))
    first.joined.result(20), second.joined.result(20)
    second.group.since = 1
    nothing = torch.empty(0, dtype=torch.uint8)
    kept = first.pool.submit(first.group.gather, "barrier", nothing)
    with pytest.raises(OutOfStepError, match="and others do not"):
        second.pool.submit(second.group.gather, "broadcast", nothing).result(20)
    second.die()
    assert len(kept.result(20)) == 1


class Unreliable:
    """A link that fails at random, before or after it did what it was told."""

    def __init__(self, link: Any, chance: random.Random) -> None:
        self.link, self.chance = link, chance

    def allreduce(self, tensors: list[torch.Tensor]) -> Any:
        if self.chance.random() < 0.05:
            raise RuntimeError("Connection reset by peer")
        self.link.allreduce(tensors).wait()
        if self.chance.random() < 0.05:
            raise RuntimeError("Connection closed by peer")
        return self

    def wait(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)


def test_all_have_the_same_results_however_often_links_break(lighthouse):
    replicas = [Thread(rank, 3, lighthouse) for rank in range(3)]
    for replica in replicas:
        replica.joined.result(20)

    def many(replica: Thread) -> list[float]:
        group, chance = replica.group, random.Random(replica.group.rank)
        connect = group._connect

        def unreliably(*args: Any) -> None:
            connect(*args)
            group._link = Unreliable(group._link, chance)

        group._connect = unreliably  # type: ignore[method-assign]
        group._link = Unreliable(group._link, chance)
        results = []
        for i in range(60):
            value = float(i * 10 + group.rank)
            results.append(group.sum("sum", lambda leads, v=value: [torch.tensor([v])], admits=i % 2 == 0)[0].item())
        return results

    done = [replica.pool.submit(many, replica) for replica in replicas]
    results = [one.result(120) for one in done]
    assert results == [[float(i * 30 + 3) for i in range(60)]] * 3
    assert min(replica.group.changes for replica in replicas) > 5
