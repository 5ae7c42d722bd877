"""The live page: what it shows of a job, whom it answers, and what another site can do with it: nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.daemon import WAIT_S, DaemonProcess, Rank, Start, eventually, small_job, tokens

from moeplan.api.client import Client
from moeplan.api.connection import Security
from moeplan.api.job_plans import Reason

TOKEN = "correct-horse-battery-staple"


def ask(daemon: DaemonProcess, path: str, method: str = "GET", body: str | None = None, **headers: str) -> HTTPResponse:
    """An answer, its body read."""
    connection = HTTPConnection(daemon.metrics, timeout=WAIT_S)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    answer.text = answer.read().decode()  # type: ignore[attr-defined]
    connection.close()
    return answer


def events(daemon: DaemonProcess, job: str) -> Iterator[tuple[str, Any]]:
    with urllib.request.urlopen(f"http://{daemon.metrics}/jobs/{job}/stream", timeout=WAIT_S) as stream:
        name = ""
        for line in stream:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)


def closed(client: Client, step: int) -> bool:
    return client.job("jobs/shown").status.closed_step == step


def unpacked(packed: Any) -> Any:
    return np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), packed["dtype"]).reshape(packed["shape"])


def test_a_job_is_shown_step_by_step_with_its_silent_ranks_and_decisions(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        client.create_job("shown", small_job())
        rank = Rank(client, "jobs/shown", 0, hello={"reports_for": [0, 1]})
        counts = [tokens(step, ranks=2) for step in range(12)]
        for step, count in enumerate(counts):
            rank.report(step, count)
            eventually(partial(closed, client, step))
        found: dict[int, Any] = {}
        reasons: set[str] = set()
        for name, value in events(daemon, "shown"):
            if name == "status":
                assert value["connected"] == 2
                assert value["silent"] == []
            elif name == "plans":
                reasons |= {row["reason"] for row in value}
            elif name == "chunk":
                demand, loads = unpacked(value["demand"]), [unpacked(s["loads"]) for s in value["strategies"]]
                for i, step in enumerate(value["steps"]):
                    found[step] = demand[i]
                    for strategy in loads:
                        np.testing.assert_array_equal(strategy[i].sum(axis=(1, 2)), demand[i].sum(axis=1))
            if 11 in found:
                break
        for step, demand in found.items():
            np.testing.assert_array_equal(demand, counts[step].sum(axis=1))
        assert reasons <= {reason.value for reason in Reason}
        rank.close()
        eventually(lambda: next(j for j in jobs(daemon) if j["id"] == "shown")["silent"] == [0, 1])


def jobs(daemon: DaemonProcess) -> Any:
    return json.loads(ask(daemon, "/jobs").text)  # type: ignore[attr-defined]


def test_the_page_loads_nothing_from_elsewhere_and_nobody_frames_it(daemon: DaemonProcess) -> None:
    answer = ask(daemon, "/")
    assert answer.status == 200
    policy = answer.headers["Content-Security-Policy"]
    for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "form-action 'none'"):
        assert part in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "moeplan_jobs_owned" in ask(daemon, "/metrics").text  # type: ignore[attr-defined]
    assert ask(daemon, "/jobs/no-such-job/stream").status == 404
    assert ask(daemon, "/jobs/..%2f..%2fetc/stream").status == 404
    assert ask(daemon, "/other").status == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example:7434"},  # a name that another site made lead here
    ],
)
def test_requests_of_other_sites_are_refused(daemon: DaemonProcess, headers: dict[str, str]) -> None:
    assert ask(daemon, "/jobs", **headers).status == 403


def test_a_token_is_entered_once_and_kept_where_scripts_cannot_read_it(start: Start, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    daemon = start("--tokens", str(tmp_path / "tokens")).serving(solver=False)
    assert ask(daemon, "/").status == 200  # the frame, which asks for the token
    for path in ("/jobs", "/jobs/any/stream"):
        assert ask(daemon, path).status == 401
        assert ask(daemon, path, Cookie="moeplan_session=guess").status == 401
        assert ask(daemon, path, Authorization="Bearer incorrect-horse-battery").status == 401
    assert ask(daemon, "/session", "POST", "wrong-horse-battery-staple").status == 401
    assert ask(daemon, "/session", "POST", TOKEN, Origin="https://evil.example").status == 403
    signed = ask(daemon, "/session", "POST", TOKEN, Origin=f"http://{daemon.metrics}")
    assert signed.status == 204
    cookie = signed.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    assert ask(daemon, "/jobs", Cookie=cookie.partition(";")[0]).status == 200
    assert ask(daemon, "/jobs", Authorization=f"Bearer {TOKEN}").status == 200
    (tmp_path / "tokens").write_text("another-horse-battery-staple\n")  # revoked: its sessions end too
    eventually(lambda: ask(daemon, "/jobs", Cookie=cookie.partition(";")[0]).status == 401)
    assert TOKEN not in "".join(daemon.lines)


def test_a_tenant_sees_the_jobs_of_its_prefix(start: Start, tmp_path: Path) -> None:
    names = ("alpha", "beta", "operator")
    tables = [
        f'[{name}]\ntoken_sha256 = ["{hashlib.sha256(f"{TOKEN}-{name}".encode()).hexdigest()}"]' for name in names
    ]
    tables[0] += '\nprefix = "alpha-"\nrole = "read"'
    tables[1] += '\nprefix = "beta-"'
    (tmp_path / "tenants.toml").write_text("\n".join(tables))
    daemon = start("--tenants", str(tmp_path / "tenants.toml")).serving(solver=False)
    with Client(daemon.address, Security(token=f"{TOKEN}-operator"), timeout_s=WAIT_S) as client:
        for name in ("alpha-1", "beta-1", "other"):
            client.create_job(name, small_job())
    seen = {"alpha": {"alpha-1"}, "beta": {"beta-1"}, "operator": {"alpha-1", "beta-1", "other"}}
    for name, expected in seen.items():
        signed = ask(daemon, "/session", "POST", f"{TOKEN}-{name}", Origin=f"http://{daemon.metrics}")
        cookie = signed.headers["Set-Cookie"].partition(";")[0]
        for headers in ({"Cookie": cookie}, {"Authorization": f"Bearer {TOKEN}-{name}"}):
            shown = json.loads(ask(daemon, "/jobs", **headers).text)  # type: ignore[attr-defined]
            assert {job["id"] for job in shown} == expected
            for hidden in {"alpha-1", "beta-1", "other"} - expected:
                refused, unknown = (ask(daemon, f"/jobs/{job}/stream", **headers) for job in (hidden, "unknown"))
                assert refused.status == 404
                assert refused.text == unknown.text  # type: ignore[attr-defined]


def test_the_page_can_be_left_out(start: Start) -> None:
    daemon = start("--no-page").serving(solver=False)
    assert "moeplan_jobs_owned" in ask(daemon, "/").text  # type: ignore[attr-defined]
    assert ask(daemon, "/jobs").status == 404


@pytest.mark.slow
def test_streams_are_few_and_give_their_place_back(start: Start) -> None:
    daemon = start().serving(solver=False)
    with daemon.client() as client:
        client.create_job("crowded", small_job())
    streams = [
        urllib.request.urlopen(f"http://{daemon.metrics}/jobs/crowded/stream", timeout=WAIT_S) for _ in range(32)
    ]
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"http://{daemon.metrics}/jobs/crowded/stream", timeout=WAIT_S)
    assert daemon.metric("moeplan_jobs_owned") == 1  # scrapes have places of their own
    for stream in streams:
        stream.close()
    eventually(lambda: ask(daemon, "/jobs").status == 200)

    def free() -> bool:
        try:
            urllib.request.urlopen(f"http://{daemon.metrics}/jobs/crowded/stream", timeout=WAIT_S).close()
        except urllib.error.HTTPError:
            return False
        return True

    eventually(free)
