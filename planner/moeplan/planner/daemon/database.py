"""Opening the database: SQLite in a folder that is watched for damage, or PostgreSQL, which may not hang."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import socket
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy import exc

__all__ = ["FILE", "Database", "StoreError", "StoreFullError", "locked", "translate"]

FILE = "moeplan.sqlite3"
LOCK = "moeplan.lock"
"""Locked by the daemon that uses the folder. It says whether there has been a database, so that none is missed."""
RESERVE = "moeplan.reserve"
"""Space that is given up when the disk is full, so that deleting and a restart go on."""
RESERVE_BYTES = 256 * 1024
LOG_BYTES = 1_024 * (4_096 + 24)
"""Length that the write-ahead log grows to before SQLite begins at its start again: 1,000 pages and some."""
SMALLEST = 512
"""Bytes of the smallest database that is not empty."""

log = structlog.get_logger()


class StoreError(Exception):
    """The store cannot do it; the message says what to do."""


class StoreFullError(StoreError):
    """There is no room left on the disk."""


class Database:
    """A database, opened for one daemon.

    Args:
        url: SQLAlchemy URL; SQLite in `data` if empty.
        data: Folder of the embedded store.
        patience_s: Longest that a server may take to answer anything, and twice what another process may keep SQLite
            locked.

    Raises:
        StoreError: the URL is none, or names a database that is not known here.
    """

    def __init__(self, url: str, data: Path, *, patience_s: float) -> None:
        self._folder = None if url else data
        try:
            self._url = sa.make_url(url or f"sqlite:///{data / FILE}")
            if self._url.drivername in ("postgresql", "postgres"):
                self._url = self._url.set(drivername="postgresql+psycopg")
            self.sqlite = self._url.get_backend_name() == "sqlite"
            if url and self._url.get_backend_name() != "postgresql":  # SQLite is safe in a folder with a lock only
                raise ValueError(self._url.drivername)
            self._url.get_dialect()
        except (exc.ArgumentError, exc.NoSuchModuleError, ValueError) as error:
            raise StoreError(
                f"store is no URL of a database ({type(error).__name__}); write postgresql://user@host/name, or leave "
                "it empty for SQLite in --data"
            ) from None
        self._patience_s = patience_s
        self._lock = -1
        self._inode: tuple[int, int] | None = None
        self._socket: int | None = None
        self._file: sqlite3.Connection | None = None
        self.engine: sa.Engine

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return self._url.render_as_string(hide_password=True)

    def open(self) -> None:
        """Lock the folder, look for damage, and connect; nothing is changed.

        Raises:
            StoreError: it cannot be used.
        """
        if self._folder is not None:
            self._lock = _lock_folder(self._folder)
            self._look_for_damage(self._folder)
        try:
            self.engine = self._sqlite_engine() if self.sqlite else self._server_engine()
        except ModuleNotFoundError as error:
            raise StoreError(
                f"{self.shown} needs the package {error.name}; pip install 'moeplan[postgres]' for PostgreSQL"
            ) from None

    def opened(self) -> None:
        """The database is whole and has its tables: remember that there is one, and set space aside."""
        if self._folder is None:
            return
        os.pwrite(self._lock, FILE.encode() + b"\n", 0)
        os.fsync(self._lock)
        found = (self._folder / FILE).stat()
        self._inode = found.st_dev, found.st_ino
        self.reserve()

    def close(self) -> None:
        """Disconnect, and let go of the folder."""
        if hasattr(self, "engine"):
            self.engine.dispose()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def check(self) -> None:
        """Notice that the database's file is no longer where it was.

        Raises:
            StoreError: it was removed or replaced; what is written now is lost.
        """
        if self._folder is None or self._inode is None:
            return
        path = self._folder / FILE
        try:
            found = path.stat()
        except OSError as error:
            problem = error.strerror or "gone"
        else:
            if (found.st_dev, found.st_ino) == self._inode:
                return
            problem = "another file is in its place"
        raise StoreError(f"{path} was removed while in use ({problem}); stop the daemon, put it back, and start again")

    def reserve(self, room: int = 0) -> bool:
        """Set space aside for when the disk is full; whether it could be, with `room` bytes left."""
        if self._folder is None:
            return True
        try:
            with (self._folder / RESERVE).open("ab") as file:
                missing = RESERVE_BYTES - file.tell()
                disk = os.statvfs(self._folder)
                left = disk.f_bavail * disk.f_frsize - missing
                if left < (RESERVE_BYTES if missing else 0) + room:  # as much again must be left to work with
                    return False
                if missing:
                    os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Give the space that was set aside to the database."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / RESERVE).unlink()

    def make_room(self) -> None:
        """Find space on a full disk: what was set aside takes in what is in the log, whose space is then free."""
        self.release()
        if self.sqlite:
            with contextlib.suppress(Exception), contextlib.closing(self.engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def lengthen_log(self) -> None:
        """Give the write-ahead log, which has been written to, the length that it grows to: zeros, which end it.

        To synchronise a file that has grown takes the journal of the file system too, and with it whatever else on the
        disk waits to be written.
        """
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            # Appended, wherever the end is by then: another process may be writing too.
            number = os.open(self._folder / f"{FILE}-wal", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                size, disk = os.fstat(number).st_size, os.fstatvfs(number)
                # Without its head, zeros would look like damage; and a disk that is nearly full needs its room.
                if 0 < size < LOG_BYTES and disk.f_bavail * disk.f_frsize > 4 * LOG_BYTES:
                    os.write(number, bytes(LOG_BYTES - size))
                    os.fsync(number)
            finally:
                os.close(number)

    def hang_up(self) -> None:
        """End what the database is doing, as it does not answer: who waits for it gets an error. From any thread.

        The connection to a server is cut; SQLite stops computing, but not waiting for its disk.
        """
        if self._file is not None:
            self._file.interrupt()
        number = self._socket
        if number is not None:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    def damaged(self, problem: str) -> StoreError:
        """The error that refuses a broken file."""
        path = self._url.database or ""
        return StoreError(
            f"{path} is damaged ({problem}). It was left as it is. Put a backup in its place, or try "
            f"`sqlite3 {path} .recover`; or move the folder away to begin with no jobs"
        )

    def _look_for_damage(self, folder: Path) -> None:
        """SQLite takes an empty file for a new database, and leaves out the part of its log after a broken place."""
        path = folder / FILE
        size = path.stat().st_size if path.exists() else 0
        if size < SMALLEST and (size or os.pread(self._lock, 1, 0)):
            raise self.damaged(f"it has {size} bytes, and there were jobs in it")
        lost = _lost_transactions(folder / f"{FILE}-wal")
        if lost > 1:
            raise self.damaged(f"{lost} transactions of {FILE}-wal follow a broken place")
        if lost:  # the machine stopped while it was written, so nobody was told that it was done
            log.warning("the last transaction is incomplete and left out", file=str(path))

    def _sqlite_engine(self) -> sa.Engine:
        # Half of what a server may take: who reads may have to wait for two writes that another process keeps waiting.
        options: dict[str, Any] = {"check_same_thread": False, "timeout": self._patience_s / 2}
        engine = sa.create_engine(self._url, poolclass=sa.pool.StaticPool, connect_args=options)

        @sa.event.listens_for(engine, "connect")
        def configure(connection: Any, _: object) -> None:
            self._file = connection
            connection.isolation_level = None  # transactions begin where we say so, below
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}").close()

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            # Who only reads goes on while another process writes, and with a full disk.
            reads = connection.get_execution_options().get("reads", False)
            connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

        return engine

    def _server_engine(self) -> sa.Engine:
        seconds = max(2, math.ceil(self._patience_s))
        patience_ms = max(1, round(self._patience_s * 1e3))
        options: dict[str, Any] = {}
        if self._url.get_driver_name() == "psycopg":
            options = {
                "connect_timeout": seconds,
                "keepalives_idle": seconds,
                "keepalives_interval": seconds,
                "keepalives_count": 2,
                "tcp_user_timeout": patience_ms,
            }
        engine = sa.create_engine(self._url, pool_size=1, max_overflow=0, pool_pre_ping=True, connect_args=options)

        @sa.event.listens_for(engine, "connect")
        def limit(connection: Any, _: object) -> None:
            self._socket = connection.fileno()
            # A daemon that is stopped within a transaction, or its host lost, gives up its locks with its leases.
            names = ("idle_in_transaction_session_timeout", "lock_timeout", "statement_timeout")
            connection.execute("; ".join(f"SET {name} = {patience_ms}" for name in names)).close()
            connection.commit()

        @sa.event.listens_for(engine, "close")
        def forget(_: Any, __: object) -> None:
            self._socket = None

        return engine


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep daemons from a folder; the descriptor of its lock.

    Raises:
        StoreError: a daemon uses it.
    """
    lock = _lock_folder(folder)
    try:
        yield lock
    finally:
        os.close(lock)


