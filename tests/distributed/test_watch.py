from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import sys
import time

import pytest
import torch
from ranks import run_ranks

from lightning_optcore.distributed.failures import Failure, Process, RankFailure, is_communication_error, is_timeout
from lightning_optcore.distributed.watch import RankWatch

LONG = 20.0  # seconds within which what is to be known must be known


class Watched(RankWatch):
    """A watch over a store of its own, which keeps what it logs."""

    def __init__(self, timeout: float = 30.0, seconds: float = 30.0):
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        port = int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
        super().__init__(rank, world_size, store, timeout=timeout)
        self.rank = rank
        self.lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("lightning_optcore.distributed.watch").addHandler(handler)

    def beat(self) -> None:
        """Let the others hear where this rank is."""
        time.sleep(1.2)


def end(watch: Watched, failing: int, how: str) -> tuple[str, list[str]]:
    with watch:
        watch.step = 57
        watch.phase("backward")
        watch.beat()
        if watch.rank == failing:
            if how == "fork" and os.fork() == 0:
                time.sleep(LONG)  # a worker that outlives the rank for a while
                os._exit(0)
            if how == "fail":
                watch.failed(ValueError("no such label"))
                watch.close()
                return "", []
            os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
        known = watch.diagnosis(wait=LONG)
        time.sleep(0.2)
        return str(known), watch.lines


def end_of_a_rank(failing: int, how: str) -> tuple[str, list[str]]:
    return end(Watched(timeout=1.5), failing, how)


@pytest.mark.parametrize(("failing", "how"), [(1, "die"), (0, "die"), (2, "fork"), (1, "stop"), (0, "stop")])
def test_a_rank_that_dies_or_is_stopped_is_named_on_all_others_once(failing, how):
    ranks = run_ranks(end_of_a_rank, failing, how, world_size=3, dying=[failing])
    assert ranks[failing] == -signal.SIGKILL
    for rank in {0, 1, 2} - {failing}:
        known, lines = ranks[rank]
        what = "stalled after step 57 in backward: silent for" if how == "stop" else "died after step 57 in backward"
        assert known.startswith(f"rank {failing} ({socket.gethostname()}, pid ") and what in known
        assert [line for line in lines if known in line] == [f"[rank {rank}] {known}"]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_is_told_to_the_others(failing):
    ranks = run_ranks(end_of_a_rank, failing, "fail")
    known, _ = ranks[1 - failing]
    assert known.endswith("failed after step 57 in backward: ValueError: no such label")


def keep_others_waiting(failing: int) -> str:
    watch = Watched()
    with watch:
        watch.step = 57
        watch.phase("validation" if watch.rank == failing else "backward")
        watch.beat()
        if watch.rank == failing:
            time.sleep(LONG)
            return ""
        return str(watch.diagnosis(timed_out=True, wait=2.0))


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_keeps_the_others_waiting_is_named_and_shows_where_it_is(failing):
    ranks = run_ranks(keep_others_waiting, failing, world_size=3, dying=[failing])
    assert ranks[failing] == -signal.SIGKILL
    for rank in {0, 1, 2} - {failing}:
        assert f"rank {failing} (" in ranks[rank]
        assert "stalled after step 57 in validation: there for" in ranks[rank]
        assert "the others waited for it in backward" in ranks[rank]


def come_and_go() -> list[str | None]:
    known: list[str | None] = []
    threads = []
    watch = Watched()
    for _ in range(2):
        again = RankWatch(watch.rank, 2, watch._store)
        with again:
            again.beat = watch.beat
            if watch.rank == 1:
                time.sleep(0.5)  # rank 0 leaves first, and then rank 1 is still there
            known.append(again.diagnosis(wait=0.5))
        threads.append(again._thread)
    return [*known, *threads, *watch.lines]


def test_ranks_that_take_leave_have_not_failed_and_can_come_again():
    assert run_ranks(come_and_go) == [[None] * 4, [None] * 4]


def pause_all() -> object:
    watch = Watched(timeout=1.0)
    with watch:
        watch.beat()
        if watch.rank == 0 and os.fork() == 0:
            others = [peer.process.pid for peer in watch._peers.values()]
            for sent in (signal.SIGSTOP, signal.SIGCONT):
                for pid in others:
                    os.kill(pid, sent)
                time.sleep(3.0)
            os._exit(0)
        time.sleep(3.0)
        return watch.diagnosis(wait=2.0), watch.lines


def test_a_pause_of_all_is_no_failure():
    assert run_ranks(pause_all) == [(None, []), (None, [])]


def with_strangers() -> str:
    watch = Watched()
    with watch:
        if watch.rank == 0:
            assert watch._server is not None
            place = watch._server.getsockname()
            for line in (b"", b"\n", b"\xff\n", b"[]\n", b'{"token": 1, "rank": 1}\n', b"0" * (3 << 20)):
                with socket.create_connection(place) as stranger:
                    stranger.sendall(line)
                    if line:
                        stranger.settimeout(LONG)
                        with contextlib.suppress(ConnectionError):  # turned away while it still spoke
                            assert stranger.recv(10) == b""
            with socket.create_connection(place) as stranger:
                stranger.sendall(b'{"token": "%032d", "rank": 1}\n{"goodbye": true}\n' % 0)
            idle = [socket.create_connection(place) for _ in range(200)]
            assert watch.diagnosis(wait=1.0) is None
            watch._store.set("strangers have come", "")
        watch._store.get("strangers have come")
        if watch.rank == 1:
            watch.beat()
            os.kill(os.getpid(), signal.SIGKILL)
        known = str(watch.diagnosis(wait=LONG))
        del idle
        return known


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_strangers_are_turned_away_and_the_watch_goes_on():
    ranks = run_ranks(with_strangers, dying=[1])
    assert "rank 1 (" in ranks[0] and "died" in ranks[0]


def test_one_rank_alone_has_nothing_to_watch():
    with RankWatch(0, 1, torch.distributed.HashStore()) as watch:
        watch.phase("training_step")
        assert watch._thread is None
        assert watch.diagnosis(timed_out=True) is None


def test_an_error_names_the_rank_and_survives_pickling():
    failure = Failure(Process(1, "here", 4711, 0.0, ""), 57, "backward", "died")
    error = pickle.loads(pickle.dumps(RankFailure(failure, "Resume with ckpt_path='a.ckpt'")))
    assert (error.rank, error.host, error.pid, error.step, error.phase) == (1, "here", 4711, 57, "backward")
    expected = "rank 1 (here, pid 4711) died after step 57 in backward. Resume with ckpt_path='a.ckpt'"
    assert str(error) == expected


def test_errors_of_the_process_group_are_known_from_others():
    closed = RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:49731")
    waited = RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation")
    assert is_communication_error(closed) and not is_timeout(closed)
    assert is_communication_error(waited) and is_timeout(waited)
    assert is_timeout(torch.distributed.DistBackendError("Watchdog caught collective operation timeout"))
    assert not is_communication_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    wrapped = ValueError("in the midst of something")
    wrapped.__cause__ = closed
    assert is_communication_error(wrapped)
