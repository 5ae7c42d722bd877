"""Copies of the embedded store: made while a daemon runs, put back and compacted while none does."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from moeplan.planner.daemon.database import FILE, StoreError, locked

__all__ = ["backup", "compact", "restore"]


def backup(data: Path, target: Path) -> int:
    """Write a copy of the store in `data` as it is at one moment, also while a daemon uses it; its size in bytes.

    Raises:
        StoreError: there is no store, it is damaged, or the copy cannot be written. Nothing is left of a failed copy.
    """
    source = data / FILE
    if not source.is_file():
        raise StoreError(f"{source} does not exist; give the folder of the daemon's store with --data")
    if target.exists():
        raise StoreError(f"{target} exists; give another name")
    part = target.with_name(target.name + ".part")
    try:
        with _open(source, "ro") as old, _open(part, "rwc") as new:
            old.backup(new)
            new.execute("PRAGMA journal_mode=DELETE")  # one file, which may be copied as it is
        _check(part)
        _sync(part)
        part.rename(target)
        _sync(target.parent)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{source} cannot be copied to {target}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size


def restore(copy: Path, data: Path) -> None:
    """Put a copy into a folder that has no store, for a daemon that is started next.

    Raises:
        StoreError: a daemon uses the folder, it has a store, or the copy is none.
    """
    target = data / FILE
    with locked(data) as lock:
        found = [path for path in (target, data / f"{FILE}-wal") if path.exists()]
        if found:
            raise StoreError(f"{found[0]} exists; move it away first, it is not overwritten")
        part = data / f"{FILE}.part"
        try:
            _check(copy)
            with _open(copy, "ro") as old, _open(part, "rwc") as new:
                old.backup(new)
            _sync(part)
            part.rename(target)
            _sync(data)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{copy} cannot be put into {data}: {error}") from None
        finally:
            part.unlink(missing_ok=True)
        os.pwrite(lock, FILE.encode() + b"\n", 0)


def compact(data: Path) -> tuple[int, int]:
    """Give the space of deleted jobs and plans back to the disk, while no daemon runs; bytes before and after.

    Raises:
        StoreError: a daemon uses the folder, there is no store, or there is no room to work in.
    """
    path = data / FILE
    if not path.is_file():
        raise StoreError(f"{path} does not exist; give the folder of the daemon's store with --data")
    with locked(data):
        before = path.stat().st_size
        try:
            with _open(path, "rw") as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            raise StoreError(f"{path} cannot be compacted: {error}; it is as it was") from None
        return before, path.stat().st_size


def _open(path: Path, mode: str) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=60))


def _check(path: Path) -> None:
    with _open(path, "ro") as connection:
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise StoreError(f"{path} is damaged ({problem})")
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'moeplan_meta'").fetchone():
            raise StoreError(f"{path} is no store of moeplan")


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
