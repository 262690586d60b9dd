"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file, which takes the place of another one if the block ends well.

    Raises:
        OSError: If it cannot be written; nothing is left half-written.

    Example:
        >>> target = Path(tempfile.mkdtemp()) / "data.bin"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_bytes(b"all of it")
        >>> target.read_bytes()
        b'all of it'
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it.

    Raises:
        OSError: If it cannot be written; nothing is left half-written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
