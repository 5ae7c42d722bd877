"""Jobs and plans on disk: SQLite by default, PostgreSQL by URL, through the same statements.

One thread does all work. Writes that wait while it is busy are committed together, so that a burst of plans costs few
synchronisations of the disk; each has its own savepoint, so that one that fails fails alone. What a method returned
from is on disk.

Behind a shared database several daemons stand, and each job is owned by one at a time. A daemon holds a job by a lease
that it renews; all times are the database's, so daemons' clocks do not matter, and every write names its owner, so that
one that lost its lease cannot write. SQLite has one daemon (a lock on the folder holds that): its leases never end, and
are taken over at the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import exc

from moeplan.planner.daemon.metrics import Metrics

__all__ = ["JobRow", "LeaseLostError", "PlanRow", "Store", "StoreError", "StoreFullError"]

SCHEMA = 1
T = TypeVar("T")

_tables = sa.MetaData()
_meta = sa.Table("moeplan_meta", _tables, sa.Column("schema", sa.Integer, primary_key=True))
_jobs = sa.Table(
    "moeplan_jobs",
    _tables,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("incarnation", sa.BigInteger, nullable=False),
    sa.Column("spec", sa.LargeBinary, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("owner", sa.String(32), nullable=False),
    sa.Column("address", sa.String(256), nullable=False),
    sa.Column("leased_until", sa.Double, nullable=False),
)
_plans = sa.Table(
    "moeplan_plans",
    _tables,
    sa.Column("job", sa.ForeignKey("moeplan_jobs.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("version", sa.BigInteger, primary_key=True),
    sa.Column("plan", sa.LargeBinary, nullable=False),
)

# What every plan waits for is made once: to build a statement takes longer than to run it.
_new_plan = _plans.insert()
_old_plans = _plans.delete().where(_plans.c.job == sa.bindparam("of"), _plans.c.version <= sa.bindparam("last"))


class StoreError(Exception):
    """The store cannot do it; the message says what to do."""


class StoreFullError(StoreError):
    """There is no room left on the disk."""


class LeaseLostError(StoreError):
    """Another daemon owns the job."""


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as it is stored: its message, and who owns it ("" for nobody)."""

    name: str
    incarnation: int
    spec: bytes
    created: float
    version: int
    owner: str
    address: str


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A plan as it is stored."""

    version: int
    plan: bytes


class Store:
    """The store of one daemon. Open it before use, close it after."""

    def __init__(self, url: str, data: Path, *, owner: str, address: str, lease_s: float, kept: int, metrics: Metrics):
        self._folder = None if url else data
        self._url = sa.make_url(url or f"sqlite:///{data / 'moeplan.sqlite3'}")
        if self._url.drivername == "postgresql":
            self._url = self._url.set(drivername="postgresql+psycopg")
        self._sqlite = self._url.get_backend_name() == "sqlite"
        self._owner, self._address, self._lease_s, self._kept = owner, address, lease_s, kept
        self._metrics = metrics
        mine = _jobs.update().where(_jobs.c.name == sa.bindparam("of"), _jobs.c.owner == owner)
        self._mine = mine.where(_jobs.c.leased_until >= self._now())
        self._mine_older = self._mine.where(_jobs.c.version < sa.bindparam("below"))
        self._lock = -1
        self._work: queue.SimpleQueue[tuple[Callable[[sa.Connection], Any], asyncio.Future[Any]] | None]
        self._work = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop
        self._engine: sa.Engine
        self._thread: threading.Thread | None = None

    @property
    def shared(self) -> bool:
        """Whether other daemons may use the store too."""
        return not self._sqlite

    async def open(self) -> None:
        """Connect, check, and make the tables if there are none.

        Raises:
            StoreError: it cannot be used; nothing was changed.
        """
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._open)
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Finish what was asked for, give the jobs back, and disconnect."""
        if self._thread is not None:
            with contextlib.suppress(StoreError):  # a lease that cannot be given back ends by itself
                await self._do(self._release)
            self._work.put(None)
            await asyncio.to_thread(self._thread.join)
            self._engine.dispose()
        if self._lock >= 0:
            os.close(self._lock)

    async def create(self, name: str, incarnation: int, spec: bytes, version: int, plan: bytes) -> float:
        """Keep a new job and its first plan, owned by this daemon; its time of creation.

        Raises:
            StoreError: it could not be kept; `exists` in the message's cause if the name is taken.
        """
        created = time.time()

        def write(connection: sa.Connection) -> None:
            connection.execute(
                _jobs.insert().values(
                    name=name,
                    incarnation=incarnation,
                    spec=spec,
                    created=created,
                    version=version,
                    owner=self._owner,
                    address=self._address,
                    leased_until=self._now() + self._lease_s,
                )
            )
            connection.execute(_plans.insert().values(job=name, version=version, plan=plan))

        await self._do(write)
        return created

    async def save(
        self, name: str, *, incarnation: int, spec: bytes | None = None, version: int = 0, plan: bytes = b""
    ) -> None:
        """Keep a job's incarnation, and where given its description and its newest plan.

        Raises:
            LeaseLostError: another daemon owns the job, or it was deleted, or has a newer plan.
            StoreError: it could not be kept.
        """
        values: dict[str, Any] = {"incarnation": incarnation}
        if spec is not None:
            values["spec"] = spec
        if plan:
            values |= {"version": version, "below": version}

        def write(connection: sa.Connection) -> None:
            if self._count(connection, self._mine_older if plan else self._mine, {"of": name, **values}) != 1:
                raise LeaseLostError(f"jobs/{name} is owned by another daemon now")
            if plan:
                connection.execute(_new_plan, {"job": name, "version": version, "plan": plan})
                # Versions of a job have no gaps.
                connection.execute(_old_plans, {"of": name, "last": version - self._kept})

        await self._do(write)

    async def delete(self, name: str) -> bool:
        """Forget a job of this daemon and its plans; whether there was one."""

        def write(connection: sa.Connection) -> bool:
            connection.execute(_plans.delete().where(_plans.c.job == name))
            return self._count(connection, _jobs.delete().where(_jobs.c.name == name)) == 1

        return await self._do(write)

    async def job(self, name: str) -> JobRow | None:
        """One job."""
        rows = await self._do(lambda connection: self._rows(connection, _jobs.c.name == name, 1))
        return rows[0] if rows else None

    async def jobs(self, after: str, limit: int) -> list[JobRow]:
        """Jobs whose name follows `after`, by name."""
        return await self._do(lambda connection: self._rows(connection, _jobs.c.name > after, limit))

    async def count(self) -> int:
        """Number of jobs."""
        query = sa.select(sa.func.count()).select_from(_jobs)
        return await self._do(lambda connection: int(connection.scalar(query) or 0))

    async def plan(self, name: str, version: int | None) -> PlanRow | None:
        """A plan; the newest if `version` is None."""

        def read(connection: sa.Connection) -> PlanRow | None:
            query = sa.select(_plans.c.version, _plans.c.plan).where(_plans.c.job == name)
            if version is not None:
                query = query.where(_plans.c.version == version)
            row = connection.execute(query.order_by(_plans.c.version.desc()).limit(1)).first()
            return None if row is None else PlanRow(row.version, bytes(row.plan))

        return await self._do(read)

    async def claim(self, name: str | None = None) -> list[tuple[JobRow, PlanRow]]:
        """Take over jobs that nobody owns, all or one, and read each with its newest plan."""

        def write(connection: sa.Connection) -> list[tuple[JobRow, PlanRow]]:
            free = sa.or_(_jobs.c.owner == "", _jobs.c.leased_until < self._now())
            if name is not None:
                free = sa.and_(free, _jobs.c.name == name)
            # Rows that another daemon has locked are its own for now: waiting for them would hold up all other work.
            query = sa.select(_jobs.c.name).where(free).order_by(_jobs.c.name).with_for_update(skip_locked=True)
            candidates = list(connection.scalars(query))
            taken = []
            for candidate in candidates:
                take = _jobs.update().where(_jobs.c.name == candidate, free)
                values = {
                    "owner": self._owner,
                    "address": self._address,
                    "leased_until": self._now() + self._lease_s,
                }
                if self._count(connection, take.values(**values)) == 1:
                    row = self._rows(connection, _jobs.c.name == candidate, 1)[0]
                    query = sa.select(_plans.c.version, _plans.c.plan).where(
                        _plans.c.job == candidate, _plans.c.version == row.version
                    )
                    plan = connection.execute(query).one()
                    taken.append((row, PlanRow(plan.version, bytes(plan.plan))))
            return taken

        return await self._do(write)

    async def renew(self) -> set[str]:
        """Keep the leases; the names of the jobs that this daemon owns."""

        def write(connection: sa.Connection) -> set[str]:
            mine = sa.and_(_jobs.c.owner == self._owner, _jobs.c.leased_until >= self._now())
            if not self._sqlite:
                connection.execute(_jobs.update().where(mine).values(leased_until=self._now() + self._lease_s))
            return set(connection.scalars(sa.select(_jobs.c.name).where(mine)))

        return await self._do(write)

    def _now(self) -> sa.ColumnElement[float]:
        # Time stands still for SQLite: nobody else could take a lease.
        if self._sqlite:
            return sa.literal(0.0)
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)

    def _release(self, connection: sa.Connection) -> None:
        connection.execute(_jobs.update().where(_jobs.c.owner == self._owner).values(owner="", address=""))

    @staticmethod
    def _count(connection: sa.Connection, statement: sa.UpdateBase, values: dict[str, Any] | None = None) -> int:
        return connection.execute(statement, values).rowcount

    @staticmethod
    def _rows(connection: sa.Connection, where: sa.ColumnElement[bool], limit: int) -> list[JobRow]:
        query = sa.select(*(_jobs.c[name] for name in JobRow.__slots__)).where(where)
        rows = connection.execute(query.order_by(_jobs.c.name).limit(limit))
        return [JobRow(**{**row, "spec": bytes(row["spec"])}) for row in rows.mappings()]

    def _open(self) -> None:
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._lock = os.open(self._folder / "moeplan.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"{self._folder} is used by another daemon; stop it, or give this one another folder with --data"
                ) from None
            except OSError as error:
                raise StoreError(f"{self._folder} cannot be used: {error.strerror}; give --data") from None
        shown = self._url.render_as_string(hide_password=True)
        try:
            self._engine = self._connect()
            with self._engine.begin() as connection:
                if self._sqlite:
                    problems = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                    if problems != "ok":
                        raise StoreError(_damaged(self._url.database or "", str(problems)))
                found = sa.inspect(connection).has_table("moeplan_meta")
                schema = connection.scalar(sa.select(_meta.c.schema)) if found else None
                if schema not in (None, SCHEMA):
                    raise StoreError(
                        f"{shown} has schema {schema}, but this moeplan knows {SCHEMA}; use the version that wrote it"
                    )
                if schema is None:
                    self._create_tables(connection)
                if self._sqlite:
                    connection.execute(_jobs.update().values(owner="", address=""))
        except exc.DatabaseError as error:
            if self._sqlite and not isinstance(error, exc.OperationalError):
                raise StoreError(_damaged(self._url.database or "", str(error.orig))) from None
            raise StoreError(f"{shown} cannot be used: {error.orig}") from None

    def _create_tables(self, connection: sa.Connection) -> None:
        if not self._sqlite:  # two daemons may begin at once
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7433)")
        _tables.create_all(connection)
        if connection.scalar(sa.select(_meta.c.schema)) is None:
            connection.execute(_meta.insert().values(schema=SCHEMA))

    def _connect(self) -> sa.Engine:
        if not self._sqlite:
            engine = sa.create_engine(self._url, pool_size=1, max_overflow=1, pool_pre_ping=True)
            patience_ms = max(1, round(self._lease_s * 1e3))

            @sa.event.listens_for(engine, "connect")
            def limit(connection: Any, _: object) -> None:
                # A daemon that is stopped within a transaction, or its host lost, gives up its locks with its leases.
                for setting in ("idle_in_transaction_session_timeout", "lock_timeout"):
                    connection.execute(f"SET {setting} = {patience_ms}").close()
                connection.commit()

            return engine
        engine = sa.create_engine(self._url, poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})

        @sa.event.listens_for(engine, "connect")
        def configure(connection: Any, _: object) -> None:
            connection.isolation_level = None  # transactions begin where we say so, below
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}").close()

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        return engine

    async def _do(self, work: Callable[[sa.Connection], T]) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self._work.put((work, future))
        return await future

    def _run(self) -> None:
        while True:
            batch = [self._work.get()]
            while not self._work.empty():
                batch.append(self._work.get())
            items = [item for item in batch if item is not None]
            start = time.perf_counter()
            results = self._commit([work for work, _ in items])
            self._metrics.store.observe(time.perf_counter() - start)
            if items:
                self._loop.call_soon_threadsafe(_resolve, [future for _, future in items], results)
            if len(items) < len(batch):
                return

    def _commit(self, works: list[Callable[[sa.Connection], Any]]) -> list[Any]:
        if not works:
            return []
        results: list[Any] = []
        try:
            with self._engine.begin() as connection:
                if len(works) == 1:
                    return [works[0](connection)]
                for work in works:
                    try:
                        with connection.begin_nested():
                            results.append(work(connection))
                    except (StoreError, exc.IntegrityError) as error:
                        results.append(_translate(error))
        except Exception as error:  # whatever it was, no work of this batch is on disk
            return [_translate(error)] * len(works)
        return results


def _resolve(futures: list[asyncio.Future[Any]], results: list[Any]) -> None:
    for future, result in zip(futures, results, strict=True):
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def _translate(error: Exception) -> StoreError:
    if isinstance(error, StoreError):
        return error
    text = str(error.orig) if isinstance(error, exc.DBAPIError) else f"{type(error).__name__}: {error}"
    if "full" in text or "No space left" in text:
        return StoreFullError(f"the store's disk is full; make room: {text}")
    return StoreError(f"the store failed: {text}")


def _damaged(path: str, problem: str) -> str:
    return (
        f"{path} is damaged ({problem}). It was left as it is. Put a backup in its place, or try "
        f"`sqlite3 {path} .recover`; or move it away to begin with no jobs"
    )
