"""Settings that cannot work are refused with a line that says what to write instead; defaults suit the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tests.support.daemon import Start, eventually

from moeplan.planner.daemon.processors import processors
from moeplan.planner.daemon.settings import Settings


@pytest.mark.parametrize(
    ("options", "environment", "text"),
    [
        (["--store", "nonsense"], {}, "write postgresql://user@host/name"),
        (["--store", "nonsense://host/name"], {}, "write postgresql://user@host/name"),
        (["--store", "mysql://host/name"], {}, "write postgresql://user@host/name"),
        (["--store", "sqlite:///planner.db"], {}, "leave it empty for SQLite in --data"),
        (["--data", ""], {}, "data: is empty; give a folder"),
        (["--listen", "unix:"], {}, "listen = unix: has no path; write unix:path"),
        (["--metrics", "none"], {}, "or an empty one for no metrics"),
        (["--config", sys.executable], {}, "is no text file; give a TOML file in UTF-8"),
        (["--tokens", sys.executable], {}, "is no text file; give one in UTF-8"),
        (["--tenants", sys.executable], {}, "is no text file; give one in UTF-8"),
        ([], {"MOEPLAN_LEASE_S": "inf"}, "lease_s: Input should be less than or equal to 3600"),
        ([], {"MOEPLAN_LEASE_S": "nan"}, "lease_s: "),
        ([], {"MOEPLAN_DRAIN_S": "inf"}, "drain_s: "),
        (["--limit", "solve_s=inf"], {}, "limits.solve_s: "),
        (
            [],
            {"MOEPLAN_LISTNE": "127.0.0.1:0"},
            "MOEPLAN_LISTNE is set, but is no setting: did you mean MOEPLAN_LISTEN?",
        ),
        ([], {"MOEPLAN_LIMITS_JOBS": "3"}, "did you mean MOEPLAN_LIMITS__JOBS?"),
        (["--tokens", "/nowhere/tokens"], {}, "/nowhere/tokens is no file that can be read"),
        (["--certificate", "/tmp", "--key", "/tmp"], {}, "/tmp is no file that can be read"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    start: Start, options: list[str], environment: dict[str, str], text: str
) -> None:
    status, output = start(*options, environment=environment).end()
    assert status in (1, 2)
    assert text in output
    assert "Traceback" not in output
    assert all(line.startswith("moeplan: ") for line in output.splitlines())


def test_variables_that_kubernetes_sets_are_no_settings(start: Start) -> None:
    names = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_7433_TCP_ADDR")
    start(environment={f"MOEPLAN_{name}": "tcp://10.0.0.1:7433" for name in names}).serving(solver=False)


def test_the_start_says_what_runs(start: Start) -> None:
    (event,) = start("--limit", "jobs=7").serving(solver=False).events("serving")
    assert event["version"]
    assert event["store"].startswith("sqlite:")
    assert event["limits"]["jobs"] == 7
    assert (event["tls"], event["tokens"], event["client_certificates"], event["workers"]) == (False, False, False, 1)


@pytest.mark.parametrize("event", ["started", "serving", "workers ready"])
def test_sigterm_drains_at_any_point_of_the_start(start: Start, event: str) -> None:
    daemon = start("--log-level", "debug")
    eventually(lambda: daemon.events(event))
    assert daemon.terminate() == 0
    assert daemon.events("stopped")


def test_free_solves_have_two_workers_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is kept for jobs; on many processors one is left to the daemon itself."""
    for count, expected in ((1, 3), (2, 3), (4, 3), (16, 15)):
        monkeypatch.setattr("moeplan.planner.daemon.settings.processors", lambda count=count: count)
        assert Settings().workers == expected


def test_processors_are_those_of_the_container(tmp_path: Path) -> None:
    groups, membership = tmp_path / "groups", tmp_path / "cgroup"
    inner = groups / "pod" / "container"
    inner.mkdir(parents=True)
    here = len(os.sched_getaffinity(0))
    membership.write_text("0::/pod/container\n")
    assert processors(groups, membership) == here
    for quota, expected in (("max 100000", here), ("100000 100000", 1), ("50000 100000", 1), ("150000 100000", 1)):
        (groups / "pod" / "cpu.max").write_text(quota)
        assert processors(groups, membership) == min(here, expected)
    (groups / "pod" / "cpu.max").unlink()
    membership.write_text("4:cpu,cpuacct:/pod\n3:memory:/pod\n")  # version 1
    old = groups / "cpu,cpuacct" / "pod"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("100000")
    (old / "cpu.cfs_period_us").write_text("100000")
    assert processors(groups, membership) == 1
    assert processors(tmp_path / "none", tmp_path / "none") == here
