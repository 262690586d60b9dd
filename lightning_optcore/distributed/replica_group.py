"""A group of replicas that goes on when members die, and takes them in again, between one collective and the next.

Who is there is decided by torchft's lighthouse (https://github.com/pytorch/torchft); what is added here is that nothing
is lost by a change. Every collective needs all members, so that no member is ever more than one collective ahead of
another. Each keeps the result of its last one: after a change, who is behind takes that result from one who has it, and
what nobody completed is done again by those who are left (virtual synchrony: Birman and Joseph, "Exploiting virtual
synchrony in distributed systems", 1987).
"""

from __future__ import annotations

import io
import os
import socket
import time
import uuid
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_prefixed_message
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

# What gloo, the store and the lighthouse raise where somebody is gone.
_LOST = (RuntimeError, TimeoutError)
_ATTEMPTS = 10
_HEARTBEAT_SECONDS = 0.1
_SETTLE_SECONDS = 1.0  # only a fork in the middle of a collective, by another thread, waits so long


class OutOfStepError(Exception):
    """This replica is not where the others are."""


@dataclass(frozen=True)
class Member:
    """What a replica says of itself when it asks who is there.

    Args:
        rank: Its number, which it keeps when it is started again.
        store: Address of the store that it serves.
        fit: Of the fits of its program, the one it is in.
        completed: Collectives so far.
        since: How many there were when it joined.
        joining: Whether it knows nothing yet.
        admits: Whether those who join may be let in now.
        collective: What it is about to do.
        link: Name of the connection that it holds; empty where that broke.
    """

    rank: int
    store: str
    fit: int
    completed: int
    since: int
    joining: bool
    admits: bool
    collective: str
    link: str


def who_goes_on(present: Sequence[Member], world_size: int) -> tuple[Member, ...]:
    """Return those who do the next collective together, by rank; all who ask at once get the same answer.

    Members that are more than one collective behind are left out, and those who do something else than the ones who
    were there before them; those who join are left out unless all who are ahead admit them. Where nobody has begun, all
    must be there.

    Raises:
        OutOfStepError: If members that were there equally long do different things.

    Example:
        >>> first = Member(0, "", 1, 7, since=0, joining=False, admits=True, collective="gradients", link="a")
        >>> again = Member(1, "", 1, 0, since=0, joining=True, admits=False, collective="join", link="")
        >>> [member.rank for member in who_goes_on([again, first], world_size=2)]
        [0, 1]
    """
    begun = [member for member in present if not member.joining]
    if not begun:
        whole = {member.rank for member in present} == set(range(world_size))
        return tuple(sorted(present, key=lambda member: member.rank)) if whole else ()
    newest = max(member.completed for member in begun)
    ahead = [member for member in begun if member.completed == newest]
    oldest = min(member.since for member in ahead)
    expected = {member.collective for member in ahead if member.since == oldest}
    if len(expected) > 1:
        told = ", ".join(f"rank {member.rank} does {member.collective!r}" for member in ahead)
        raise OutOfStepError(f"replicas do not do the same: {told}")
    ahead = [member for member in ahead if member.collective in expected]
    goes_on = ahead + [member for member in begun if member.completed == newest - 1]
    if all(member.admits for member in ahead):
        goes_on += [member for member in present if member.joining and member.fit == ahead[0].fit]
    return tuple(sorted(goes_on, key=lambda member: member.rank))


def serving_store(host: str, timeout: float) -> TCPStore:
    """Return a store that listens on one address only, on a free port.

    Args:
        host: The address.
        timeout: Seconds that a client waits for a key.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
        master_listen_fd=listener.detach(),
    )


def packed(value: Any) -> Tensor:
    """Return a value as bytes: (n,) of uint8."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def unpacked(data: Tensor) -> Any:
    """Return what :func:`packed` was given; code is never executed."""
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)


def _settle(group: weakref.ref[ReplicaGroup]) -> None:
    """Before a fork, wait until gloo's threads have let go of the tensors of the collectives that are done.

    To do so they become Python threads for a moment, under a lock. A child that is forked in that moment, as a worker
    of a DataLoader may be, waits for this lock for ever, before CPython 3.12:
    https://github.com/python/cpython/issues/112275.
    """
    end = time.monotonic() + _SETTLE_SECONDS
    while (one := group()) and any(lent() is not None for lent in one._lent) and time.monotonic() < end:
        time.sleep(1e-4)


