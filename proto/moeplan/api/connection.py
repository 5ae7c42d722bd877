"""How to connect to a daemon: token, certificates, and the options of every channel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

__all__ = ["Security", "channel_options"]

LARGEST_MESSAGE = 2**31 - 1
_POLICY = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 4, "initialBackoff": "0.1s",
"maxBackoff": "2s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}"""


@dataclass(frozen=True, slots=True)
class Security:
    """How to connect.

    Attributes:
        token: Bearer token.
        ca: PEM file of those that may have signed the server's certificate. TLS is used if it is given.
        certificate: PEM file of the client's own certificate.
        key: PEM file of its key.
    """

    token: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is sent with each call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Of the channel; None without TLS."""
        if self.ca is None:
            return None
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(),
            self.key.read_bytes() if self.key else None,
            self.certificate.read_bytes() if self.certificate else None,
        )

    def __repr__(self) -> str:
        return f"Security(token={'...' if self.token else None}, ca={self.ca}, certificate={self.certificate})"


def channel_options() -> list[tuple[str, Any]]:
    """Options of a channel: retries of what is safe to retry (every method is), and pings that find a dead server."""
    return [
        ("grpc.max_receive_message_length", LARGEST_MESSAGE),
        ("grpc.max_send_message_length", LARGEST_MESSAGE),
        ("grpc.service_config", _POLICY),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
