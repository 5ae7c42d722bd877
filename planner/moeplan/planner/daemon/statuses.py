"""Errors as callers see them: a status code, a message that says what to do, and google.rpc details to act on."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from moeplan.api import wire
from moeplan.solvers.problem.errors import InfeasibleError, ProblemError

__all__ = [
    "DOMAIN",
    "RefusalError",
    "denied",
    "exhausted",
    "exists",
    "invalid",
    "missing",
    "precondition",
    "refusal_of",
    "unavailable",
]

DOMAIN = "moeplan"


class RefusalError(Exception):
    """A call that ends with a status.

    Attributes:
        code: Status code.
        message: For people.
        details: For programs.
    """

    def __init__(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        super().__init__(message)
        self.code = code
        self.message = message[:4_096]  # a status travels in headers, whose size is limited
        self.details = details

    def status(self) -> grpc.Status:
        """The status, with its details."""
        packed = []
        for detail in self.details:
            holder = any_pb2.Any()
            holder.Pack(detail)
            packed.append(holder)
        code = code_pb2.Code.Value(self.code.name)
        status: grpc.Status = rpc_status.to_status(status_pb2.Status(code=code, message=self.message, details=packed))
        return status


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=wire.write_duration(seconds))


def _info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def invalid(field: str, value: object, reason: str) -> RefusalError:
    """A field holds a value that is not allowed."""
    shown = str(value)[:200]
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=f"{shown}: {reason}"[:1_000])
    return RefusalError(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{field} = {shown}: {reason}",
        error_details_pb2.BadRequest(field_violations=[violation]),
    )


def missing(name: str, kind: str) -> RefusalError:
    """There is no such resource."""
    return RefusalError(
        grpc.StatusCode.NOT_FOUND,
        f"{name[:200]} does not exist",
        error_details_pb2.ResourceInfo(resource_type=kind, resource_name=name[:200]),
    )


def exists(name: str, reason: str, message: str) -> RefusalError:
    """Someone else's resource has that name."""
    resource = error_details_pb2.ResourceInfo(resource_type="moeplan.v1", resource_name=name)
    return RefusalError(grpc.StatusCode.ALREADY_EXISTS, message, resource, _info(reason))


def precondition(reason: str, message: str, **metadata: str) -> RefusalError:
    """The call does not fit the state, and repeating it does not help."""
    violation = error_details_pb2.PreconditionFailure.Violation(type=reason, description=message[:1_000])
    return RefusalError(
        grpc.StatusCode.FAILED_PRECONDITION,
        message,
        error_details_pb2.PreconditionFailure(violations=[violation]),
        _info(reason, **metadata),
    )


def denied(message: str) -> RefusalError:
    """Who calls is known, and may not do it."""
    return RefusalError(grpc.StatusCode.PERMISSION_DENIED, message, _info("DENIED"))


def exhausted(reason: str, message: str, retry_s: float) -> RefusalError:
    """A limit of the server is reached; try again later."""
    return RefusalError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, _retry(retry_s), _info(reason))


def unavailable(reason: str, message: str, retry_s: float, **metadata: str) -> RefusalError:
    """The server cannot do it now; try again."""
    return RefusalError(grpc.StatusCode.UNAVAILABLE, message, _retry(retry_s), _info(reason, **metadata))


def refusal_of(error: ProblemError) -> RefusalError:
    """The status of a refusal by the solvers."""
    if isinstance(error, InfeasibleError):
        return precondition("INFEASIBLE", str(error), field=error.field)
    return invalid(error.field, error.value, error.reason)
