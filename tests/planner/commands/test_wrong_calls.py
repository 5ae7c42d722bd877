"""Wrong calls of the command line: each is answered by one line that says what to write instead, and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.planner.commands.main import main

Call = Callable[..., str]

SIZES = ("--devices", 4, "--slots", 3)
PLAN = ("plan", "small.npz", *SIZES)
COMPARE = ("compare", "small.npz", *SIZES, "--policies", "static")
REPLAY = ("replay", "small.npz", *SIZES)
COUNTS = np.random.default_rng(0).integers(1, 99, (12, 2, 4, 8))


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the program in a folder with a small trace; the line that it says on standard error."""
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "small.npz", counts=COUNTS)

    def run(*arguments: object, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["moeplan", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert end.value.code == code, said.err
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert line.startswith("moeplan: ")
        return line.removeprefix("moeplan: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((*PLAN, "--slots", 1), "--slots = 4 slots: 8 experts need 4 more; add slots or devices"),
        ((*PLAN, "--devices", 0), "--devices = 0: must be 1 to 65536"),
        ((*PLAN, "--nodes", 9), "--nodes = 9: must be 1 to the number of devices (4)"),
        ((*PLAN, "--layers", "1-7"), "--layers = 1-7: must be within 0-1"),
        ((*PLAN, "--layers", "x"), "--layers = 'x': must look like 0,3-5"),
        ((*PLAN, "--failed", 99), "--failed = 99: must be within 0-3"),
        ((*PLAN, "--window", 0), "--window = 0: must be at least 1"),
        ((*PLAN, "--window", 5000), "--window = 5000: must be 1 to 4096"),
        ((*PLAN, "--until", 13), "--until = 13: must be 1 to 12, the number of steps of the trace"),
        ((*PLAN, "--seed", -1), "--seed = -1: must be 0 to 4294967295"),
        ((*PLAN, "--deadline-ms", 0), "--deadline-ms = 0.0: must be above 0; leave it out for no limit"),
        ((*PLAN, "--max-moves", 3), "--max-moves = 3: needs --current, the plan file that moves start from"),
        ((*PLAN, "--share-slots", "--failed", 1), "drop --failed"),
        ((*PLAN, "--policy", "hybird"), "--policy = 'hybird': did you mean hybrid?"),
        ((*PLAN, "--groups", 3), "--groups = 3: "),
        ((*PLAN, "--policy", "traffic", "--traffic-tolerance", -1), "--traffic-tolerance = -1.0: must be finite and"),
        ((*PLAN, "--traffic-tolerance", 0.1), "--traffic-tolerance = 0.1: is for --policy traffic; drop it"),
        ((*PLAN, "--token", "secret"), "--token = secret: is for a daemon; give --server, or drop it"),
        ((*PLAN, "--policy", "eplb", "--solver", "gurobbi"), "--solver = "),
        ((*COMPARE, "--spare", 2), "--spare = 2: is for --known-counts; add that, or drop this"),
        ((*COMPARE, "--known-counts"), "--slots = 3: means nothing with --known-counts"),
        ((*COMPARE, "--policies", "magic"), "must be one of base, eplb"),
        ((*COMPARE, "--every", 0), "--every = 0: must be at least 1"),
        (("compare", "small.npz", "--devices", 4), "--slots = none: give the expert slots per device"),
        ((*REPLAY, "--tflops", 0), "--tflops = 0.0: must be finite and above 0"),
        ((*REPLAY, "--inter-gbps", -1), "--inter-gbps = -1.0: must be finite and above 0"),
        ((*REPLAY, "--caution", -1), "--caution = -1.0: must be finite and at least 0"),
        (("trace", "generate", "new.npz", "--top-k", 99), "--top-k = 99: must be at most the number of experts (64)"),
        (("trace", "generate", "new.npz", "--locality", 2), "--locality = 2.0: must be 0 to 1"),
        (("serve", "--limit", "jobs"), "--limit = jobs: must be NAME=VALUE, for instance jobs=10"),
        (("serve", "--listen", "0.0.0.0:1"), "listen = 0.0.0.0:1 can be reached from other machines: give"),
        (("serve", "--config", "none.toml"), "--config = none.toml: No such file or directory"),
    ],
)
def test_values_are_named_by_their_flags(call: Call, arguments: tuple[object, ...], line: str) -> None:
    assert line in call(*arguments)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("plan", "small.npz", "--devices", 4), "Missing option '--slots'. (see `moeplan plan --help`)"),
        (("plan", "small.npz", "--devices", "x", "--slots", 3), "Invalid value for '--devices'"),
        (("plna",), "Did you mean 'plan'"),
        ((*PLAN, "--slot", 3), "No such option"),
    ],
)
def test_calls_that_cannot_be_read_point_to_the_help(call: Call, arguments: tuple[object, ...], line: str) -> None:
    said = call(*arguments)
    assert line in said
    assert "--help`" in said


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((*PLAN, "-o", "away/plan.json"), "--output = away/plan.json: there is no folder away; make it first"),
        ((*PLAN, "-o", "."), "--output = .: is a folder; give the name of a file"),
        ((*REPLAY, "--log", "away/log.jsonl"), "--log = away/log.jsonl: there is no folder away"),
        (("view", "small.npz", "-o", "away/x.html"), "--output = away/x.html: there is no folder away"),
        (("view", "small.npz", "--plan", "small.npz"), "small.npz: is not a plan that `moeplan plan` wrote"),
        (("view", "small.npz", "--plan", "p.json", "--slots", 5), "--slots = 5: is what the plan says; drop it"),
        (("affinity", "small.npz", "--devices", 4, "-o", "away/x.json"), "--output = away/x.json: there is no folder"),
        (("trace", "generate", "away/new.npz"), "TRACE = away/new.npz: there is no folder away"),
        ((*PLAN, "--current", "plan.json"), "--output = plan.json: is --current too; give another file"),
        (("plan", "none.npz", *SIZES), "none.npz: no such file; give the path of an .npz trace"),
        (("affinity", "small.npz", "--devices", 4), "small.npz: has no array `pairs`"),
        ((*PLAN, "--current", "none.json"), "none.json: No such file or directory; give a file that `moeplan plan`"),
        ((*PLAN, "--current", "small.npz"), "small.npz: is not a plan that `moeplan plan` wrote"),
        ((*PLAN, "--constraints", "none.json"), "none.json: No such file or directory; give a JSON file"),
        (("trace", "info", "."), ".: is not a readable .npz file (Is a directory)"),
    ],
)
def test_files_are_named(call: Call, arguments: tuple[object, ...], line: str) -> None:
    assert line in call(*arguments)


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ([1], "limits.json: holds a list; must be a JSON object"),
        ({"pined": [[0, 1]]}, "limits.json: pined = [[0, 1]]: is not known; did you mean pinned?"),
        ({"slots": 5.7}, "limits.json: slots = 5.7: must be a whole number"),
        ({"slots": "5"}, 'limits.json: slots = "5": must be a whole number'),
        ({"slots": [4, 4]}, "--constraints: slots = 2 values: must be one, or one per device (4)"),
        ({"slots": True}, "limits.json: slots = true: must be a whole number"),
        ({"groups_on_node": "false"}, 'limits.json: groups_on_node = "false": must be true or false'),
        ({"memory_bytes": 1e30}, "limits.json: memory_bytes = 1e+30: must be a whole number, at most 2**53"),
        ({"memory_bytes": 10**30}, "must be 0 to 2**53"),
        ({"expert": {"weight_bytes": 5e7}}, "expert.weight_bytes = 50000000.0: must be a whole number; write 50000000"),
        ({"expert": {"size": 3}}, "limits.json: expert.size = 3: is not known; "),
        ({"expert": 3}, "limits.json: expert = 3: must be an object"),
        ({"speed": -1}, "limits.json: speed = -1: must be a finite number above 0"),
        ({"forbidden": [[8, 0]]}, "--constraints: forbidden[0] = expert 8, device 0"),
        (
            {"forbidden": [[1, 0], [1]]},
            "forbidden = [[1, 0], [1]]: must be an array of numbers",
        ),
        ({"min_tokens": "many"}, 'limits.json: min_tokens = "many": must be a whole number'),
    ],
)
def test_limits_say_what_their_values_must_be(call: Call, tmp_path: Path, limits: Any, line: str) -> None:
    (tmp_path / "limits.json").write_text(json.dumps(limits))
    assert line in call(*PLAN, "--constraints", "limits.json")


