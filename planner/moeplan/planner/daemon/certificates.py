"""The server's certificate: checked before it is used, read again when its files change, and watched for its end."""

from __future__ import annotations

import ssl
import time
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog

from moeplan.planner.daemon.settings import Security

__all__ = ["Certificates", "expiry"]

WARN_S = 14 * 86_400.0
"""Time before the end of a certificate from which the log warns of it, once a day."""

log = structlog.get_logger()


class Certificates:
    """The server's certificate, and the authorities that must have signed its clients'.

    Raises:
        ValueError: the files cannot be used; the message says which and why.
        OSError: a file cannot be read.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._warned_s = -WARN_S
        self._shown: grpc.ServerCertificateConfiguration | None = None
        self.reload()
        assert self._shown is not None
        # Asked at every handshake, in a thread of gRPC's: connections that are open keep what they began with.
        self.credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._shown, lambda: self._shown, require_client_authentication=client_ca is not None
        )

    @classmethod
    def of(cls, security: Security) -> Certificates | None:
        """Those of the settings; None without TLS."""
        if security.certificate is None or security.key is None:
            return None
        return cls(security.certificate, security.key, security.client_ca)

    @property
    def files(self) -> list[Path]:
        """The files that they are read from."""
        return [path for path in (self._certificate, self._key, self._client_ca) if path is not None]

    def reload(self) -> None:
        """Read the files again; those in use stay where that fails."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._certificate, self._key)
        except ssl.SSLError as error:
            raise ValueError(
                f"security.certificate = {self._certificate} and security.key = {self._key} cannot be used together "
                f"({error.reason or error}); give a PEM certificate and its own PEM key, without a passphrase"
            ) from None
        if self._client_ca is not None:
            try:
                context.load_verify_locations(self._client_ca)
            except ssl.SSLError as error:
                raise ValueError(
                    f"security.client_ca = {self._client_ca} holds no certificate ({error.reason or error}); "
                    "give a PEM file of those that sign clients' certificates"
                ) from None
        self.expires = expiry(self._certificate.read_text())
        self._shown = grpc.ssl_server_certificate_configuration(
            [(self._key.read_bytes(), self._certificate.read_bytes())],
            None if self._client_ca is None else self._client_ca.read_bytes(),
        )

    def warn(self) -> None:
        """Say that the end of the certificate is near, once a day."""
        left_s = (self.expires - datetime.now(UTC)).total_seconds()
        if left_s < WARN_S and time.monotonic() - self._warned_s >= 86_400:
            self._warned_s = time.monotonic()
            log.warning(
                "certificate ends soon" if left_s > 0 else "certificate has ended",
                file=str(self._certificate),
                end=self.expires.isoformat(),
                do="replace the file; it is read again by itself",
            )


def expiry(pem: str) -> datetime:
    """When the first certificate of a PEM file ends.

    Raises:
        ValueError: there is none.
    """
    from cryptography import x509  # only where there are certificates: start-up waits for it otherwise

    return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc
