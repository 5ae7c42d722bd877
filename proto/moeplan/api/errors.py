"""Why a call has no answer.

ServiceError                  the call has no answer; `code` and `message` say why
├── InvalidRequestError       the request is wrong; `violations` name the fields. Do not repeat it
├── PreconditionError         the request does not fit the state, or no layout exists. Do not repeat it
├── NotFoundError             there is no such job or plan
├── AlreadyExistsError        someone else's job or rank has that name
├── UnauthenticatedError      no token, or a wrong one
├── UnavailableError          the server is away, full, or about to end: try again after `retry_s`
└── DeadlineError             the time was over
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

__all__ = [
    "AlreadyExistsError",
    "DeadlineError",
    "InvalidRequestError",
    "NotFoundError",
    "PreconditionError",
    "ServiceError",
    "UnauthenticatedError",
    "UnavailableError",
    "error_of",
]


class ServiceError(Exception):
    """A call without an answer.

    Attributes:
        code: gRPC status code.
        message: What the server says.
        reason: Machine-readable reason, for instance ``STALE_INCARNATION``; empty if there is none.
        metadata: More about the reason.
        violations: What is wrong with which field.
        retry_s: Seconds to wait before another attempt; None where the server does not say.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Mapping[str, str] | None = None,
        retry_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.reason = code, message, reason
        self.metadata, self.violations, self.retry_s = dict(metadata or {}), dict(violations or {}), retry_s


class InvalidRequestError(ServiceError):
    """The request is wrong."""


class PreconditionError(ServiceError):
    """The request does not fit the state, or no layout exists."""


class NotFoundError(ServiceError):
    """There is no such job or plan."""


class AlreadyExistsError(ServiceError):
    """Someone else's job or rank has that name."""


class UnauthenticatedError(ServiceError):
    """No token, or a wrong one."""


class UnavailableError(ServiceError):
    """The server is away, full, or about to end."""


class DeadlineError(ServiceError):
    """The time was over."""


_ERRORS: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
}


def error_of(error: grpc.RpcError, address: str = "") -> ServiceError:
    """The error of a failed call, with the details that the server at `address` sent."""
    assert isinstance(error, (grpc.Call, grpc.aio.AioRpcError))
    code, reason, metadata, violations, retry_s = error.code(), "", {}, {}, None
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status()
        try:
            status.ParseFromString(value)
        except DecodeError:  # not a server of ours
            continue
        for detail in status.details:
            bad, info, retry = (
                error_details_pb2.BadRequest(),
                error_details_pb2.ErrorInfo(),
                error_details_pb2.RetryInfo(),
            )
            if detail.Unpack(bad):
                violations = {found.field: found.description for found in bad.field_violations}
            elif detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                retry_s = retry.retry_delay.ToTimedelta().total_seconds()
    message = error.details() or code.name
    if code is grpc.StatusCode.UNAVAILABLE and not reason:  # gRPC says so itself: a server gives a reason
        message = _no_answer(message, f" at {address}" if address else "")
    kind = _ERRORS.get(code, ServiceError)
    return kind(code, message, reason, metadata, violations, retry_s)


def _no_answer(cause: str, where: str) -> str:
    """The meaning of gRPC's `cause`, and what to do."""
    if not cause.startswith(("failed to connect", "errors resolving")):
        return f"the connection to the daemon{where} was lost: {cause}"
    cause = cause.rpartition("last error: ")[2]
    if "handshake" in cause:
        return f"no agreement on TLS with the daemon{where}; check ca, certificate and key ({cause})"
    if "closed" in cause or "reset" in cause:
        return (
            f"the daemon{where} hangs up; it may want TLS or a certificate that it knows: give ca, certificate and key"
        )
    return f"no daemon answers{where}; start one with `moeplan serve`"
