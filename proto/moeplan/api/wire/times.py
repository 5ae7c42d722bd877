"""Durations and times, to and from messages."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from moeplan.solvers.problem.errors import ProblemError

__all__ = ["read_duration", "read_seconds", "read_time", "write_duration", "write_time"]

NANOS = 10**9


def read_duration(name: str, message: Duration) -> float:
    """Seconds.

    Raises:
        ProblemError: the duration is not above 0.
    """
    seconds = read_seconds(message)
    if not seconds > 0:
        raise ProblemError(name, f"{seconds} s", "must be above 0, or absent")
    return seconds


def read_seconds(message: Duration) -> float:
    """Seconds, whatever their sign: those nearest to the message's."""
    return (message.seconds * NANOS + message.nanos) / NANOS


def write_duration(seconds: float) -> Duration:
    """The message of a number of seconds, to the nanosecond."""
    nanos = round(seconds * NANOS)
    return Duration(seconds=nanos // NANOS, nanos=nanos % NANOS)


def read_time(message: Timestamp) -> datetime:
    """A time in UTC, to the microsecond."""
    return message.ToDatetime(UTC)


def write_time(time: datetime) -> Timestamp:
    """The message of a time, which knows its zone."""
    message = Timestamp()
    message.FromDatetime(time)
    return message
