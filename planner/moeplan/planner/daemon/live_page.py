"""The live page: who may see it, and its answers over HTTP. The server of metrics carries it.

The front end is that of `moeplan view`; a job's document comes as a stream of server-sent events. The page is for
browsers on the daemon's own machine, or tunnelled to it: what it shows and the token that it asks for are never sent
over a network in the clear. It loads nothing from elsewhere, and other sites can neither frame nor read it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import structlog

from moeplan.planner.daemon.job_host import JobHost
from moeplan.planner.daemon.job_table import JobTable
from moeplan.planner.daemon.live_history import JobHistory
from moeplan.planner.daemon.statuses import RefusalError
from moeplan.planner.daemon.tenants import ANYONE, Tenant, Tenants
from moeplan.planner.daemon.workers.pool import Workers
from moeplan.planner.pages.frame import SCRIPTS, STYLE, front_end_file, live_page
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["LivePage", "Request", "Response"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
COOKIE = "moeplan_session"
SESSIONS = 256
"""Most that are kept; the oldest go."""

SESSION_S = 12 * 3_600
STREAMS = 32
"""Streams of all browsers together."""

STREAM_S = 60.0
"""Life of one; the browser opens the next by itself."""

PERIOD_S = 1.0
CHUNK_STEPS = 16

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Request:
    """A request.

    Attributes:
        method: GET, HEAD or POST.
        path: Without its query.
        headers: By lower-case name.
        body: Of a POST.
        peer: Address that it comes from.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    peer: str


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: a body, or events until the client has enough."""

    status: str
    kind: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: dict(HEADERS))
    events: AsyncIterator[bytes] | None = None


class LivePage:
    """The page of one daemon.

    Args:
        table: Its jobs.
        workers: Who counts loads.
        tenants: Who may look, and at which jobs.
    """

    def __init__(self, table: JobTable, workers: Workers, tenants: Tenants) -> None:
        self._table, self._workers, self._tenants = table, workers, tenants
        self._sessions: dict[str, tuple[float, str]] = {}
        self._histories: dict[str, JobHistory] = {}
        self._streams = 0

    def collect(self) -> None:
        """Bring the histories of all jobs up to date; called every half second."""
        hosts = {host.id: host for host in self._table.hosts}
        for identity in self._histories.keys() - hosts.keys():
            del self._histories[identity]
        for host in hosts.values():
            self._history(host).collect(host.job, len(hosts))

    def _history(self, host: JobHost) -> JobHistory:
        found = self._histories.get(host.id)
        if found is None or found.spec is not host.job.spec or found.incarnation != host.job.incarnation:
            found = self._histories[host.id] = JobHistory(host.job.spec, host.job.incarnation)
        return found

    def answer(self, request: Request) -> Response | None:
        """The answer; None for paths that are not the page's."""
        files = {f"/{name}": "text/javascript" for name in SCRIPTS} | {f"/{STYLE}": "text/css"}
        if not (
            request.path in files or request.path in ("/", "/session", "/jobs") or request.path.startswith("/jobs/")
        ):
            return None
        refusal = self._refusal(request)
        if refusal is not None:
            return _text("403 Forbidden", refusal)
        if request.path == "/session":
            return (
                self._sign_in(request) if request.method == "POST" else _text("405 Method Not Allowed", "POST a token")
            )
        if request.method == "POST":
            return _text("405 Method Not Allowed", "GET")
        if request.path in files:
            return Response(
                "200 OK", f"{files[request.path]}; charset=utf-8", front_end_file(request.path[1:]).encode()
            )
        if request.path == "/":
            return Response("200 OK", "text/html; charset=utf-8", live_page().encode())
        tenant = self._tenant(request)
        if tenant is None:
            return _text("401 Unauthorized", "sign in with a token of the daemon")
        if request.path == "/jobs":
            return _json([self._summary(host) for host in self._table.hosts if tenant.owns(host.id)])
        identity, slash, tail = request.path.removeprefix("/jobs/").partition("/")
        host = self._table.owned(identity) if tenant.owns(identity) else None
        if host is None or (slash and tail != "stream") or not slash:
            return _text("404 Not Found", "no such job at this daemon")
        if self._streams >= STREAMS:
            return _text("503 Service Unavailable", f"{STREAMS} streams are open; close some pages")
        return Response("200 OK", "text/event-stream", events=self._events(host))

    def _refusal(self, request: Request) -> str | None:
        """Why a request is not answered at all: it is not from this machine, or another site's page sent it."""
        if not _loopback(request.peer):
            return (
                "the page answers on its own machine only: tunnel to it, for instance `ssh -L 7434:127.0.0.1:7434 HOST`"
            )
        if not self._tenants.asks and not _loopback(_host(request.headers.get("host", ""))):
            return "ask for localhost: without tokens, a name that leads here may be another site's"
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and request.path != "/":
            return "requests of other sites are not answered"
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            return "requests of other sites are not answered"
        return None

    def _sign_in(self, request: Request) -> Response:
        header = f"Bearer {request.body.decode('utf-8', 'replace').strip()}"
        if self._tenants.with_token(header) is None:
            return _text("401 Unauthorized", "that is no token of this daemon")
        now = time.monotonic()
        kept = [(key, value) for key, value in self._sessions.items() if value[0] > now]
        self._sessions = dict(kept[-SESSIONS + 1 :])
        session = secrets.token_urlsafe(32)
        self._sessions[session] = (now + SESSION_S, header)
        cookie = f"{COOKIE}={session}; Path=/; Max-Age={SESSION_S}; HttpOnly; SameSite=Strict"
        return Response("204 No Content", "text/plain", headers=HEADERS | {"Set-Cookie": cookie})

    def _tenant(self, request: Request) -> Tenant | None:
        """Who asks: by a session whose token is still good, or by a token, as programs send it."""
        if not self._tenants.asks:
            return ANYONE
        given = request.headers.get("authorization")
        if given is not None:
            return self._tenants.with_token(given)
        for part in request.headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == COOKIE:
                for session, (end, header) in self._sessions.items():
                    if hmac.compare_digest(session.encode(), value.encode()) and end > time.monotonic():
                        return self._tenants.with_token(header)
        return None

    def _summary(self, host: JobHost) -> dict[str, object]:
        job = host.job
        planned = [layer for layer in job.plan.layers if layer.imbalance is not None]
        return {
            "id": host.id,
            "layers": job.spec.layers,
            "experts": job.spec.experts,
            "devices": job.spec.cluster.devices,
            "ranks": job.spec.ranks,
            "connected": job.connected_ranks,
            "silent": job.silent_ranks,
            "step": job.closed_step,
            "policy": job.spec.policy,
            "incarnation": job.incarnation,
            "version": job.plan.version,
            "applied": job.applied_version,
            "reason": job.decision.reason.value,
            "decided_step": job.decision.step,
            "detail": job.decision.detail,
            "created": None if job.plan.created is None else job.plan.created.isoformat(),
            "imbalance": sum(layer.imbalance or 0 for layer in planned) / len(planned) if planned else None,
            "late": job.count.late + job.count.early,
        }

    async def _events(self, host: JobHost) -> AsyncIterator[bytes]:
        """A job's document, as it grows."""
        self._streams += 1
        try:
            end, sent, rows = time.monotonic() + STREAM_S, -1, -1
            history = self._history(host)
            yield _event("head", history.head(host.id))
            while time.monotonic() < end:
                if host.ended is not None or self._table.owned(host.id) is not host:
                    yield _event("ended", str(host.ended or "the job is no longer here"))
                    return
                if self._history(host) is not history:  # a later incarnation: the browser begins anew
                    return
                yield _event("status", self._summary(host))
                if history.version != rows:
                    rows = history.version
                    yield _event("plans", list(history.rows))
                try:
                    chunk = await history.chunk_after(sent, CHUNK_STEPS, self._workers)
                except (RefusalError, ProblemError, RuntimeError, MemoryError) as error:
                    log.warning("live page", job=host.name, error=str(error)[-500:])
                    chunk = None
                if chunk is not None:
                    steps = chunk["steps"]
                    assert isinstance(steps, list)
                    sent = steps[-1]
                    yield _event("chunk", chunk)
                    if len(steps) == CHUNK_STEPS:
                        continue
                await asyncio.sleep(PERIOD_S)
        finally:
            self._streams -= 1


def _event(name: str, value: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


def _json(value: object) -> Response:
    return Response("200 OK", "application/json", json.dumps(value).encode())


def _text(status: str, text: str) -> Response:
    return Response(status, "text/plain; charset=utf-8", f"{text}\n".encode())


def _host(header: str) -> str:
    return header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header


def _loopback(host: str) -> bool:
    if host.strip("[]").lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