def _lock_folder(folder: Path) -> int:
    lock = -1
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreError(
            f"{folder} is used by another daemon; stop it, or give this one another folder with --data"
        ) from None
    except OSError as error:
        raise StoreError(f"{folder} cannot be used: {error.strerror}; give --data") from None
    return lock


def translate(error: Exception) -> StoreError:
    """An error of the database as one of ours."""
    if isinstance(error, StoreError):
        return error
    text = str(error.orig) if isinstance(error, exc.DBAPIError) else f"{type(error).__name__}: {error}"
    if "full" in text or "No space left" in text:
        return StoreFullError(f"the store's disk is full; make room: {text}")
    return StoreError(f"the store failed: {text}")


def _lost_transactions(path: Path) -> int:
    """Transactions of a write-ahead log that SQLite would leave out, as they come after a broken place.

    One may be a transaction that was being written when the machine stopped.
    Format: https://www.sqlite.org/fileformat2.html#walformat
    """
    try:
        log_bytes = path.read_bytes()
    except FileNotFoundError:
        return 0
    if len(log_bytes) <= 32:
        return 0
    magic, _, page, _, salt_1, salt_2, *_ = struct.unpack(">8I", log_bytes[:32])
    order = ">" if magic & 1 else "<"
    frames = list(_frames(log_bytes, page)) if 512 <= page <= 65_536 else []
    if magic not in (0x377F0682, 0x377F0683) or not frames:
        return 2 if len(log_bytes) > 32 + 24 + 512 else 0
    sums = _checksum(log_bytes[:24], (0, 0), order)
    if sums != struct.unpack(">2I", log_bytes[24:32]):
        return 2  # without its head SQLite leaves out all of it
    whole = True
    lost = 0
    for head, content in frames:
        _, pages, *salt, sum_1, sum_2 = struct.unpack(">6I", head)
        ours = salt == [salt_1, salt_2]
        if whole:
            sums = _checksum(head[:8] + content, sums, order)
            whole = ours and sums == (sum_1, sum_2)
        if not whole and ours and pages:  # a frame with the number of pages ends a transaction
            lost += 1
    return lost


def _frames(log_bytes: bytes, page: int) -> Iterator[tuple[bytes, bytes]]:
    for start in range(32, len(log_bytes) - 24 - page + 1, 24 + page):
        yield log_bytes[start : start + 24], log_bytes[start + 24 : start + 24 + page]


def _checksum(data: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
