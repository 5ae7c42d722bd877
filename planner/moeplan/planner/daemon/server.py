"""The daemon: starts the parts, serves, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from importlib import metadata
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from moeplan.planner.daemon.admin_service import AdminService
from moeplan.planner.daemon.budgets import Budgets
from moeplan.planner.daemon.certificates import Certificates
from moeplan.planner.daemon.interceptor import Gate
from moeplan.planner.daemon.job_table import JobTable
from moeplan.planner.daemon.live_page import LivePage
from moeplan.planner.daemon.metrics import Metrics
from moeplan.planner.daemon.metrics_server import MetricsServer
from moeplan.planner.daemon.notify import notify
from moeplan.planner.daemon.planner_service import PlannerService
from moeplan.planner.daemon.settings import Settings
from moeplan.planner.daemon.solver_service import SolverService
from moeplan.planner.daemon.statuses import unavailable
from moeplan.planner.daemon.store import Store
from moeplan.planner.daemon.tenants import Tenants
from moeplan.planner.daemon.traces import Traces
from moeplan.planner.daemon.workers.pool import Workers
from moeplan.v1 import admin_pb2, admin_pb2_grpc, planner_pb2, planner_pb2_grpc, solver_pb2, solver_pb2_grpc

__all__ = ["Daemon", "StartError", "serve"]

PLANNER = planner_pb2.DESCRIPTOR.services_by_name["PlannerService"]
SOLVER = solver_pb2.DESCRIPTOR.services_by_name["SolverService"]

ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]

TICK_S = 0.5
"""Period in which metrics that are not events are brought up to date, and files looked at for changes."""

NO_WORKER_S = 5.0
"""Time without a worker after which the daemon says that it does not solve: one is replaced in less."""

WINDOW_BYTES = 4 * 1024**2
"""Bytes that a client may send on a stream before the daemon reads them."""

SWITCH_S = 0.000_2
"""Longest that the event loop keeps the store's thread from running. Python's own 5 ms would pass several times in the
writing of one plan, which needs the interpreter for many short moments."""

YOUNG_OBJECTS = 10_000
"""Objects after which Python looks for garbage by itself. With its own 700, and 1,024 streams, it would look through
what these hold open about once a second, for 5 to 10 ms, and mostly while a plan is sent, which makes objects; now and
then through everything, for 100 ms. Plans leave next to nothing that needs it, streams some kilobytes at their end."""

COLLECT_S = 300.0
"""Period in which everything is looked through all the same: a stall of 100 ms, which delays few plans so rarely."""

LAST_RESORT_S = 5.0
"""Time that the end may take beyond its drain."""

log = structlog.get_logger()


class StartError(Exception):
    """The daemon cannot start; the message says what to do."""


class Daemon:
    """One daemon. `start` it, then `stop` it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.address = ""
        self.metrics_address = ""
        self._server: grpc.aio.Server
        self._store: Store
        self._table: JobTable
        self._planner: PlannerService
        self._health = health.HealthServicer()
        self._scrapes: MetricsServer | None = None
        self._page: LivePage | None = None
        self._ready: dict[str, bool] = {}
        self._worker_seen_s = -NO_WORKER_S
        self._traces: Traces
        self._tenants: Tenants
        self._budgets: Budgets
        self.workers: Workers
        self._certificates: Certificates | None = None
        self._secrets: list[tuple[int, ...]] = []
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the store, take over its jobs, and serve.

        Raises:
            StartError: an address is taken, or a certificate or token file cannot be used.
            StoreError: the store cannot be used.
        """
        settings, limits = self.settings, self.settings.limits
        try:
            self._tenants = Tenants(settings.security.tenants, settings.security.tokens)
            self._certificates = Certificates.of(settings.security)
        except (OSError, ValueError) as error:
            raise StartError(str(error)) from None
        try:
            self._traces = Traces(settings.traces)
        except ModuleNotFoundError as error:
            raise StartError(
                f"traces = {settings.traces}: needs the package {error.name}; pip install 'moeplan[traces]'"
            ) from None
        self._secrets = self._stamps()
        self._budgets = Budgets(self._tenants)
        self.workers = Workers(settings.workers, limits, self.metrics, self._budgets)
        gate = Gate(self.metrics, self._tenants)
        self._server = grpc.aio.server(interceptors=(gate,), options=_options(limits.message_bytes))
        self._listen()
        owner = uuid.uuid4().hex
        address = settings.advertise or self.address
        self._store = Store(
            settings.store,
            settings.data,
            owner=owner,
            address=address,
            lease_s=settings.lease_s,
            kept=limits.kept_plans,
            metrics=self.metrics,
        )
        try:
            await self._store.open()
            self.workers.start()
            self._table = JobTable(settings, self._store, self.workers, self.metrics, self._traces, address)
            await self._table.start()
            security = settings.security
            if settings.page and settings.metrics and (security.tokens is not None or security.client_ca is None):
                self._page = LivePage(self._table, self.workers, self._tenants)
            self._planner = PlannerService(self._table, self._store, self.metrics, limits, address)
            await self._serve()
        except BaseException:
            await self.workers.stop()
            await self._store.close()
            await self._server.stop(0)
            raise

    async def stop(self) -> None:
        """Refuse new calls, let those that run end within the drain time, and keep everything."""
        log.info("draining", seconds=self.settings.drain_s)
        notify("STOPPING=1")
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        self._planner.drain()
        await self._server.stop(self.settings.drain_s)
        await self._table.stop(unavailable("DRAINING", "the server is about to end; connect again", 0.5))
        await self.workers.stop()
        await self._store.close()
        if self._scrapes is not None:
            await self._scrapes.stop()
        await self._traces.stop()
        log.info("stopped")

    def reload(self) -> None:
        """Read all of them again, for connections and calls from now on; on failure the old ones stay."""
        self._secrets = self._stamps()
        try:
            if self._certificates is not None:
                self._certificates.reload()
            self._tenants.reload()
        except (OSError, ValueError) as error:
            log.error("certificates and tokens not reloaded", error=str(error))
        else:
            log.info("certificates and tokens reloaded")

    def _stamps(self) -> list[tuple[int, ...]]:
        """A value that changes when a certificate or token file is written or replaced."""
        files = [*(self._certificates.files if self._certificates else ()), *self._tenants.files]
        stamps: list[tuple[int, ...]] = []
        for path in files:
            try:
                found = path.stat()
                stamps.append((found.st_mtime_ns, found.st_ino, found.st_size))
            except OSError:
                stamps.append(())
        return stamps

    def _listen(self) -> None:
        listen = self.settings.listen
        if listen.startswith("unix:"):
            path = Path(listen.removeprefix("unix:"))
            if path.is_socket() and _answers(path):
                raise StartError(f"listen = {listen}: another daemon answers there; stop it, or choose another path")
        try:
            if self._certificates is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, self._certificates.credentials)
        except RuntimeError as error:
            raise StartError(f"listen = {listen}: {error}; stop who uses it, or choose another address") from None
        self.address = listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"

    async def _serve(self) -> None:
        solver = SolverService(self.workers, self.settings.limits, self._budgets)
        planner_pb2_grpc.add_PlannerServiceServicer_to_server(self._planner, self._server)
        solver_pb2_grpc.add_SolverServiceServicer_to_server(solver, self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(self._table), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [PLANNER.full_name, SOLVER.full_name, ADMIN.full_name, "grpc.health.v1.Health"]
        if self.settings.reflection:
            reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], self._server)
        self.metrics.prepare(
            [
                f"/{service.full_name}/{method.name}"
                for service in (PLANNER, SOLVER, ADMIN)
                for method in service.methods
            ]
        )
        self.metrics.lease.set(self.settings.lease_s if self._store.shared else math.inf)
        await self._start_metrics()
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._show_health()
        loop = asyncio.get_running_loop()
        self._background = [loop.create_task(self._tick()), loop.create_task(self._solver_ready())]
        notify("READY=1")
        security = self.settings.security
        log.info(
            "serving",
            version=metadata.version("moeplan"),
            address=self.address,
            metrics=self.metrics_address,
            page=self._page is not None,
            store=self._store.shown,
            jobs=len(self._table.hosts),
            workers=self.settings.workers,
            tls=self._certificates is not None,
            client_certificates=security.client_ca is not None,
            tokens=security.tokens is not None,
            tenants=self._tenants.count,
            traces=self.settings.traces,
            limits=self.settings.limits.model_dump(),
        )

    async def _solver_ready(self) -> None:
        await self.workers.ready.wait()
        await self._show_health()
        log.info("workers ready", count=len(self.workers.pids))

    async def _tick(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_S)
            self.metrics.loop_lag.set(time.monotonic() - before - TICK_S)
            for host in self._table.hosts:
                host.count()
            self.metrics.stalled.set(sum(host.stalled for host in self._table.hosts))
            if self._page is not None:
                self._page.collect()
            await self._show_health()
            if self._stamps() != self._secrets:
                self.reload()
            if self._certificates is not None:
                self.metrics.certificate_end.set(self._certificates.expires.timestamp())
                self._certificates.warn()
            notify("WATCHDOG=1")

    async def _show_health(self) -> None:
        """Ready to plan while the store takes writes and leases are kept; ready to solve while there is a worker.

        The whole server, "", lives as long as it answers: to start it again would not mend the store.
        """
        if self.workers.pids:
            self._worker_seen_s = time.monotonic()
        solves = time.monotonic() - self._worker_seen_s < NO_WORKER_S
        states = {PLANNER.full_name: not self._table.failure, SOLVER.full_name: solves}
        for name, good in states.items():
            self.metrics.ready.labels(name).set(good)
            if self._ready.get(name) is good:
                continue
            if name in self._ready or good:
                level, event = (INFO, "ready") if good else (WARNING, "not ready")
                log.log(level, event, service=name, why=self._table.failure)
            self._ready[name] = good
            serving = health_pb2.HealthCheckResponse.SERVING if good else health_pb2.HealthCheckResponse.NOT_SERVING
            await self._health.set(name, serving)

    async def _start_metrics(self) -> None:
        if not self.settings.metrics:
            return
        host, _, port = self.settings.metrics.rpartition(":")
        try:
            self._scrapes = MetricsServer(self.metrics.registry, self._page)
            bound = await self._scrapes.start(host.strip("[]"), int(port))
        except (OSError, ValueError, OverflowError) as error:
            raise StartError(
                f"metrics = {self.settings.metrics}: {error}; choose another host:port, or an empty one for no metrics"
            ) from None
        self.metrics_address = f"{host}:{bound}"


async def serve(settings: Settings) -> None:
    """Run a daemon until SIGTERM or SIGINT.

    Raises:
        StartError: it cannot start.
        StoreError: its store cannot be used.
    """
    sys.setswitchinterval(SWITCH_S)
    daemon = Daemon(settings)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    # First of all: whoever is told that it serves, or sees it start, may ask it to end.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.debug("started")
    await daemon.start()
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    gc.collect()
    gc.freeze()  # modules and the like
    gc.set_threshold(YOUNG_OBJECTS)
    gc.enable()
    collecting = loop.create_task(_collect())
    await asked.wait()
    collecting.cancel()
    # If ending hangs, in native code for instance, the process ends all the same: what was acknowledged is on disk.
    watchdog = threading.Timer(settings.drain_s + LAST_RESORT_S, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
    await daemon.stop()
    watchdog.cancel()


async def _collect() -> None:
    while True:
        await asyncio.sleep(COLLECT_S)
        gc.collect()


def _options(message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        # Room for a whole request or burst before the first answer: HTTP/2's own 64 KiB cost larger ones a round trip.
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        # That room and no more, also where answers take long: otherwise a call that nobody reads may fill any memory.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.so_reuseport", 0),  # otherwise a second daemon would silently share the port
        # Ranks are idle between steps: let them ping, and find out about those that are gone.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.connect(str(path))
        return True
    return False
