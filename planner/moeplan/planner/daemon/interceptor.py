"""The interceptor of every call: authentication, metrics, and errors as statuses."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from moeplan.planner.daemon.audit import audit
from moeplan.planner.daemon.database import StoreError, StoreFullError
from moeplan.planner.daemon.metrics import Metrics
from moeplan.planner.daemon.statuses import RefusalError, exhausted, invalid, refusal_of, unavailable
from moeplan.planner.daemon.store import LeaseLostError
from moeplan.planner.daemon.tenants import ANYONE, CALLER, NOBODY, Caller, Role, Tenant, Tenants, may
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["Gate", "refusal_for"]

OPEN = "/grpc.health.v1.Health/"
"""Probes carry no token."""

READS = {"GetJob", "ListJobs", "GetPlan", "WatchPlans", "ListPolicies"}
"""Methods that change nothing and cost little; all others need more than the role to read."""

CHANGES = {"CreateJob": "job_id", "DeleteJob": "name", "MoveJob": "name", "Drain": ""}
"""Methods that change something, with the field that names it."""

PROBES = 16
"""Probes whose request is read at a time: anyone may send one, of any size up to the limit."""

PROBE_S = 5.0
"""Longest that reading one may take."""

UNREADABLE = object()
"""In place of a request that is no message."""

log = structlog.get_logger()


def _role_of(method: str) -> Role:
    service, _, name = method.strip("/").partition("/")
    if not service.startswith("moeplan.") or name in READS:
        return Role.READ
    return Role.ADMIN if service == "moeplan.v1.AdminService" else Role.RUN


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Finds out who calls and whether that may, counts calls, and turns errors into statuses.

    Unexpected errors say no more than an id.
    """

    def __init__(self, metrics: Metrics, tenants: Tenants) -> None:
        self._metrics, self._tenants = metrics, tenants
        self._reading = asyncio.Semaphore(PROBES)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a call. Nothing of a request is read before its token is known to be good."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None:
            return None
        if method.startswith(OPEN):
            return self._probe(handler) if self._tenants.asks else handler
        known, refusal = self._known(dict(handler_call_details.invocation_metadata or ()), method)
        if refusal is not None:
            return self._refusing(method, refusal, known or NOBODY)
        codecs = {
            "request_deserializer": _reader(handler),
            "response_serializer": _writer(handler),
        }
        if handler.response_streaming:
            behavior: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
                with _Call(self._metrics, method) as call:
                    try:
                        self._identify(known, method, context)
                        async for response in behavior(_read(request), context):
                            yield response
                    except Exception as error:
                        await call.end(error, context)

            make: Any = grpc.stream_stream_rpc_method_handler
            if not handler.request_streaming:
                make = grpc.unary_stream_rpc_method_handler
            wrapped: grpc.RpcMethodHandler[Any, Any] = make(stream, **codecs)
            return wrapped
        unary: Any = handler.unary_unary

        async def single(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with _Call(self._metrics, method) as call:
                start = time.perf_counter()
                try:
                    self._identify(known, method, context)
                    return await unary(_read(request), context)
                except Exception as error:
                    await call.end(error, context)
                finally:
                    self._metrics.handling.labels(method).observe(time.perf_counter() - start)
                    call.audit(request)

        return grpc.unary_unary_rpc_method_handler(single, **codecs)

    def _known(self, metadata: Mapping[str, str | bytes], method: str) -> tuple[Tenant | None, RefusalError | None]:
        """Who calls, and why it may not; None for someone with a certificate, which is known once its call has begun.

        Without a certificate that the authorities signed, nobody gets as far as this.
        """
        if not self._tenants.asks:
            return ANYONE, None
        tenant = self._tenants.with_token(metadata.get("authorization", ""))
        if tenant is None:
            return None, None if self._tenants.by_certificate else _unknown()
        return tenant, may(tenant, _role_of(method), method)

    def _identify(self, known: Tenant | None, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Say who calls to all that the call does, and raise RefusalError if it may not."""
        names = context.auth_context() or {}
        tenant = known or self._tenants.with_certificate(names)
        if tenant is None:
            raise _unknown()
        shown = next(iter(names.get("x509_common_name", ())), b"")
        if tenant is ANYONE and shown:
            tenant = ANYONE.model_copy(update={"name": shown.decode("utf-8", "replace")})
        CALLER.set(Caller(tenant, str(context.peer())))
        refusal = may(tenant, _role_of(method), method)
        if refusal is not None:
            raise refusal

    def _refusing(self, method: str, refusal: RefusalError, tenant: Tenant) -> grpc.RpcMethodHandler[Any, Any]:
        """Refuses any kind of call: to the handler all look like streams, and a stream is read only by who asks."""

        async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with _Call(self._metrics, method) as call:
                CALLER.set(Caller(tenant, str(context.peer())))
                call.audit(None, refusal.code)
                await call.end(refusal, context)
            yield

        wrapped: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)
        return wrapped

    def _probe(self, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """Reads the request of a probe when it is its turn."""

        async def read(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                async with asyncio.timeout(PROBE_S), self._reading:
                    return await anext(aiter(requests))
            except (TimeoutError, StopAsyncIteration):
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no request within {PROBE_S} s")

        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary is not None:
            check: Any = handler.unary_unary

            async def single(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                return await check(await read(requests, context), context)

            return grpc.stream_unary_rpc_method_handler(single, **codecs)
        watch: Any = handler.unary_stream

        async def stream(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await watch(await read(requests, context), context)  # it writes its answers by itself

        wrapped: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(stream, **codecs)
        return wrapped


class _Call:
    """Counts one call."""

    def __init__(self, metrics: Metrics, method: str) -> None:
        self._metrics, self._method = metrics, method
        self._code = grpc.StatusCode.OK

    def __enter__(self) -> _Call:
        self._metrics.started.labels(self._method).inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (asyncio.CancelledError, GeneratorExit)):
            self._code = grpc.StatusCode.CANCELLED
        self._metrics.handled.labels(self._method, self._code.name).inc()

    def audit(self, request: Any, code: grpc.StatusCode | None = None) -> None:
        """Write down a change, or that it was refused before anything of it was read."""
        name = self._method.rpartition("/")[2]
        if name in CHANGES:
            resource = str(getattr(request, CHANGES[name], ""))
            audit(name, resource, (code or self._code).name)

    async def end(self, error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """End the call with the status of an error."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        refusal = refusal_for(error, self._method)
        self._code = refusal.code
        log.info("call refused", method=self._method, code=refusal.code.name, message=refusal.message)
        await context.abort_with_status(refusal.status())


def _reader(handler: grpc.RpcMethodHandler[Any, Any]) -> Callable[[bytes], Any]:
    """Reads a request. One that is no message refuses the call: where it is one of a stream, to who reads on there.

    A single one says `UNREADABLE`, as an exception before the call begins would end it with UNKNOWN and no word of why.
    """
    deserialize: Any = handler.request_deserializer

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            if handler.request_streaming:
                raise _no_message() from None
            return UNREADABLE

    return read


def _writer(handler: grpc.RpcMethodHandler[Any, Any]) -> Callable[[Any], bytes]:
    """Writes a response; one that goes to many streams is written already."""
    serialize: Any = handler.response_serializer
    return lambda response: response if isinstance(response, bytes) else serialize(response)


def _read(request: Any) -> Any:
    if request is UNREADABLE:
        raise _no_message()
    return request


def _no_message() -> RefusalError:
    return invalid("request", "bytes", "is no message of this method; see proto/moeplan/v1")


def _unknown() -> RefusalError:
    return RefusalError(
        grpc.StatusCode.UNAUTHENTICATED,
        "no valid token: send the metadata `authorization: Bearer <token>` with one of the server's tokens, or use a "
        "certificate that it knows",
    )


def refusal_for(error: Exception, method: str) -> RefusalError:
    """The status of any error of a call; one that nothing foresaw is logged."""
    match error:
        case RefusalError():
            return error
        case ProblemError():
            return refusal_of(error)
        case StoreFullError():
            return exhausted("STORE_FULL", str(error), 30)
        case LeaseLostError():
            return unavailable("OWNED_ELSEWHERE", str(error), 1)
        case StoreError():
            return unavailable("STORE_FAILED", str(error), 5)
    identity = uuid.uuid4().hex[:12]
    log.error("call failed", method=method, id=identity, exc_info=error)
    return RefusalError(grpc.StatusCode.INTERNAL, f"a fault of the server; its log has the details under id {identity}")
