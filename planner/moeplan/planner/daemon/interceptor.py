"""What every call passes: who it is, what became of it, and how its errors look outside."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import structlog

from moeplan.planner.daemon.database import StoreError, StoreFullError
from moeplan.planner.daemon.metrics import Metrics
from moeplan.planner.daemon.statuses import RefusalError, exhausted, refusal_of, unavailable
from moeplan.planner.daemon.store import LeaseLostError
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["Gate", "read_tokens"]

OPEN = "/grpc.health.v1.Health/"
"""Probes carry no token."""

PROBES = 16
"""Probes whose request is read at a time: anyone may send one, of any size up to the limit."""

PROBE_S = 5.0
"""Longest that reading one may take."""

log = structlog.get_logger()


def read_tokens(path: Path) -> tuple[bytes, ...]:
    """SHA-256 of each bearer token of a file: one a line, # begins a comment.

    Raises:
        ValueError: there is none, or one is too short to be a secret. The message holds no token.
    """
    digests = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if len(token) < 16:
            raise ValueError(f"{path}:{number}: a token must have at least 16 characters; try `openssl rand -hex 32`")
        digests.append(hashlib.sha256(token.encode()).digest())
    if not digests:
        raise ValueError(f"{path} holds no token; write one a line, for instance from `openssl rand -hex 32`")
    return tuple(digests)


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Checks tokens, counts calls, and turns errors into statuses; unexpected ones say no more than an id."""

    def __init__(self, metrics: Metrics, tokens: tuple[bytes, ...]) -> None:
        self._metrics, self.tokens = metrics, tokens
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
            return self._probe(handler) if self.tokens else handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        if not self.allowed(metadata.get("authorization", "")):
            return self._refusing(method)
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            behavior: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
                with _Call(self._metrics, method) as call:
                    try:
                        async for response in behavior(request, context):
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
                    return await unary(request, context)
                except Exception as error:
                    await call.end(error, context)
                finally:
                    self._metrics.handling.labels(method).observe(time.perf_counter() - start)

        return grpc.unary_unary_rpc_method_handler(single, **codecs)

    def _refusing(self, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        """Refuses any kind of call: to the handler all look like streams, and a stream is read only by who asks."""

        async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with _Call(self._metrics, method) as call:
                await call.end(
                    RefusalError(
                        grpc.StatusCode.UNAUTHENTICATED,
                        "no valid token: send the metadata `authorization: Bearer <token>` with one of the server's "
                        "tokens",
                    ),
                    context,
                )
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

    def allowed(self, header: str | bytes) -> bool:
        """Whether an ``authorization`` header holds a token that is known, or none is asked for."""
        if not self.tokens:
            return True
        text = header.decode("latin-1") if isinstance(header, bytes) else header
        kind, _, token = text.partition(" ")
        digest = hashlib.sha256(token.strip().encode()).digest()
        # Every token is compared, so that the time taken tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self.tokens]
        return kind.lower() == "bearer" and any(matches)


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

    async def end(self, error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """End the call with the status of an error."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        refusal = _refusal(error, self._method)
        self._code = refusal.code
        log.info("call refused", method=self._method, code=refusal.code.name, message=refusal.message)
        await context.abort_with_status(refusal.status())


def _refusal(error: Exception, method: str) -> RefusalError:
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
