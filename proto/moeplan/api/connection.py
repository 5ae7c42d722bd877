"""Connections to a daemon: token, certificates, and the channels of every client and rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.scalars import short

__all__ = ["Security", "check_address", "open_aio_channel", "open_channel"]

LARGEST_MESSAGE = 2**31 - 1
LONGEST_DELAY_S = 15.0
"""Longest wait from one attempt to connect to the next."""
_POLICY = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 4, "initialBackoff": "0.1s",
"maxBackoff": "2s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}"""


@dataclass(frozen=True, slots=True)
class Security:
    """Credentials of a connection.

    Attributes:
        token: Bearer token.
        ca: PEM file of the authorities that sign servers' certificates. TLS is used if it is given.
        certificate: PEM file of the client's own certificate.
        key: PEM file of its key.
    """

    token: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def from_files(
        cls,
        token: Path | None = None,
        ca: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> Self:
        """The content of files: those given, and for the others those that the environment names.

        Args:
            token: File with the bearer token; MOEPLAN_TOKEN_FILE by default.
            ca: As the attribute; MOEPLAN_CA by default.
            certificate: As the attribute; MOEPLAN_CERTIFICATE by default.
            key: As the attribute; MOEPLAN_KEY by default.

        Raises:
            OSError: the file with the token cannot be read.
        """
        file = token or _named("MOEPLAN_TOKEN_FILE")
        return cls(
            token=None if file is None else file.read_text().strip(),
            ca=ca or _named("MOEPLAN_CA"),
            certificate=certificate or _named("MOEPLAN_CERTIFICATE"),
            key=key or _named("MOEPLAN_KEY"),
        )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Headers of each call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Of the channel; None without TLS.

        Raises:
            OSError: a file cannot be read.
        """
        if self.ca is None:
            return None
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(),
            self.key.read_bytes() if self.key else None,
            self.certificate.read_bytes() if self.certificate else None,
        )

    def __repr__(self) -> str:
        return f"Security(token={'...' if self.token else None}, ca={self.ca}, certificate={self.certificate})"


def _named(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None


def open_channel(address: str, security: Security, *, retries: bool = True) -> grpc.Channel:
    """A channel to a daemon.

    Args:
        address: host:port or unix:path.
        security: Certificates.
        retries: Whether calls that found no daemon are tried again; every method may be called twice.

    Raises:
        ProblemError: the address is not of that form.
        OSError: a certificate cannot be read.
    """
    check_address(address)
    credentials, options = security.credentials(), _options(retries)
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)


def open_aio_channel(address: str, security: Security) -> grpc.aio.Channel:
    """The same for asyncio, with retries."""
    check_address(address)
    credentials, options = security.credentials(), _options(retries=True)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials, options)


def check_address(address: str) -> None:
    """Refuse what gRPC would take for port 443, and addresses of web pages, which it would look for for ever.

    Raises:
        ProblemError: it is such.
    """
    if not isinstance(address, str) or ":" not in address or address.startswith(("http:", "https:")):
        raise ProblemError("address", short(address), "must be 'host:port' or 'unix:path'")


def _options(retries: bool) -> list[tuple[str, Any]]:
    """Retries, pings that find a dead server, and messages of any size."""
    return [
        ("grpc.max_receive_message_length", LARGEST_MESSAGE),
        ("grpc.max_send_message_length", LARGEST_MESSAGE),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_reconnect_backoff_ms", int(LONGEST_DELAY_S * 1e3)),
        ("grpc.service_config", _POLICY) if retries else ("grpc.enable_retries", 0),
    ]
