"""Where a process is, in memory that outlives it, for the others on its machine."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import tempfile
from pathlib import Path

_LAYOUT = struct.Struct("<q56s")


class Position:
    """A step and a phase, shared by those who have opened the file.

    Example:
        >>> here = Position.create()
        >>> there = Position.open(here.path)
        >>> here.unlink()
        >>> here.write(57, b"backward")
        >>> there.read()
        (57, 'backward')
    """

    def __init__(self, descriptor: int, path: str) -> None:
        self.path = path
        self._memory = mmap.mmap(descriptor, _LAYOUT.size)
        os.close(descriptor)

    @classmethod
    def create(cls) -> Position:
        """Make one.

        Raises:
            OSError: If there is no room for a temporary file.
        """
        descriptor, path = tempfile.mkstemp(prefix="lightning-optcore-rank-")
        os.write(descriptor, _LAYOUT.pack(0, b"start"))
        return cls(descriptor, path)

    @classmethod
    def open(cls, path: str) -> Position | None:
        """Open another process's one; None if it cannot be seen from here."""
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            if os.fstat(descriptor).st_size == _LAYOUT.size:
                return cls(descriptor, path)
            os.close(descriptor)
        return None

    def write(self, step: int, phase: bytes) -> None:
        """Write where this process is."""
        _LAYOUT.pack_into(self._memory, 0, step, phase)

    def read(self) -> tuple[int, str]:
        """Return where its process is, or was when it died."""
        step, phase = _LAYOUT.unpack_from(self._memory, 0)
        return step, phase.rstrip(b"\0").decode(errors="replace")

    def unlink(self) -> None:
        """Remove the file; the memory stays with those who have opened it."""
        Path(self.path).unlink(missing_ok=True)
