"""Whether a program listens at an address: the kernel of its machine answers for it, however busy the program is."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import time
from collections.abc import Iterable

Address = tuple[str, int]


def refused(addresses: Iterable[Address], seconds: float = 0.2) -> set[Address]:
    """Return the addresses at which a machine says that nobody listens.

    One that does not answer in time is not among them: its machine, or the way to it, may only be slow. Nothing is
    sent to those that listen.

    Args:
        addresses: Hosts and TCP ports; all are asked at once.
        seconds: How long to wait for the slowest answer.

    Example:
        >>> with socket.create_server(("127.0.0.1", 0)) as server:
        ...     there = server.getsockname()
        ...     refused([there])
        set()
        >>> refused([there]) == {there}
        True
    """
    found: set[Address] = set()
    with contextlib.ExitStack() as sockets, selectors.DefaultSelector() as selector:
        for address in set(addresses):
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            connection = sockets.enter_context(socket.socket(family, socket.SOCK_STREAM))
            connection.setblocking(False)
            code = connection.connect_ex(address)
            if code == errno.ECONNREFUSED:
                found.add(address)
            elif code == errno.EINPROGRESS:
                selector.register(connection, selectors.EVENT_WRITE, address)
        end = time.monotonic() + seconds
        while selector.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                selector.unregister(key.fileobj)
                if key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED:  # type: ignore[union-attr]
                    found.add(key.data)
    return found
