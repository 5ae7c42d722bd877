"""Tenants: who may do what to which jobs, how much of it, and that it is written down."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.planner.daemon.test_security import Authority
from tests.support.daemon import WAIT_S, DaemonProcess, Rank, Start, eventually, small_job, small_problem

from moeplan.api import wire
from moeplan.api.client import Client
from moeplan.api.connection import Security
from moeplan.api.errors import ServiceError, UnauthenticatedError, UnavailableError
from moeplan.planner.daemon.tenants import Tenants
from moeplan.planner.daemon.workers.turns import Turns
from moeplan.solvers import Cluster, Demand, Problem, SolveParameters
from moeplan.v1 import solver_pb2


@dataclass(frozen=True)
class Waiting:
    """Something that waits."""

    caller: str
    size: int


NAMES = ("alpha", "beta", "looker", "operator")
TENANTS = """
[alpha]
prefix = "alpha-"
jobs = 2
streams = 1
memory_bytes = 50_000
token_sha256 = ["{alpha}"]

[beta]
prefix = "beta-"
solve_s = 0.000001
token_sha256 = ["{beta}"]

[looker]
role = "read"
token_sha256 = ["{looker}"]

[operator]
role = "admin"
token_sha256 = ["{operator}"]
"""


def token(name: str) -> str:
    """A tenant's token."""
    return f"the-token-of-{name}"


def digests(*names: str) -> dict[str, str]:
    """What the file has of tokens."""
    return {name: hashlib.sha256(token(name).encode()).hexdigest() for name in names}


def as_tenant(daemon: DaemonProcess, name: str) -> Client:
    """A tenant's client."""
    return Client(daemon.address, Security(token=token(name)), timeout_s=60)


def refused(call: Callable[[], object]) -> ServiceError:
    """What a call is refused with."""
    with pytest.raises(ServiceError) as caught:
        call()
    return caught.value


