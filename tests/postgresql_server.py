"""A PostgreSQL server of the tests' own: on loopback, in a temporary folder, gone with the process that started it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psycopg

_ADMINISTRATOR = "administrator"
# Owns the databases, and may do nothing beside.
USER = "optcore"
# The server ends when its standard input does: with the tests, however these end.
_UNTIL_ALONE = '"$@" </dev/null & cat >/dev/null; kill -QUIT $!; wait'
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "max_connections": "60",
    "shared_buffers": "16MB",
    "dynamic_shared_memory_type": "mmap",
}


def programs() -> Path | None:
    """Return the folder of the newest server's programs, if one is installed."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = debian[-1] if debian else shutil.which("initdb")
    return None if found is None else Path(found).parent


class Server:
    """One that is made, and runs until it is closed.

    Args:
        folder: Of its programs.
    """

    def __init__(self, folder: Path) -> None:
        self._programs = folder
        # It refuses to be root's, and whoever it is must reach its files.
        self._user = "postgres" if os.getuid() == 0 else None
        self._home = Path(tempfile.mkdtemp(prefix="optcore_pg_"))
        self.password = secrets.token_hex(8)
        password = self._home / "password"
        password.write_text(self.password)
        if self._user is not None:
            for path in (self._home, password):
                shutil.chown(path, self._user)
        options = [f"--username={_ADMINISTRATOR}", "--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8"]
        command = [folder / "initdb", f"--pgdata={self._home / 'data'}", *options, "--locale=C", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, user=self._user, cwd=self._home)
        self.port = _free_port()
        self._databases = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self.execute(f"CREATE ROLE {USER} LOGIN PASSWORD '{self.password}'")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = {**_SETTINGS, "port": str(self.port), "unix_socket_directories": str(self._home)}
        words = [f"--{name}={value}" for name, value in settings.items()]
        command = ["sh", "-c", _UNTIL_ALONE, "sh", self._programs / "postgres", "-D", self._home / "data", *words]
        with (self._home / "log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, user=self._user, cwd=self._home
            )
        end = time.monotonic() + 60
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None and time.monotonic() < end, (self._home / "log").read_text()
                time.sleep(0.05)

    def stop(self) -> None:
        """End it at once, as a crash would."""
        if self._process is None:
            return
        lock = self._home / "data" / "postmaster.pid"
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(lock.read_text().splitlines()[0]), signal.SIGQUIT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process = None

    def close(self) -> None:
        """End it and remove its files."""
        self.stop()
        shutil.rmtree(self._home)

    def url(self, database: str, password: str | None = None) -> str:
        """Return the URL of a database, with the right password unless another is given."""
        return f"postgresql://{USER}:{password or self.password}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database and return its name."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.execute(f"CREATE DATABASE {name} OWNER {USER}")
        return name

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run one statement as the administrator, and return its rows."""
        where = {"host": "127.0.0.1", "port": self.port, "user": _ADMINISTRATOR, "password": self.password}
        with psycopg.connect(dbname=database, autocommit=True, **where) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