class ReplicaGroup:
    """The replicas that train one model, as one of them sees it.

    Args:
        rank: The number of this one.
        world_size: How many there are when all are alive.
        lighthouse: URL of torchft's lighthouse.
        host: Address at which the others reach this one, and the only one at which it listens.
        timeout: Seconds after which a replica that is alive and does not answer is given up.

    Attributes:
        ranks: Who did the last collective; empty before this one has joined.
        completed: Collectives so far.
        since: How many there were when it joined.
        changes: How often others came or went.
    """

    def __init__(
        self, rank: int, world_size: int, lighthouse: str, *, host: str = "127.0.0.1", timeout: float = 60.0
    ) -> None:
        os.environ.setdefault("RUST_LOG", "error")  # torchft tells every step otherwise.
        from torchft.coordination import LighthouseClient, ManagerServer

        self.rank, self.world_size = rank, world_size
        self.ranks: tuple[int, ...] = ()
        self.completed = self.since = self.fit = self.changes = 0
        self._host, self._timeout = host, timedelta(seconds=timeout)
        self._store = serving_store(host, timeout)
        # One that is started again is another one to the lighthouse.
        self._id = f"{rank}:{uuid.uuid4()}"
        self._client = LighthouseClient(lighthouse, connect_timeout=self._timeout)
        # Its heartbeats do not wait for Python.
        self._heartbeat = ManagerServer(
            replica_id=self._id,
            lighthouse_addr=lighthouse,
            hostname=host,
            bind=f"{host}:0",
            store_addr=f"{host}:{self._store.port}",
            world_size=1,
            heartbeat_interval=timedelta(seconds=_HEARTBEAT_SECONDS),
            connect_timeout=self._timeout,
            quorum_retries=0,
        )
        # torch declares few of its methods.
        self._link: Any = None
        self._link_name = ""
        self._joining = True
        self._agreed = False
        self._kept: list[Tensor] = []
        self._lent: list[weakref.ref[Tensor]] = []
        os.register_at_fork(before=partial(_settle, weakref.ref(self)))

    @property
    def joined(self) -> bool:
        """Whether this replica is one of the group."""
        return not self._joining

    @property
    def leads(self) -> bool:
        """Whether this replica has the lowest rank of all."""
        return bool(self.ranks) and self.rank == self.ranks[0]

    def join(self, state: Callable[[bool], dict[str, Any]]) -> dict[str, Any] | None:
        """Wait until all are there to begin, or until the others let this one in.

        Args:
            state: Called, now and later, when another one needs the state of this one: with True where all begin.

        Returns:
            The state of another one; None where the others have that of this one.

        Raises:
            ConnectionError: If the lighthouse does not answer.
        """
        self.state = state
        failures = 0
        while True:
            try:
                received = self._agree("join", admits=False)
                if self.ranks:
                    break
                failures = 0
                time.sleep(0.05)
            except TimeoutError:
                continue  # The others are at a place where nobody is let in.
            except RuntimeError as error:
                self._leave()
                failures += 1
                self._check(failures, error)
        self._joining, self._agreed = False, True
        return None if received is None else unpacked(received)

    def gather(self, name: str, data: Tensor) -> list[Tensor]:
        """Return what every member has, by rank.

        Args:
            name: What is done; the same on all.
            data: (n,) of uint8; n may differ.
        """

        def collective(link: Any) -> list[Tensor]:
            head = torch.tensor([zlib.crc32(name.encode()), data.numel(), self.since])
            heads = [torch.empty_like(head) for _ in self.ranks]
            link.allgather([[self._lend(one) for one in heads]], [self._lend(head)]).wait()
            names, sizes, sinces = torch.stack(heads).T.tolist()
            if len(set(names)) > 1:
                told = f"rank {self.rank} does {name!r}, and others do not"
                # Those who were there before go on without those who came later.
                raise RuntimeError(told) if self.since < max(sinces) else OutOfStepError(told)
            mine = torch.zeros(max(sizes), dtype=torch.uint8)
            mine[: data.numel()] = data
            gathered = [torch.empty_like(mine) for _ in self.ranks]
            if max(sizes):
                link.allgather([[self._lend(one) for one in gathered]], [self._lend(mine)]).wait()
            return [one[:size].clone() for one, size in zip(gathered, sizes, strict=True)]

        return self._complete(name, collective)

    def sum(self, name: str, tensors: Callable[[bool], list[Tensor]], *, admits: bool = False) -> list[Tensor]:
        """Return the sums of what all members have.

        Args:
            name: What is done; the same on all.
            tensors: Makes what is summed, on the CPU, as often as it is needed; called with whether this one leads.
            admits: Whether those who join may be let in before.
        """

        def collective(link: Any) -> list[Tensor]:
            summed = tensors(self.leads)
            for tensor in summed:
                link.allreduce([self._lend(tensor)]).wait()
            return summed

        return self._complete(name, collective, admits=admits)

    def _lend(self, tensor: Tensor) -> Tensor:
        """Return another name of a tensor for gloo, which alone holds it: it is gone when gloo's thread has let go."""
        lent = tensor.detach()
        self._lent.append(weakref.ref(lent))
        return lent

    def _complete(self, name: str, collective: Callable[[Any], list[Tensor]], *, admits: bool = False) -> list[Tensor]:
        # One who just took a result of another's has asked for this collective already.
        asks = admits and not self._agreed
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if asks or self._link is None:
                    received = self._agree(name, admits=admits)
                    if received is not None:
                        self._kept, self._agreed = unpacked(received), True
                        break
                self._kept, self._agreed = collective(self._link), False
                break
            except _LOST as error:
                self._leave()
                asks = True
                self._check(attempt, error)
        self.completed += 1
        self._lent = [lent for lent in self._lent if lent() is not None]
        return self._kept

    def _check(self, failures: int, error: Exception) -> None:
        if failures >= _ATTEMPTS:
            raise ConnectionError(f"rank {self.rank} reached nobody in {failures} attempts: {error}") from error
        time.sleep(0.05)

    def _leave(self) -> None:
        """Close the connection, so that the others learn of it."""
        if self._link is not None:
            self._link.abort()
        self._link, self._link_name = None, ""

    def _agree(self, name: str, *, admits: bool) -> Tensor | None:
        """Find out who goes on, connect where that changed, and return what this one lacked."""
        me = Member(
            rank=self.rank,
            store=f"{self._host}:{self._store.port}",
            fit=self.fit,
            completed=self.completed,
            since=self.since,
            joining=self._joining,
            admits=admits,
            collective=name,
            link=self._link_name,
        )
        # Longer than the lighthouse waits for one that does not ask.
        quorum = self._client.quorum(self._id, 2 * self._timeout, data=asdict(me))
        present = [Member(**{str(key): value for key, value in (p.data or {}).items()}) for p in quorum.participants]
        members = who_goes_on(present, self.world_size)
        if me not in members:
            if self._joining:
                return None
            raise OutOfStepError(rank_prefixed_message("the others went on without this replica", self.rank))
        same = self._link is not None and all(member.link == self._link_name for member in members)
        if same and len(members) == len(self.ranks):
            return None
        self._connect(members, f"{quorum.quorum_id}.{quorum.created.seconds}.{quorum.created.nanos}")
        received = self._hand_over(members, me)
        self.ranks = tuple(member.rank for member in members)
        self.changes += 1
        return received

    def _connect(self, members: Sequence[Member], name: str) -> None:
        self._leave()
        host, port = members[0].store.rsplit(":", 1)
        # The first one's store, whoever that is, introduces all to each other.
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=self._timeout)
        options = cast(Any, ProcessGroupGloo)._Options()
        options._devices = [ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = self._timeout
        rank = [member.rank for member in members].index(self.rank)
        self._link = ProcessGroupGloo(PrefixStore(name, store), rank, len(members), options)
        self._link_name = name

    def _hand_over(self, members: Sequence[Member], me: Member) -> Tensor | None:
        """Send what others lack, or receive it: a state, or the result of the last collective."""
        begun = [member for member in members if not member.joining]
        newest = max((member.completed for member in begun), default=0)
        source = next((member for member in begun if member.completed == newest), members[0])
        lacks = [m for m in members if m is not source and (m.joining or m.completed < newest)]
        received = None
        for member in lacks:
            if me == source:
                data = packed(self.state(not begun) if member.joining else self._kept)
                self._send(torch.tensor([data.numel()]), members.index(member))
                self._send(data, members.index(member))
            elif me == member:
                size = self._receive(torch.empty(1, dtype=torch.int64), members.index(source))
                received = self._receive(torch.empty(int(size), dtype=torch.uint8), members.index(source))
        if self._joining:
            self.completed = self.since = newest
        return received

    def _send(self, tensor: Tensor, index: int) -> None:
        self._link.send([tensor], index, 0).wait()

    def _receive(self, tensor: Tensor, index: int) -> Tensor:
        self._link.recv([tensor], index, 0).wait()
        return tensor