def test_roles_prefixes_quotas_and_the_audit(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(TENANTS.format(**digests(*NAMES)))
    daemon = start("--tenants", str(file)).serving()
    alpha, beta, looker, operator = (as_tenant(daemon, name) for name in NAMES)
    denied = grpc.StatusCode.PERMISSION_DENIED

    mine = alpha.create_job("alpha-1", small_job()).name
    beta.create_job("beta-1", small_job())
    assert "begins with alpha-" in refused(lambda: alpha.create_job("beta-2", small_job())).message
    for call in (
        lambda: beta.job(mine),
        lambda: beta.plan(f"{mine}/plans/-"),
        lambda: beta.delete_job(mine),
        lambda: next(beta.watch_plans(mine)),
        lambda: looker.create_job("alpha-9", small_job()),
        lambda: looker.delete_job(mine),
        lambda: looker.solve([small_problem()]),
    ):
        assert refused(call).code is denied
    assert Rank(beta, mine, 0, token=token("beta")).error().code is denied
    assert [job.name for job in alpha.jobs()] == ["jobs/alpha-1"]
    assert [job.name for job in looker.jobs()] == ["jobs/alpha-1", "jobs/beta-1"]
    assert looker.plan(f"{mine}/plans/-").version == 1
    with Client(daemon.address) as nobody, pytest.raises(UnauthenticatedError):
        nobody.job(mine)

    # Quotas: each is its tenant's own.
    rank = Rank(alpha, mine, 0, token=token("alpha"))
    rank.next("welcome")
    assert Rank(alpha, mine, 1, token=token("alpha")).error().reason == "TENANT_STREAMS"
    assert Rank(operator, mine, 1, token=token("operator")).next("welcome")
    rank.close()
    alpha.create_job("alpha-2", small_job())
    assert refused(lambda: alpha.create_job("alpha-3", small_job())).reason == "TENANT_JOBS"
    alpha.delete_job("jobs/alpha-2")
    assert refused(lambda: alpha.create_job("alpha-3", small_job(layers=200))).reason == "TENANT_MEMORY"
    beta.solve([small_problem()])
    late = refused(lambda: beta.solve([small_problem()]))
    assert isinstance(late, UnavailableError)
    assert late.reason == "SOLVE_SECONDS"
    alpha.solve([small_problem()])

    audit = [(event["who"], event["action"], event["resource"], event["result"]) for event in daemon.events("audit")]
    assert ("alpha", "CreateJob", "alpha-1", "OK") in audit
    assert ("alpha", "CreateJob", "beta-2", "PERMISSION_DENIED") in audit
    assert ("beta", "DeleteJob", "jobs/alpha-1", "PERMISSION_DENIED") in audit
    assert ("looker", "DeleteJob", "", "PERMISSION_DENIED") in audit  # its request was not even read
    assert ("alpha", "DeleteJob", "jobs/alpha-2", "OK") in audit
    assert all("127.0.0.1" in event["peer"] for event in daemon.events("audit"))
    assert not any(token(name) in line for name in NAMES for line in daemon.lines)

    # A file that changes holds at once; one that cannot be used changes nothing.
    file.write_text(TENANTS.format(**digests(*NAMES)).replace('"alpha-"', "-"))
    eventually(lambda: daemon.events("certificates and tokens not reloaded"))
    assert alpha.job(mine)
    file.write_text("\n".join(TENANTS.format(**digests(*NAMES)).split("\n[beta]")[:1]))
    eventually(lambda: daemon.events("certificates and tokens reloaded"))
    assert alpha.job(mine)
    with pytest.raises(UnauthenticatedError):
        beta.job("jobs/beta-1")
    for client in (alpha, beta, looker, operator):
        client.close()


def test_the_audit_is_written_at_any_level(start: Start, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    daemon = start("--listen", address, "--log-level", "error")
    eventually(lambda: Path(address.removeprefix("unix:")).exists())
    with Client(address, timeout_s=60) as client:
        client.create_job("mine", small_job())
    eventually(lambda: daemon.events("audit"))
    assert not daemon.events("serving")


def test_certificates_are_tenants(start: Start, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("server")
    file = tmp_path / "tenants.toml"
    file.write_text('[alpha]\nprefix = "alpha-"\ncertificates = ["alpha"]\n')
    options = ("--certificate", certificate, "--key", key, "--client-ca", authority.path, "--tenants", file)
    daemon = start(*(str(option) for option in options)).serving(solver=False)

    def client(name: str) -> Client:
        return Client(daemon.address, Security.from_files(None, authority.path, *authority.issue(name)), timeout_s=60)

    with client("alpha") as alpha:
        assert alpha.create_job("alpha-1", small_job())
        assert refused(lambda: alpha.create_job("other", small_job())).code is grpc.StatusCode.PERMISSION_DENIED
    with client("stranger") as stranger, pytest.raises(UnauthenticatedError):
        stranger.job("jobs/alpha-1")
    eventually(lambda: {event["who"] for event in daemon.events("audit")} == {"alpha"})  # its log is read beside this


def test_solves_that_wait_are_limited_in_bytes_and_shared_by_tenant(start: Start, tmp_path: Path) -> None:
    """Whoever has most waiting gives way, by bytes too: the queue holds no more than it may."""
    file = tmp_path / "tenants.toml"
    file.write_text(
        "".join(f'[{name}]\nprefix = "{name}-"\ntoken_sha256 = ["{digests(name)[name]}"]\n' for name in NAMES[:2])
    )
    daemon = start("--tenants", str(file), "--limit", "queue_bytes=300000").serving()
    # Perfect balance is out of reach, so a solve lasts until its deadline, however slowly the others come.
    popularity = (1 + np.arange(256)) ** -0.6
    tokens = np.random.default_rng(0).multinomial(70_000, popularity / popularity.sum(), size=144)
    request = solver_pb2.SolveRequest(
        problems=[wire.write_problem(Problem(Cluster.uniform(144, 2), Demand.of(tokens)))],
        parameters=wire.write_parameters(SolveParameters(deadline_s=3.0, work_limit=2**40)),
    )
    assert 100_000 < request.ByteSize() < 300_000
    ends: list[str] = []

    def solve() -> None:
        with as_tenant(daemon, "alpha") as client:
            try:
                client.solver.Solve(request, timeout=60, metadata=Security(token=token("alpha")).metadata)
            except grpc.RpcError as error:
                ends.append(str(error.details()))

    threads = [threading.Thread(target=solve) for _ in range(12)]
    for thread in threads:
        thread.start()
    eventually(lambda: any("queue_bytes" in end for end in ends))
    with as_tenant(daemon, "beta") as client:
        assert client.solve([small_problem()])
    for thread in threads:
        thread.join(WAIT_S)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no tenant"),
        ("[a]\n", "neither token_sha256 nor certificates"),
        ('[a]\ntoken_sha256 = ["x"]\n', "64 hexadecimal digits"),
        ('[a]\nrole = "boss"\ncertificates = ["a"]\n', "read, run, admin"),
        ('[a]\njobs = 1\ncertificates = ["a"]\n', "give prefix too"),
        ('[a]\nkind = 1\ncertificates = ["a"]\n', "kind"),
        ('[a]\ncertificates = ["x"]\n[b]\ncertificates = ["x"]\n', "a and b"),
        ("a = 1\n", "a table for each"),
        ("[a", "tenants.toml"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        _ = Tenants(file, None)


def test_turns_are_fair() -> None:
    """One of a hundred that a caller has waiting is followed by the other caller's only one."""
    turns: Turns[Waiting] = Turns()
    for number, caller in enumerate(itertools.chain(["a"] * 100, ["b"])):
        turns.add(Waiting(caller, number))
    assert [turns.take().caller for _ in range(3)] == ["a", "b", "a"]
