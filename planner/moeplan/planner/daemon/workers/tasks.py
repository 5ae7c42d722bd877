"""Tasks that the daemon gives to its worker processes, and how their failures come back."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import NoReturn

from moeplan.solvers.problem.errors import InfeasibleError, ProblemError

__all__ = ["Limited", "failure", "raise_failure"]


@dataclass(frozen=True, slots=True)
class Limited:
    """A request as bytes, or a part of one.

    Attributes:
        request: The message.
        end: When it must be done (``time.monotonic``, which is one clock for all processes).
        first: Index of its first problem in the caller's request, for errors that name one.
    """

    request: bytes
    end: float
    first: int = 0


def failure(error: Exception) -> bytes:
    """An error of a task on its way to the daemon."""
    if isinstance(error, ProblemError):
        kind = "infeasible" if isinstance(error, InfeasibleError) else "problem"
        return pickle.dumps((kind, error.field, str(error.value)[:200], error.reason))
    kind = "memory" if isinstance(error, MemoryError) else "crash"
    return pickle.dumps((kind, "", "", "".join(traceback.format_exception(error))))


def raise_failure(payload: bytes) -> NoReturn:
    """Raise in the daemon what `failure` packed in a worker.

    Raises:
        ProblemError: the request cannot be solved; InfeasibleError where no layout exists.
        MemoryError: the worker's memory did not suffice.
        RuntimeError: the policy has a fault; the message is its traceback.
    """
    kind, field, value, reason = pickle.loads(payload)
    match kind:
        case "infeasible":
            raise InfeasibleError(field, value, reason)
        case "problem":
            raise ProblemError(field, value, reason)
        case "memory":
            raise MemoryError(reason)
    raise RuntimeError(reason)
