"""Lines of JSON over sockets that nobody waits for."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

MAX_LINE = 1 << 20  # bytes; who sends more without a line's end, or reads nothing for so long, is no rank


class Link:
    """One connection: lines of JSON to and from it, without blocking.

    Attributes:
        ended: Whether the other side, or the way to it, is gone.

    Example:
        >>> here, there = (Link(end) for end in socket.socketpair())
        >>> here.send({"step": 57})
        >>> there.receive()
        [{'step': 57}]
        >>> here.close()
        >>> there.receive(), there.ended
        ([], True)
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.ended = False
        self._received = b""
        self._unsent = b""

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self.connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a line, or as much of it as goes now; the rest goes with the next."""
        self._unsent += json.dumps(message).encode() + b"\n"
        try:
            self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except BlockingIOError:
            self.ended |= len(self._unsent) > MAX_LINE
        except OSError:
            self.ended = True

    def receive(self) -> list[dict[str, Any]]:
        """Return the lines that have come; what is not JSON ends the link."""
        try:
            while len(self._received) <= MAX_LINE:
                part = self.connection.recv(1 << 16)
                if not part:
                    self.ended = True
                    break
                self._received += part
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        *lines, self._received = self._received.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if len(self._received) > MAX_LINE or not all(isinstance(message, dict) for message in messages):
            self.ended = True
            return []
        return messages

    def close(self) -> None:
        """Close the connection."""
        self.ended = True
        self.connection.close()


def local_address(towards: str) -> str:
    """Return the address of the interface from which a host is reached.

    Raises:
        OSError: If there is no way to it.

    Example:
        >>> local_address("127.0.0.1")
        '127.0.0.1'
    """
    family, kind, _, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # a datagram socket sends nothing for this
        return str(probe.getsockname()[0])
