"""The database behind the store: one SQLite file, or a PostgreSQL server that several machines write to.

Both give the same promise: transactions that write come one after another, so that what one has read is still true
when it writes.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url

log = logging.getLogger(__name__)

# Of waiting for other writers, in both databases.
_BUSY_TIMEOUT_S = 60
# A client of a server that stands still within a transaction loses it, before others have waited too long for it.
_IDLE_TIMEOUT_S = 30
# How long a server that was reached before may be away, e.g. while it restarts.
_PATIENCE_S = 60.0
# Any number, as long as it stays: whoever holds it writes.
_WRITE_LOCK = 7_143_208_651

_SERVER_DEFAULTS: dict[str, int | str | None] = {
    "application_name": "lightning_optcore",
    "connect_timeout": 10,
    # Tell within a minute that a machine is gone, in place of waiting for its answer for ever.
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
    # A pooler before the server, such as PgBouncer, may send the next transaction elsewhere.
    "prepare_threshold": None,
}
# Hydra writes a backslash before colons and equals signs of an override, and JSON two.
_PASSWORDS = (
    re.compile(r"(postgres(?:ql)?(?:\+\w+)?\\*://[^\s:/@]*:)[^\s'\"]+(?=@)"),
    re.compile(r"(postgres(?:ql)?(?:\+\w+)?\\*://\S*[?&](?:ssl)?password\\*=)[^&\s'\"]+"),
)
_BUSY = ("starting up", "shutting down", "too many", "connection slots")
_REFUSED_FOR_GOOD = ("authentication failed", "no password supplied", "does not exist", "pg_hba.conf")

Texts = TypeVar("Texts")


class StoreError(RuntimeError):
    """A store that cannot be used as asked; the message names it, the reason and the remedy."""


def without_passwords(value: Texts) -> Texts:
    """Return a text, or lists and mappings of them, with the passwords in PostgreSQL's URLs replaced by ``***``.

    Example:
        >>> without_passwords(["store.path=postgresql://me:secret@host/runs", "seed=1"])
        ['store.path=postgresql://me:***@host/runs', 'seed=1']
    """
    shown: Any = value
    if isinstance(value, str):
        for pattern in _PASSWORDS:
            shown = pattern.sub(r"\1***", shown)
    elif isinstance(value, Mapping):
        shown = {key: without_passwords(one) for key, one in value.items()}
    elif isinstance(value, (list, tuple)):
        shown = [without_passwords(one) for one in value]
    return shown


def warn_of_passwords(overrides: Sequence[str]) -> None:
    """Say where Hydra writes a password that stands on its command line."""
    given = list(overrides)
    if without_passwords(given) != given:
        log.warning(
            "the store's URL holds a password, which Hydra writes into the folder of every job (.hydra): "
            "leave it out, and give it as PGPASSWORD or in ~/.pgpass"
        )


class Database:
    """Gives connections to read and to write with; errors become a :class:`StoreError`.

    Args:
        target: Path of a SQLite file, or a URL: ``postgresql://USER@HOST/DATABASE``, ``sqlite:///PATH``.

    Raises:
        StoreError: If the URL is of another database, or the extra ``postgresql`` is needed and missing.

    Example:
        >>> import tempfile
        >>> database = Database(tempfile.mkdtemp() + "/a.db")
        >>> with database.writing() as connection:
        ...     connection.execute(sa.text("CREATE TABLE numbers (number INTEGER)")).rowcount
        -1
        >>> database.close()
    """

    def __init__(self, target: str) -> None:
        self._url = _url_of(target)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self.name = str(self._url.database) if self.is_sqlite else without_passwords(target)
        if self.is_sqlite and self._url.database:
            with self.explained():
                Path(self._url.database).parent.mkdir(parents=True, exist_ok=True)
        self._engine = self._sqlite_engine(sa.pool.NullPool) if self.is_sqlite else self._server_engine()

    def close(self) -> None:
        """Give back the connections."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection to read with."""
        with self.explained(), self._connected() as connection:
            yield connection

    @contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[Connection]:
        """Give a connection within one transaction, which an exception takes back; no other writes meanwhile.

        Args:
            durable: Whether it is kept through a power cut. A process that is killed loses nothing either way.
        """
        with self.explained(), self._connected() as connection:
            (self._begin_in_file if self.is_sqlite else self._begin_on_server)(connection, durable)
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            connection.commit()

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """Keep a connection from one transaction to the next within the block; to a server there always is one.

        Whoever closes SQLite's file last folds the write-ahead log into it: many short transactions, of this and of
        other processes, are several times faster while one connection stays.
        """
        if not self.is_sqlite:
            yield
            return
        single, self._engine = self._engine, self._sqlite_engine(sa.pool.QueuePool)
        _pooled.add(self._engine)
        try:
            with self.reading() as connection:
                connection.exec_driver_sql("PRAGMA user_version")
            yield
        finally:
            self._engine.dispose()
            self._engine = single

    def write_ahead(self) -> None:
        """Let readers of a SQLite file work beside its writer; the file keeps this, and a server does it anyway."""
        if self.is_sqlite:
            with self.reading() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn errors of the database and of files into a :class:`StoreError`."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            reason = self._reason(error)
            remedy = _remedy(reason) if self.is_sqlite else _remedy_of_server(reason, self._url)
            raise StoreError(f"store.path={self.name}: {reason}; {remedy}") from error
        except OSError as error:
            raise StoreError(f"store.path={self.name}: {error.strerror}; {_remedy('')}") from error

    def _reason(self, error: sa.exc.DBAPIError) -> str:
        reason = " ".join(str(error.orig).split())
        return reason.replace(str(self._url.password), "***") if self._url.password else reason

    def _connected(self) -> Connection:
        """Connect, and wait for a server that restarts: nothing was sent yet, so that nothing is done twice."""
        end, pause = time.monotonic() + _PATIENCE_S, 0.1
        while True:
            try:
                connection = self._engine.connect()
            except sa.exc.OperationalError as error:
                reason = self._reason(error)
                passes = any(one in reason for one in _BUSY) or (
                    self._url in _reached and not any(one in reason for one in _REFUSED_FOR_GOOD)
                )
                if self.is_sqlite or not passes or time.monotonic() > end:
                    raise
                # Not all at once: many processes may wait.
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, 2.0)
            else:
                if not self.is_sqlite:
                    _reached.add(self._url)
                return connection

    def _begin_in_file(self, connection: Connection, durable: bool) -> None:
        connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        # Take the write lock at once: upgrading a read lock later can fail with SQLITE_BUSY.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    def _begin_on_server(self, connection: Connection, durable: bool) -> None:
        # The server begins, and what follows sees what was committed before the lock was taken.
        settings = {"lock_timeout": f"{_BUSY_TIMEOUT_S}s", "idle_in_transaction_session_timeout": f"{_IDLE_TIMEOUT_S}s"}
        if not durable:
            settings["synchronous_commit"] = "off"
        local = "".join(f"SET LOCAL {name} = '{value}'; " for name, value in settings.items())
        connection.exec_driver_sql(f"{local}SELECT pg_advisory_xact_lock({_WRITE_LOCK})")

    def _sqlite_engine(self, pool: type[sa.pool.Pool]) -> Engine:
        engine = sa.create_engine(self._url, poolclass=pool, connect_args={"timeout": _BUSY_TIMEOUT_S})
        _configure_sqlite(engine)
        return engine

    def _server_engine(self) -> Engine:
        options = {name: value for name, value in _SERVER_DEFAULTS.items() if name not in self._url.query}
        try:
            engine = sa.create_engine(
                self._url,
                # A server has connections for so many processes: of each, threads apart, one.
                pool_size=1,
                max_overflow=-1,
                # One that was lost since it was used last is replaced before anything is sent.
                pool_pre_ping=True,
                connect_args=options,
                hide_parameters=True,
            )
        except ModuleNotFoundError as error:
            raise StoreError(
                f"store.path={self.name}: the driver {error.name} is not installed; "
                "pip install 'lightning-optcore[postgresql]'"
            ) from error
        sa.event.listen(engine, "before_cursor_execute", _with_plain_texts, retval=True)
        _pooled.add(engine)
        return engine


