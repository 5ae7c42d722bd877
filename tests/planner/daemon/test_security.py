"""TLS, client certificates and tokens; and that no secret shows up in a log."""

from __future__ import annotations

import contextlib
import datetime
import signal
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.daemon import WAIT_S, DaemonProcess, Start, eventually, small_job

from moeplan.api.client import Client
from moeplan.api.connection import Security
from moeplan.api.errors import UnauthenticatedError, UnavailableError
from moeplan.planner.daemon.certificates import expiry

TOKEN, OTHER = "correct-horse-battery-staple", "incorrect-horse-battery-staple"
NOW = datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Authority:
    """Signs certificates into files."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        object.__setattr__(self, "_key", key)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        builder = self._builder(subject, subject, key.public_key(), NOW + datetime.timedelta(days=1))
        certificate = builder.add_extension(x509.BasicConstraints(True, None), True).sign(key, hashes.SHA256())
        object.__setattr__(self, "_subject", subject)
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    @property
    def path(self) -> Path:
        """The authority's own certificate."""
        return self.folder / f"{self.name}.pem"

    def issue(self, name: str, until: datetime.datetime = NOW + datetime.timedelta(days=1)) -> tuple[Path, Path]:
        """Files of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        builder = self._builder(subject, self._subject, key.public_key(), until).add_extension(names, False)  # type: ignore[attr-defined]
        certificate = builder.sign(self._key, hashes.SHA256())  # type: ignore[attr-defined]
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return paths

    @staticmethod
    def _builder(
        subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime.datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - datetime.timedelta(days=10))
            .not_valid_after(until)
        )


def test_tokens(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# a comment\n{TOKEN}\n")
    daemon = start("--tokens", str(file), "--log-level", "debug").serving(solver=False)
    for security in (Security(), Security(token=OTHER), Security(token=TOKEN[:-1])):
        with Client(daemon.address, security) as client:
            with pytest.raises(UnauthenticatedError, match="authorization"):
                client.policies()
            with pytest.raises(UnauthenticatedError):
                next(client.watch_plans("jobs/x"))
    with Client(daemon.address, Security(token=TOKEN)) as client:
        assert client.create_job("mine", small_job())
    with grpc.insecure_channel(daemon.address) as channel:  # a probe has no token
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status
    daemon.terminate()
    log = "".join(daemon.lines)
    assert TOKEN[:-1] not in log
    assert OTHER not in log
    assert TOKEN not in repr(Security(token=TOKEN))


def test_nothing_is_read_before_the_token(start: Start, tmp_path: Path) -> None:
    """Calls of the largest size, also packed small, from someone without a token, cost no memory; nor do probes.

    They queue behind a crowd of other calls to a daemon that stops for moments: a connection whose answers take long
    is not given more room.
    """
    file = tmp_path / "tokens"
    file.write_text(TOKEN)
    daemon = start("--tokens", str(file)).serving(solver=False)
    body = bytes(60 * 1024**2)

    def memory() -> int:
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024

    before = memory()
    with (
        grpc.insecure_channel(daemon.address, [("grpc.max_send_message_length", -1)]) as channel,
        grpc.insecure_channel(daemon.address, [("grpc.use_local_subchannel_pool", 1)]) as other,
    ):
        solve = "/moeplan.v1.SolverService/Solve"
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(solve)
        small: grpc.UnaryUnaryMultiCallable[bytes, bytes] = other.unary_unary(solve)
        for compression in [grpc.Compression.NoCompression] * 5 + [grpc.Compression.Gzip]:
            calls = [small.future(b"", timeout=WAIT_S) for _ in range(800)]
            calls += [method.future(body, timeout=WAIT_S, compression=compression) for _ in range(2)]
            while not all(call.done() for call in calls):
                daemon.process.send_signal(signal.SIGSTOP)
                time.sleep(0.1)
                daemon.process.send_signal(signal.SIGCONT)
                time.sleep(0.05)
            assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
        assert memory() < before + 60
        silent: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary("/grpc.health.v1.Health/Check")
        waiting = [silent.future((b"" for _ in iter(threading.Event().wait, False)), timeout=WAIT_S) for _ in range(20)]
        health = health_pb2_grpc.HealthStub(channel)

        def healthy() -> bool:
            try:
                return bool(health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status)
            except grpc.RpcError:  # on a busy machine it may come too late, as the silent ones do
                return False

        assert eventually(healthy)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status
        watch.cancel()
        for call in waiting:
            call.cancel()


def threads_of(daemon: DaemonProcess) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir()))


def test_slow_scrapes_hold_up_nobody(start: Start) -> None:
    """Connections to the metrics that say nothing, or say it slowly, are closed; others get their answer."""
    daemon = start().serving(solver=False)
    host, _, port = daemon.metrics.rpartition(":")
    assert daemon.metric("moeplan_event_loop_lag_seconds") >= 0  # starts the thread that encodes, one for all
    threads = threads_of(daemon)
    silent = [socket.create_connection((host, int(port)), timeout=WAIT_S) for _ in range(40)]
    for connection in silent:
        with contextlib.suppress(OSError):
            connection.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
    # Others of the daemon's may begin meanwhile, but none for a connection.
    assert threads_of(daemon) < threads + len(silent) / 2
    for connection in silent:
        with contextlib.suppress(OSError):
            assert connection.recv(1) == b""
        connection.close()
    assert daemon.metric("moeplan_event_loop_lag_seconds") >= 0
    assert daemon.metric('moeplan_streams{kind="rank"}') == 0
    assert threads_of(daemon) < threads + len(silent) / 2
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{daemon.metrics}/other", timeout=WAIT_S)


def test_mutual_tls(start: Start, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    certificate, key = ours.issue("server")
    daemon = start(
        "--listen", "0.0.0.0:0", "--certificate", str(certificate), "--key", str(key), "--client-ca", str(ours.path)
    ).serving(solver=False)
    address = f"127.0.0.1:{daemon.address.rpartition(':')[2]}"
    good = ours.issue("client")
    expired = ours.issue("expired", NOW - datetime.timedelta(days=1))
    foreign = theirs.issue("foreign")
    with Client(address, Security(None, ours.path, *good)) as client:
        assert client.policies()
    for security in (
        Security(None, ours.path, *expired),
        Security(None, ours.path, *foreign),
        Security(None, ours.path),  # no certificate
        Security(None, theirs.path, *good),  # does not trust the server
        Security(),  # no TLS
    ):
        told = pytest.raises(UnavailableError, match=f"{address}.*ca, certificate and key")
        with Client(address, security, timeout_s=5) as client, told:
            client.policies()
    with Client(address, Security(None, ours.path, *good)) as client:
        assert client.policies()
    daemon.terminate()
    assert "PRIVATE KEY" not in "".join(daemon.lines)


@pytest.mark.parametrize("by_signal", [False, True])
def test_certificates_and_tokens_are_read_again(start: Start, tmp_path: Path, by_signal: bool) -> None:
    """By themselves when a file changes, or at SIGHUP; open connections stay, and a broken file changes nothing."""
    ours = Authority(tmp_path, "ours")
    certificate, key = ours.issue("server", NOW + datetime.timedelta(days=5))
    file = tmp_path / "tokens"
    file.write_text(TOKEN)
    options = ("--certificate", str(certificate), "--key", str(key), "--tokens", str(file))
    daemon = start("--listen", "127.0.0.1:0", *options).serving(solver=False)
    eventually(lambda: daemon.events("certificate ends soon"))
    with (
        Client(daemon.address, Security(TOKEN, ours.path)) as client,
        Client(daemon.address, Security(OTHER, ours.path)) as other,
    ):
        assert client.policies()
        key.write_text("rubbish")
        eventually(lambda: daemon.events("certificates and tokens not reloaded"))
        assert client.policies()
        before = daemon.metric("moeplan_certificate_end_seconds")
        file.write_text(f"{OTHER}\n{TOKEN}\n")
        ours.issue("server", NOW + datetime.timedelta(days=90))
        if by_signal:
            daemon.process.send_signal(signal.SIGHUP)
        eventually(lambda: daemon.metric("moeplan_certificate_end_seconds") > before)
        assert eventually(lambda: daemon.events("certificates and tokens reloaded"))
        assert other.policies()
        assert client.policies()
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    found = ssl.get_server_certificate((daemon.address.rpartition(":")[0], int(daemon.address.rpartition(":")[2])))
    assert x509.load_pem_x509_certificate(found.encode()).serial_number == loaded.serial_number
    assert daemon.terminate() == 0


def test_certificates_that_cannot_be_used_are_said(start: Start, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    certificate, key = ours.issue("server")
    other = theirs.issue("other")[1]
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("rubbish")
    for chosen in ((certificate, other, None), (rubbish, key, None), (certificate, key, rubbish)):
        options = ["--certificate", str(chosen[0]), "--key", str(chosen[1])]
        options += ["--client-ca", str(chosen[2])] if chosen[2] else []
        status, output = start(*options).end()
        assert status == 1
        assert len(output.strip().splitlines()) == 1
        assert "security.client_ca" in output if chosen[2] else "cannot be used together" in output


def test_the_end_of_a_certificate_is_read(tmp_path: Path) -> None:
    for days in (1, 20_000):  # before and after 2050, which certificates write differently
        until = NOW + datetime.timedelta(days=days)
        certificate, _ = Authority(tmp_path, "ours").issue("server", until)
        assert expiry(certificate.read_text()) == until.replace(microsecond=0)


def test_other_machines_need_tls_and_a_secret(start: Start, tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path, "ours").issue("server")
    tls = ("--certificate", str(certificate), "--key", str(key))
    for options, text in (((), "security.certificate"), (tls, "security.tokens")):
        status, output = start("--listen", "0.0.0.0:0", *options).end()
        assert status == 2
        assert text in output
        assert "--insecure" in output
    start("--listen", "0.0.0.0:0", "--insecure").serving(solver=False)


@pytest.mark.parametrize("content", ["", "# only a comment\n", "short\n"])
def test_bad_token_files(start: Start, tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(content)
    status, output = start("--tokens", str(file)).end()
    assert status == 1
    assert str(file) in output
    assert "short" not in output.replace(str(file), "").replace("too short", "")
