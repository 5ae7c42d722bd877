"""Jobs and plans on disk: SQLite by default, PostgreSQL by URL, through the same statements.

One thread does all work. Writes that wait while it is busy are committed together, so that a burst of plans costs few
synchronisations of the disk. What jobs keep is written in the same few statements for all of them, so that behind a
slow network leases need not wait for a burst; other writes each have a savepoint, so that one that fails fails alone.
What a method returned from is on disk; of one that fails as the store does not answer, nobody knows: what the store
holds is found when leases are renewed. Leases go first, in a transaction of their own.

Behind a shared database several daemons stand, and each job is owned by one at a time. A daemon holds a job by a lease
that it renews; all times are the database's, so daemons' clocks do not matter, and every write names its owner, so that
one that lost its lease cannot write. SQLite has one daemon (a lock on the folder holds that), which owns every job.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, overload

import sqlalchemy as sa
import structlog
from sqlalchemy import exc

from moeplan.planner.daemon.database import Database, StoreError, StoreFullError, translate
from moeplan.planner.daemon.metrics import Metrics

__all__ = ["JobRow", "LeaseLostError", "PlanRow", "ServerRow", "Store"]

SCHEMA = 1
"""Raised only where an older daemon could not work with the store; a table that it does not know does not matter."""
VERSION = metadata.version("moeplan")
CLAIMED = 256
"""Jobs that are taken over at a time."""
OPEN_S = 30.0
"""Longest that opening may take."""
PROBE_BYTES = 64 * 1024
"""Least plan that must find room before the store counts as working again: a job of some dozens of layers has one."""

T = TypeVar("T")

log = structlog.get_logger()


class _Turn(IntEnum):
    """What is done first of all that waits, each kind in a transaction of its own."""

    LEASES = 0
    WRITES = 1
    READS = 2


Work = Callable[[sa.Connection], T]

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

_daemons = sa.Table(
    "moeplan_daemons",  # an older daemon does not know it, and need not
    _tables,
    sa.Column("owner", sa.String(32), primary_key=True),
    sa.Column("address", sa.String(256), nullable=False),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("draining", sa.Boolean, nullable=False),
    sa.Column("alive_until", sa.Double, nullable=False),
)

# What every plan waits for is made once: to build a statement takes longer than to run it.
_kept_of = (
    _jobs.update()
    .where(_jobs.c.name == sa.bindparam("of"))
    .values(incarnation=sa.bindparam("incarnation"), version=sa.bindparam("version"))
)
_described = _jobs.update().where(_jobs.c.name == sa.bindparam("of")).values(spec=sa.bindparam("spec"))
_new_plan = _plans.insert()
_old_plans = _plans.delete().where(_plans.c.job == sa.bindparam("of"), _plans.c.version <= sa.bindparam("last"))


@dataclass(frozen=True, slots=True)
class _Save:
    """What a job keeps: its incarnation, and where given its description and its newest plan."""

    name: str
    incarnation: int
    spec: bytes | None
    version: int
    plan: bytes


class LeaseLostError(StoreError):
    """This daemon does not own the job, or no longer."""


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


@dataclass(frozen=True, slots=True)
class ServerRow:
    """A daemon behind the store.

    Attributes:
        address: How others reach it.
        version: Its version of moeplan.
        draining: Whether it gives its jobs away and takes none.
        jobs: Jobs that it owns, or that were given to it.
        untaken: Those of them that it has not taken yet.
    """

    address: str
    version: str
    draining: bool
    jobs: int
    untaken: int


class Store:
    """The store of one daemon. Open it before use, close it after."""

    def __init__(self, url: str, data: Path, *, owner: str, address: str, lease_s: float, kept: int, metrics: Metrics):
        self._patience_s = lease_s / 2
        self._database = Database(url, data, patience_s=self._patience_s)
        self._sqlite = self._database.sqlite
        self._owner, self._address, self._lease_s, self._kept = owner, address, lease_s, kept
        self._metrics = metrics
        names: sa.BindParameter[Any] = sa.bindparam("names", expanding=True)
        mine = sa.select(_jobs.c.name, _jobs.c.version).where(_jobs.c.name.in_(names), self._owned())
        self._mine = mine.order_by(_jobs.c.name).with_for_update()
        self._failure = ""
        self._probe_bytes = PROBE_BYTES
        self._wants_room = threading.Event()
        self._work: queue.SimpleQueue[tuple[Work[Any] | _Save, _Turn, asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None
        self._busy_since: float | None = None

    @property
    def shared(self) -> bool:
        """True if other daemons may use the store too."""
        return not self._sqlite

    @property
    def failure(self) -> str:
        """Why something failed since `probe` last found the store working; empty where nothing did."""
        return self._failure

    @property
    def shown(self) -> str:
        """Its URL, without a password."""
        return self._database.shown

    async def open(self) -> None:
        """Connect, check, and make the tables if there are none.

        Raises:
            StoreError: it cannot be used; nothing was changed.
        """
        self._loop = asyncio.get_running_loop()
        opening = asyncio.create_task(asyncio.to_thread(self._open))
        while not (await asyncio.wait([opening], timeout=OPEN_S))[0]:
            log.warning("the store does not open", store=self._database.shown, seconds=OPEN_S)
            if not self._sqlite:  # a large file is looked through for damage
                self._database.hang_up()
        await opening
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Finish what was asked for, give the jobs back, and disconnect."""
        if self._thread is not None:
            with contextlib.suppress(StoreError):  # a lease that cannot be given back ends by itself
                await self._do(self._release)
            self._work.put(None)
            await asyncio.to_thread(self._thread.join, 2 * self._patience_s)
            if self._thread.is_alive():  # to disconnect would wait for what it waits for
                return
        self._database.close()

    async def create(
        self, name: str, incarnation: int, spec: bytes, version: int, plan: bytes, *, replace: bool = False
    ) -> float:
        """Keep a new job and its first plan, owned by this daemon; its time of creation.

        With `replace`, in the place of a job of this daemon that cannot be read.

        Raises:
            StoreError: it could not be kept; `exists` in the message's cause if the name is taken.
        """
        created = time.time()

        def write(connection: sa.Connection) -> None:
            if replace:
                self._forget(connection, name)
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

        await self._keep(write, len(plan))
        return created

    async def save(
        self, name: str, *, incarnation: int, spec: bytes | None = None, version: int = 0, plan: bytes = b""
    ) -> None:
        """Keep a job's incarnation, and where given its description and its newest plan.

        Raises:
            LeaseLostError: another daemon owns the job, or it was deleted, or has a newer plan.
            StoreError: it could not be kept.
        """
        await self._keep(_Save(name, incarnation, spec, version, plan), len(plan))

    async def delete(self, name: str) -> bool:
        """Forget a job of this daemon and its plans; whether there was one."""
        try:
            return await self._do(lambda connection: self._forget(connection, name))
        except StoreFullError:
            # To delete takes room too, until the space of what is deleted can be used again.
            self._wants_room.set()
            return await self._do(lambda connection: self._forget(connection, name))

    async def job(self, name: str) -> JobRow | None:
        """One job."""
        rows = await self._do(lambda connection: self._rows(connection, _jobs.c.name == name, 1), _Turn.READS)
        return rows[0] if rows else None

    async def jobs(self, after: str, limit: int, most_bytes: int, prefix: str = "") -> list[JobRow]:
        """Jobs of a prefix that follow `after`, by name: at most `limit`, and as many as `most_bytes` hold, or one."""

        def read(connection: sa.Connection) -> list[JobRow]:
            wanted = sa.and_(_jobs.c.name > after, _jobs.c.name.startswith(prefix, autoescape=True))
            sizes = sa.select(sa.func.length(_jobs.c.spec)).where(wanted)
            total = count = 0
            for size in connection.scalars(sizes.order_by(_jobs.c.name).limit(limit)):
                total += size
                if count and total > most_bytes:
                    break
                count += 1
            return self._rows(connection, wanted, count)

        return await self._do(read, _Turn.READS)

    async def count(self, prefix: str = "") -> int:
        """Number of jobs of a prefix."""
        query = sa.select(sa.func.count()).where(_jobs.c.name.startswith(prefix, autoescape=True))
        return await self._do(lambda connection: int(connection.scalar(query) or 0), _Turn.READS)

    async def plan(self, name: str, version: int | None) -> PlanRow | None:
        """A plan; the newest if `version` is None."""

        def read(connection: sa.Connection) -> PlanRow | None:
            query = sa.select(_plans.c.version, _plans.c.plan).where(_plans.c.job == name)
            if version is not None:
                query = query.where(_plans.c.version == version)
            row = connection.execute(query.order_by(_plans.c.version.desc()).limit(1)).first()
            return None if row is None else PlanRow(row.version, _bytes(row.plan))

        return await self._do(read, _Turn.READS)

    async def claim(self, held: Collection[str], name: str | None = None) -> list[tuple[JobRow, PlanRow | None]]:
        """Take over jobs that nobody owns, or that are this daemon's although it does not hold them.

        Args:
            held: Jobs that this daemon has already.
            name: The only job to take; None for any, at most `CLAIMED` at a time.

        Returns:
            Each with its newest plan, None where that is missing.
        """

        def write(connection: sa.Connection) -> list[tuple[JobRow, PlanRow | None]]:
            meant = _jobs.c.address.in_(["", self._address])  # of a job that was given away, for whom
            free = sa.or_(
                sa.and_(_jobs.c.owner == "", meant), _jobs.c.leased_until < self._now(), _jobs.c.owner == self._owner
            )
            wanted = sa.and_(sa.true() if self._sqlite else free, _jobs.c.name.not_in(sorted(held)))
            if name is not None:
                wanted = sa.and_(wanted, _jobs.c.name == name)
            if self._sqlite:
                rows = self._rows(connection, wanted, CLAIMED)
            else:
                # Rows that another daemon has locked are its own for now: to wait for them would hold up other work.
                # A few statements for all jobs: one for each would take longer than a lease, behind a slow network.
                candidates = sa.select(_jobs.c.name).where(wanted).order_by(_jobs.c.name).limit(CLAIMED)
                take = _jobs.update().where(_jobs.c.name.in_(candidates.with_for_update(skip_locked=True)))
                lease = self._now() + self._lease_s
                take = take.values(owner=self._owner, address=self._address, leased_until=lease)
                columns = [_jobs.c[column] for column in JobRow.__slots__]
                rows = [_job_row(row) for row in connection.execute(take.returning(*columns)).mappings()]
            newest = sa.select(_plans.c.job, _plans.c.version, _plans.c.plan).join(
                _jobs, sa.and_(_jobs.c.name == _plans.c.job, _jobs.c.version == _plans.c.version)
            )
            found = connection.execute(newest.where(_jobs.c.name.in_([row.name for row in rows]))) if rows else ()
            plans = {plan.job: PlanRow(plan.version, _bytes(plan.plan)) for plan in found}
            return [(row, plans.get(row.name)) for row in sorted(rows, key=lambda row: row.name)]

        return await self._do(write, _Turn.READS if self._sqlite else _Turn.WRITES)

    async def renew(self, draining: bool = False) -> set[str]:
        """Keep the leases, and tell others that this daemon is alive; the names of the jobs that it owns."""

        def write(connection: sa.Connection) -> set[str]:
            if self._sqlite:
                return set(connection.scalars(sa.select(_jobs.c.name)))
            from sqlalchemy.dialects.postgresql import insert  # a tenth of the daemon's start

            lease = _jobs.update().where(self._owned()).values(leased_until=self._now() + self._lease_s)
            owned = set(connection.scalars(lease.returning(_jobs.c.name)))
            known = {"draining": draining, "alive_until": self._now() + self._lease_s}
            alive = insert(_daemons).values(owner=self._owner, address=self._address, version=VERSION, **known)
            connection.execute(alive.on_conflict_do_update(index_elements=["owner"], set_=known))
            return owned

        return await self._do(write, _Turn.READS if self._sqlite else _Turn.LEASES)

    async def servers(self) -> list[ServerRow]:
        """The daemons that are alive, by address; none where there can be only one."""
        if self._sqlite:
            return []
        counts = sa.func.count(_jobs.c.name), sa.func.count(_jobs.c.name).filter(_jobs.c.owner == "")
        query = (
            sa.select(_daemons.c.address, _daemons.c.version, _daemons.c.draining, *counts)
            .outerjoin(_jobs, _jobs.c.address == _daemons.c.address)
            .where(_daemons.c.alive_until >= self._now())
            .group_by(_daemons.c.owner)
            .order_by(_daemons.c.address, _daemons.c.alive_until)
        )

        def read(connection: sa.Connection) -> list[ServerRow]:
            # One that was killed and started again is known twice for a while; the newest counts.
            return list({row.address: ServerRow(*row) for row in connection.execute(query)}.values())

        return await self._do(read, _Turn.READS)

    async def hand_over(self, names: Collection[str], address: str) -> set[str]:
        """Give jobs to the daemon at an address; if that does not take one within a lease, anyone may.

        Returns:
            Those that were this daemon's to give.
        """
        given = {"owner": "", "address": address, "leased_until": self._now() + self._lease_s}
        # In the order in which they are claimed and renewed, so that two daemons never wait for each other.
        change = _jobs.update().where(_jobs.c.name.in_(sorted(names)), self._owned()).values(given)
        return await self._do(lambda connection: set(connection.scalars(change.returning(_jobs.c.name))))

    async def probe(self) -> None:
        """Keep a job and a plan as large as the largest that found no room, and forget them at once.

        Only this ends a `failure`: on a full disk leases may be renewed and small rows changed, and the next plan is
        refused all the same.

        Raises:
            StoreError: it does not work yet.
        """
        name = f"-{self._owner}"  # no job's, and seen by nobody: it is gone when the transaction ends
        plan = os.urandom(self._probe_bytes)  # which no database makes smaller

        def write(connection: sa.Connection) -> bool:
            if not self._database.reserve(self._probe_bytes):  # as SQLite never writes what is deleted at once
                return False
            job = {"name": name, "incarnation": 0, "spec": b"", "created": 0.0, "version": 0}
            connection.execute(_jobs.insert(), {**job, "owner": "", "address": "", "leased_until": 0.0})
            connection.execute(_new_plan, {"job": name, "version": 0, "plan": plan})
            connection.execute(_jobs.delete().where(_jobs.c.name == name))
            return True

        if await self._do(write):
            self._failure, self._probe_bytes = "", PROBE_BYTES

    def _owned(self) -> sa.ColumnElement[bool]:
        if self._sqlite:
            return sa.true()
        return sa.and_(_jobs.c.owner == self._owner, _jobs.c.leased_until >= self._now())

    def _forget(self, connection: sa.Connection, name: str) -> bool:
        # Its plans go with it.
        return self._count(connection, _jobs.delete().where(_jobs.c.name == name, self._owned())) == 1

    def _now(self) -> sa.ColumnElement[float]:
        if self._sqlite:  # where nobody else could take a lease
            return sa.literal(0.0)
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)

    def _release(self, connection: sa.Connection) -> None:
        if not self._sqlite:
            connection.execute(_jobs.update().where(_jobs.c.owner == self._owner).values(owner="", address=""))
            gone = sa.or_(_daemons.c.owner == self._owner, _daemons.c.alive_until < self._now())
            connection.execute(_daemons.delete().where(gone))

    @staticmethod
    def _count(connection: sa.Connection, statement: sa.UpdateBase, values: dict[str, Any] | None = None) -> int:
        return connection.execute(statement, values).rowcount

    @staticmethod
    def _rows(connection: sa.Connection, where: sa.ColumnElement[bool], limit: int) -> list[JobRow]:
        query = sa.select(*(_jobs.c[name] for name in JobRow.__slots__)).where(where)
        rows = connection.execute(query.order_by(_jobs.c.name).limit(limit))
        return [_job_row(row) for row in rows.mappings()]

    def _open(self) -> None:
        self._database.open()
        try:
            try:
                self._prepare()
            except exc.OperationalError:
                # A full disk has no room for the files that SQLite works with.
                self._database.release()
                self._prepare()
        except exc.DatabaseError as error:
            if self._sqlite and not isinstance(error, exc.OperationalError):
                raise self._database.damaged(str(error.orig)) from None
            raise StoreError(
                f"{self._database.shown} cannot be used: {str(error.orig).strip()}; see that it runs and can be reached"
            ) from None
        self._database.opened()

    def _prepare(self) -> None:
        with self._database.engine.connect().execution_options(reads=True) as connection:
            if self._sqlite:
                problems = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                if problems != "ok":
                    raise self._database.damaged(str(problems))
            tables = set(sa.inspect(connection).get_table_names())
            found = "moeplan_meta" in tables
            schema = connection.scalar(sa.select(_meta.c.schema)) if found else None
        if schema not in (None, SCHEMA):
            raise StoreError(
                f"{self._database.shown} has schema {schema}, but this moeplan knows {SCHEMA}; "
                "use the version that wrote it"
            )
        if not tables >= set(_tables.tables):  # a new store, or one of an older version, which does not mind
            with self._database.engine.begin() as connection:
                self._create_tables(connection)

    def _create_tables(self, connection: sa.Connection) -> None:
        if not self._sqlite:  # two daemons may begin at once
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7433)")
        _tables.create_all(connection)
        if connection.scalar(sa.select(_meta.c.schema)) is None:
            connection.execute(_meta.insert().values(schema=SCHEMA))

    async def _keep(self, work: Work[None] | _Save, size: int) -> None:
        """Write a plan of `size` bytes."""
        try:
            await self._do(work)
        except StoreFullError:
            self._probe_bytes = max(self._probe_bytes, size)
            raise

    @overload
    async def _do(self, work: _Save) -> None: ...
    @overload
    async def _do(self, work: Work[T], turn: _Turn = ...) -> T: ...

    async def _do(self, work: Work[Any] | _Save, turn: _Turn = _Turn.WRITES) -> Any:
        limit_s = 2 * self._patience_s
        silent = StoreError(f"the store has not answered for {limit_s:g} s")
        since = self._busy_since
        if since is not None and time.monotonic() - since > limit_s:  # a disk that hangs, which nothing can cut short
            raise silent
        future: asyncio.Future[Any] = self._loop.create_future()
        self._work.put((work, turn, future))
        try:
            async with asyncio.timeout(limit_s):
                return await future
        except TimeoutError:
            self._database.hang_up()
            self._fail("it does not answer")
            raise silent from None

    def _run(self) -> None:
        lengthened = False
        while True:
            batch = [self._work.get()]
            while not self._work.empty():
                batch.append(self._work.get())
            if self._wants_room.is_set():
                self._wants_room.clear()
                self._database.make_room()
            # Who has stopped waiting is not served: what it wanted to write may be out of date by now.
            items = [item for item in batch if item is not None and not item[2].done()]
            for turn in _Turn:
                chosen = [(work, future) for work, its_turn, future in items if its_turn is turn]
                if not chosen:
                    continue
                start = self._busy_since = time.monotonic()
                results = self._commit([work for work, _ in chosen], reads=turn is _Turn.READS)
                self._busy_since = None
                self._metrics.store.observe(time.monotonic() - start)
                self._loop.call_soon_threadsafe(_resolve, [future for _, future in chosen], results)
                if turn is _Turn.WRITES and not lengthened:
                    lengthened = True
                    self._database.lengthen_log()
            if None in batch:
                return

    def _commit(self, works: list[Work[Any] | _Save], *, reads: bool) -> list[Any]:
        try:
            self._database.check()
            with self._database.engine.connect().execution_options(reads=reads) as connection, connection.begin():
                results = self._do_all(connection, works, alone=reads or len(works) == 1)
            self._database.check()  # what was written to a file that is gone is not kept
        except (LeaseLostError, exc.IntegrityError) as error:
            return [translate(error)] * len(works)
        except Exception as error:  # whatever it was, no work of this batch is on disk
            failure = translate(error)
            self._fail(str(failure))
            return [failure] * len(works)
        return results

    def _do_all(self, connection: sa.Connection, works: list[Work[Any] | _Save], *, alone: bool) -> list[Any]:
        """The result of each work, or its error; one that is alone may fail with all of the transaction."""

        def attempt(work: Work[Any]) -> Any:
            try:
                with contextlib.nullcontext() if alone else connection.begin_nested():
                    return work(connection)
            except (StoreError, exc.IntegrityError) as error:
                if alone:
                    raise
                return translate(error)

        saves = [work for work in works if isinstance(work, _Save)]
        saved = attempt(partial(self._save, saves=saves)) if saves else []
        if isinstance(saved, StoreError):  # what is stored of one of them is damaged
            saved = []
            for save in saves:
                found = attempt(partial(self._save, saves=[save]))
                saved += [found] if isinstance(found, StoreError) else found
        errors = iter(saved)
        return [next(errors) if isinstance(work, _Save) else attempt(work) for work in works]

    def _save(self, connection: sa.Connection, saves: list[_Save]) -> list[StoreError | None]:
        """Keep what jobs keep; for each None, or why not."""
        rows_here = connection.execute(self._mine, {"names": [s.name for s in saves]})
        versions = {row.name: row.version for row in rows_here}
        good = [s for s in saves if s.name in versions and (not s.plan or versions[s.name] < s.version)]
        for statement, rows in (
            (
                _kept_of,
                [{"of": s.name, "incarnation": s.incarnation, "version": s.version or versions[s.name]} for s in good],
            ),
            (_described, [{"of": s.name, "spec": s.spec} for s in good if s.spec is not None]),
            (_new_plan, [{"job": s.name, "version": s.version, "plan": s.plan} for s in good if s.plan]),
            # Versions of a job have no gaps, and begin at 1 or above.
            (
                _old_plans,
                [{"of": s.name, "last": s.version - self._kept} for s in good if s.plan and s.version > self._kept],
            ),
        ):
            if rows:
                connection.execute(statement, rows)
        lost = {s.name for s in saves} - {s.name for s in good}
        return [
            LeaseLostError(f"jobs/{s.name} is owned by another daemon, or was deleted") if s.name in lost else None
            for s in saves
        ]

    def _fail(self, text: str) -> None:
        self._failure = text
        self._metrics.store_errors.inc()


def _job_row(row: sa.RowMapping) -> JobRow:
    return JobRow(**{**row, "spec": _bytes(row["spec"])})


def _bytes(value: Any) -> bytes:
    """The bytes of a column; SQLite would keep a text in it too, which is left to be refused as no message."""
    return value.encode() if isinstance(value, str) else bytes(value)


def _resolve(futures: list[asyncio.Future[Any]], results: list[Any]) -> None:
    for future, result in zip(futures, results, strict=True):
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