@pytest.mark.parametrize("command", [("trace", "info", "--format", "json"), ("plan", "--devices", 4, "--slots", 3)])
def test_counts_that_no_plan_can_hold_are_refused(call: Call, tmp_path: Path, command: tuple[object, ...]) -> None:
    """Beyond 2**63 they would wrap to negative ones."""
    counts = COUNTS.astype(np.uint64)
    counts[3, 1, 2, 5] = 2**63 + 7
    np.savez(tmp_path / "large.npz", counts=counts)
    said = call(*command, "large.npz")
    assert said == f"large.npz: counts[3] = {2**63 + 7}: must be 0 to 2**53"


def test_a_daemon_that_is_away_is_a_failure_outside(call: Call) -> None:
    said = call("jobs", "list", "--server", "127.0.0.1:1", code=1)
    assert said == "UNAVAILABLE: no daemon answers at 127.0.0.1:1; start one with `moeplan serve`"


def test_a_secret_that_cannot_be_read_is_a_wrong_call(call: Call) -> None:
    assert "none: No such file or directory; give a file" in call("jobs", "list", "--token", "none")


def program(*arguments: object, folder: Path, wait_s: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeplan.planner.commands.main", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=wait_s, check=False)


def test_a_trace_without_tokens_is_replayed(tmp_path: Path) -> None:
    np.savez(tmp_path / "zero.npz", counts=np.zeros((4, 1, 4, 8), np.int64))
    done = program("replay", "zero.npz", *SIZES, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m moeplan.planner.commands.main policies --format json | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=280, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiling_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "small.npz", counts=COUNTS)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    said = [program(*PLAN, "--work-limit", 100, folder=tmp_path, wait_s=800).stderr for _ in range(2)]
    assert said == ["compiling kernels, once after an installation: about a minute\n", ""]


def test_the_version_is_that_of_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    done = program("--version", folder=Path.cwd())
    assert done.stdout == f"moeplan {version('moeplan')}\n"


def test_tables_come_as_csv(tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", counts=COUNTS)
    short = ("--until", 11, "--work-limit", 100)
    done = program("plan", "small.npz", *SIZES, *short, "--format", "csv", folder=tmp_path)
    head, *rows = done.stdout.splitlines()
    assert head.split(",")[:4] == ["layer", "slots", "imbalance before", "after"]
    assert "next step after" in head
    assert [row.split(",")[0] for row in rows] == ["0", "1"]
