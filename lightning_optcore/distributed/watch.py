"""Every rank hears of every other, so that one that dies or stalls is named within seconds.

A star over rank 0: each rank sends it a line every half second, and it sends each a line. The kernel closes the
connections of a killed process, so that a death is seen at once; a process that was stopped, or a host that was lost,
is silent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hmac
import logging
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from lightning_optcore.distributed.failures import Failure, Process, State, behind
from lightning_optcore.distributed.gathering import gather
from lightning_optcore.distributed.lines import Link, local_address
from lightning_optcore.distributed.position import Position

log = logging.getLogger(__name__)

_BEAT = 0.5  # seconds
_SILENT = 3.0  # seconds without a line, after which a rank for which others wait in vain is not alive
_GREETING = 10.0  # seconds to prove to be a rank


@dataclass
class _Peer:
    process: Process
    position: Position | None = None
    link: Link | None = None
    step: int = 0
    phase: str = "start"
    moves: int = -1
    heard: float = 0.0
    moved: float = 0.0
    waits: bool = False

    def recall(self) -> None:
        """Learn where it is, or was at its end, rather than where it was half a second ago."""
        if self.position is not None:
            self.step, self.phase = self.position.read()

    def state(self, now: float) -> State:
        self.recall()
        still, silent = round(now - self.moved, 1), round(now - self.heard, 1)
        return State(self.process, self.step, self.phase, still, silent, self.waits)


class RankWatch:
    """Watches the other ranks from a thread, from :meth:`start` to :meth:`close`.

    A death is logged at once, on all ranks that are left. A stopped process is logged, and killed, after ``timeout``:
    it cannot end itself, and what started it could not start it anew. Who is alive but keeps the others waiting is
    found by :meth:`diagnosis`, when the wait of a collective has ended.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        store: The store of the process group, over which the ranks find each other.
        main_address: The host of the store.
        timeout: Seconds of silence after which a stopped rank has stalled.

    Attributes:
        step: The last optimizer step of this rank; to be set by the training loop.
        failures: The ranks that failed, the first one first.

    Example:
        >>> with RankWatch(0, 1, torch.distributed.HashStore()) as watch:
        ...     watch.step = 57
        ...     watch.phase("backward")
        ...     watch.diagnosis(wait=0.0) is None
        True
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: torch.distributed.Store,
        *,
        main_address: str = "127.0.0.1",
        timeout: float = 30.0,
    ) -> None:
        self.step = 0
        self.current_phase = "start"
        self._moves = 0
        self._position: Position | None = None
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._main_address = main_address
        self._timeout = timeout
        self._peers: dict[int, _Peer] = {}
        self.failures: list[Failure] = []
        self._warned: set[int] = set()
        self._failed = threading.Event()
        self._answer: list[State] | None = None
        self._answered = threading.Event()
        self._asked = self._waits = self._beat_at_once = False
        self._reported: Failure | None = None
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        self._strangers: dict[Link, float] = {}
        self._token = ""
        self._wakes, self._wake = socket.socketpair()
        self._thread: threading.Thread | None = None

    def phase(self, name: str) -> None:
        """Tell what this rank does from now on."""
        self.current_phase = name
        self._moves += 1
        if self._position is not None:
            self._position.write(self.step, name.encode())

    def start(self) -> None:
        """Connect the ranks; every rank must call it. What cannot be watched is logged and does not fail."""
        me = Process.here(self._rank)
        with contextlib.suppress(OSError):
            self._position = Position.create()
        path = self._position.path if self._position is not None else ""
        said = self._gather("watch/processes", [asdict(me), path])
        everyone = [Process(**process) for process, _ in said]
        for process, path in said:
            seen = process["machine"] == me.machine and 0 in (process["rank"], self._rank)
            self._peers[process["rank"]] = _Peer(Process(**process), Position.open(path) if seen else None)
        one_machine = len({process.machine for process in everyone}) == 1
        place = self._listen("127.0.0.1" if one_machine else None) if self._rank == 0 else None
        place = self._gather("watch/place", place)[0]
        if self._position is not None:
            self._position.unlink()  # all have opened it
        if self._world_size > 1 and place is not None:
            self._connect(place)
            _open.add(self)
            self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
            self._thread.start()

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error of its own."""
        detail = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
        self._reported = Failure(
            self._peers[self._rank].process, self.step, self.current_phase, "failed", detail[:1000]
        )
        self._awake()

    def diagnosis(self, *, timed_out: bool = False, wait: float = 2.0) -> Failure | None:
        """Return which rank failed first, if one did.

        Args:
            timed_out: Whether a collective of this rank has waited for as long as it may: some rank must be behind.
            wait: Seconds to wait for what is not known yet.
        """
        if self._thread is not None and timed_out:
            # All that wait say so; then it is known who does not.
            self._waits = self._beat_at_once = True
            self._awake()
        if self._thread is not None and not self._failed.wait(wait) and timed_out:
            self._asked = True
            self._awake()
            self._answered.wait(wait)
            late = behind(self._answer or self._states(time.monotonic()), self._rank, _SILENT)
            if late is not None:
                how = f"silent for {late.silent:.0f} s" if late.silent > _SILENT else f"there for {late.still:.0f} s"
                self._reported = _stalled(late, f"{how}; the others waited for it in {self.current_phase}")
                self._awake()
                self._failed.wait(wait)
        return self.failures[0] if self.failures else None

    def close(self) -> None:
        """Take leave of the others and end the thread."""
        self._closing = True
        self._awake()
        if self._thread is not None:
            self._thread.join(2.0)
            self._thread = None
        _open.discard(self)
        self.close_connections()
        self._selector.close()

    def close_connections(self) -> None:
        """Close all sockets without a word, as in a forked process, which would keep them open for a dead rank."""
        for peer in self._peers.values():
            if peer.link is not None:
                peer.link.close()
        for stranger in self._strangers:
            stranger.close()
        for end in (self._server, self._wakes, self._wake):
            if end is not None:
                end.close()

    def __enter__(self) -> RankWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gather(self, topic: str, value: Any) -> list[Any]:
        return gather(self._store, topic, self._rank, self._world_size, value)

    def _awake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b".")

    def _listen(self, address: str | None) -> list[Any] | None:
        try:
            address = address or local_address(self._main_address)
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self._server = socket.create_server((address, 0), family=family, backlog=self._world_size + 128)
        except OSError as error:
            log.warning("the ranks are not watched: rank 0 cannot listen at %s: %s", address, error)
            return None
        self._server.setblocking(False)
        self._token = secrets.token_hex(16)
        return [address, self._server.getsockname()[1], self._token]

    def _connect(self, place: list[Any]) -> None:
        now = time.monotonic()
        for peer in self._peers.values():
            peer.heard = peer.moved = now
        self._selector.register(self._wakes, selectors.EVENT_READ, self._rest)
        if self._server is not None:
            self._selector.register(self._server, selectors.EVENT_READ, self._accept)
            return
        address, port, token = place
        try:
            link = Link(socket.create_connection((address, port), timeout=_GREETING))
        except OSError as error:
            log.warning("rank %d is not watched: it does not reach rank 0 at %s:%s: %s", self._rank, *place[:2], error)
            return
        link.send({"token": token, "rank": self._rank})
        self._attach(self._peers[0], link)

    def _run(self) -> None:
        try:
            self._watch()
        except Exception:
            log.exception("the watch of the ranks ended; training goes on without it")

    def _watch(self) -> None:
        next_beat = awake = time.monotonic()
        while not self._closing:
            for key, _ in self._selector.select(max(0.0, next_beat - time.monotonic())):
                key.data()
            now = time.monotonic()
            if now - awake > _SILENT / 2:
                # This process was stopped itself: what the others sent meanwhile is still to be read.
                for peer in self._peers.values():
                    peer.heard = now
            awake = now
            if self._reported is not None:
                reported, self._reported = self._reported, None
                self._know(reported)
            if self._asked:
                self._ask(now)
            if now >= next_beat or self._beat_at_once:
                self._beat_at_once = False
                next_beat = now + _BEAT
                self._beat(now)
        if self._reported is not None:
            self._know(self._reported)
        self._tell({"goodbye": True})

    def _rest(self) -> None:
        self._wakes.recv(4096)

    def _beat(self, now: float) -> None:
        me = self._peers[self._rank]
        if me.moves != self._moves or me.step != self.step:
            me.moved = now
        me.step, me.phase, me.moves, me.heard, me.waits = self.step, self.current_phase, self._moves, now, self._waits
        self._tell({"step": me.step, "phase": me.phase, "moves": me.moves, "waits": me.waits})
        for stranger in [stranger for stranger, until in self._strangers.items() if now > until]:
            self._turn_away(stranger)
        for peer in self._linked():
            if now - peer.heard > self._timeout:
                self._silent(peer, now)

    def _silent(self, peer: _Peer, now: float) -> None:
        rank = peer.process.rank
        if peer.process.is_stopped():
            self._know(_stalled(peer.state(now), f"silent for {now - peer.heard:.0f} s; the process is stopped"))
        elif rank not in self._warned:
            self._warned.add(rank)
            log.warning("[rank %d] rank %d has been silent for %.0f s", self._rank, rank, now - peer.heard)

    def _accept(self) -> None:
        assert self._server is not None
        with contextlib.suppress(OSError):
            while True:
                stranger = Link(self._server.accept()[0])
                if len(self._strangers) > 64 + self._world_size:
                    stranger.close()
                    continue
                self._strangers[stranger] = time.monotonic() + _GREETING
                self._selector.register(stranger, selectors.EVENT_READ, partial(self._greet, stranger))

    def _greet(self, stranger: Link) -> None:
        messages = stranger.receive()
        if messages:
            token, rank = messages[0].get("token"), messages[0].get("rank")
            known = isinstance(token, str) and hmac.compare_digest(token.encode(), self._token.encode())
            if known and rank in self._peers and self._peers[rank].link is None:
                self._selector.unregister(stranger)
                del self._strangers[stranger]
                self._attach(self._peers[rank], stranger)
                self._read(self._peers[rank], stranger, messages[1:])
                return
        if messages or stranger.ended:
            self._turn_away(stranger)

    def _turn_away(self, stranger: Link) -> None:
        self._selector.unregister(stranger)
        del self._strangers[stranger]
        stranger.close()

    def _attach(self, peer: _Peer, link: Link) -> None:
        peer.link, peer.heard = link, time.monotonic()
        self._selector.register(link, selectors.EVENT_READ, lambda: self._read(peer, link, link.receive()))

    def _detach(self, peer: _Peer) -> None:
        if peer.link is not None:
            self._selector.unregister(peer.link)
            peer.link.close()
            peer.link = None

    def _read(self, peer: _Peer, link: Link, messages: list[dict[str, Any]]) -> None:
        now, heard = time.monotonic(), peer.heard
        for message in messages:
            peer.heard = heard = now
            if "step" in message:
                if message["moves"] != peer.moves or message["step"] != peer.step:
                    peer.moved = now
                peer.step, peer.phase, peer.moves = message["step"], message["phase"], message["moves"]
                peer.waits = message["waits"]
            elif "failure" in message:
                self._know(Failure.from_json(message["failure"]))
            elif "ask" in message:
                link.send({"states": [asdict(state) for state in self._states(now)]})
            elif "states" in message:
                self._answer = [State(**{**s, "process": Process(**s["process"])}) for s in message["states"]]
                self._answered.set()
            elif "goodbye" in message:
                self._detach(peer)
                return
        if link.ended:
            self._detach(peer)
            if now - heard > min(_SILENT, self._timeout / 2):
                # Another rank was faster to end it.
                self._know(_stalled(peer.state(now), f"silent for {now - heard:.0f} s"))
            else:
                peer.recall()
                self._know(Failure(peer.process, peer.step, peer.phase, "died"))

    def _ask(self, now: float) -> None:
        hub = self._peers[0].link
        if hub is not None:
            hub.send({"ask": True})
        else:
            self._answer = self._states(now)
            self._answered.set()
        self._asked = False

    def _states(self, now: float) -> list[State]:
        watched = {self._rank, *(peer.process.rank for peer in self._linked())}
        return [peer.state(now) for rank, peer in self._peers.items() if rank in watched]

    def _know(self, failure: Failure) -> None:
        rank = failure.process.rank
        if any(known.process.rank == rank for known in self.failures):
            return
        self.failures.append(failure)
        if rank != self._rank:
            log.error("[rank %d] %s", self._rank, failure)
        # To the one that has stalled as well, if it still listens: it alone can tell where it is.
        self._tell({"failure": asdict(failure)})
        if failure.what == "stalled":
            self._end_stalled(failure.process)
        self._failed.set()

    def _end_stalled(self, process: Process) -> None:
        if process.rank == self._rank:
            sys.stderr.write(f"[rank {self._rank}] the others wait for this rank, which is here:\n")
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            os.kill(os.getpid(), signal.SIGKILL)
        elif process.is_stopped() and (found := process.find()) is not None:
            log.error("[rank %d] killing rank %d (pid %d), which is stopped", self._rank, process.rank, process.pid)
            found.kill()

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self._linked():
            assert peer.link is not None
            peer.link.send(message)

    def _linked(self) -> Iterable[_Peer]:
        return [peer for peer in self._peers.values() if peer.link is not None]


def _stalled(state: State, why: str) -> Failure:
    return Failure(state.process, state.step, state.phase, "stalled", why)


_open: weakref.WeakSet[RankWatch] = weakref.WeakSet()


def _forget_in_child() -> None:
    for watch in list(_open):
        watch.close_connections()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