_pooled: weakref.WeakSet[Engine] = weakref.WeakSet()
_reached: set[URL] = set()


def _close_pooled() -> None:
    for engine in list(_pooled):
        engine.dispose()


if hasattr(os, "register_at_fork"):
    # SQLite's locks do not pass to a forked process, which would take itself to have them; and two processes that
    # write to one server's connection would mix up their words.
    os.register_at_fork(before=_close_pooled)


def _url_of(target: str) -> URL:
    if "://" not in target:
        return URL.create("sqlite", database=target)
    expected = "expected a path, or a URL such as postgresql://USER@HOST:5432/DATABASE"
    try:
        url = make_url(target)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise StoreError(f"store.path={without_passwords(target)}: not a URL; {expected}") from error
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "sqlite" and url.drivername != "postgresql+psycopg":
        shown = without_passwords(url.render_as_string())
        raise StoreError(f"store.path={shown}: no database or driver that the store knows; {expected}")
    return url


def _configure_sqlite(engine: Engine) -> None:
    """Let us begin transactions, and check foreign keys."""

    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: Any, _: Any) -> None:
        # Transactions are begun by us: the driver would begin them late and deferred.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()


def _with_plain_texts(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
    """Write what a server's text cannot hold, NUL and bytes that are no characters, as ``\\x00`` and the like."""
    if isinstance(parameters, Mapping):
        return statement, {name: _plain_text(value) for name, value in parameters.items()}
    return statement, [{name: _plain_text(value) for name, value in row.items()} for row in parameters]


def _plain_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return value.replace("\0", r"\x00").encode(errors="backslashreplace").decode()


def _remedy(reason: str) -> str:
    if "full" in reason:
        return "make room on the disk, or name a file elsewhere"
    if "not a database" in reason or "malformed" in reason:
        return "it is no SQLite file or was damaged: move it away, or name another file"
    if "locked" in reason:
        return "another process holds it for long: look for one that hangs"
    return "name a file in a folder that can be written (store.path=null records nothing)"


def _remedy_of_server(reason: str, url: URL) -> str:
    if "authentication failed" in reason or "no password supplied" in reason:
        return "give the password as PGPASSWORD or in ~/.pgpass, and the user in the URL"
    if "database" in reason and "does not exist" in reason:
        return f"create it: createdb {url.database}"
    if "permission denied" in reason:
        return f"the user must own the database {url.database}, or may create tables in its schema"
    if "too many" in reason or "connection slots" in reason:
        return "raise max_connections of the server, or run fewer processes at once"
    if "lock timeout" in reason:
        return "another process holds it for long: look for one that hangs"
    if "No space left" in reason:
        return "make room on the server's disk"
    return "look whether the server runs and can be reached from here (store.path=null records nothing)"
