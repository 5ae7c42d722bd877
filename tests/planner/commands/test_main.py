"""The real program on a real trace, and on broken files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.repository import ROOT

from moeplan.planner.files.plan_file import PlanFile

TRACE = ROOT / "examples/traces/moe-e64-cut.npz"


def moeplan(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the program; its exit code must be `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "moeplan.planner.commands.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def save(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def test_policies_lists_all() -> None:
    names = [entry["policy"] for entry in json.loads(moeplan("policies", "--format", "json").stdout)["policies"]]
    assert {"eplb", "flexmoe", "hybrid", "laer", "static", "symi"} <= set(names)
    assert "LAER-MoE" in moeplan("policies").stdout


def test_trace_info() -> None:
    described = json.loads(moeplan("trace", "info", TRACE, "--format", "json").stdout)
    assert (described["sources"], described["experts"], described["top_k"]) == (16, 64, 4)
    tokens = described["tokens_per_rank"] * described["sources"] * described["top_k"]
    assert [layer["tokens"] for layer in described["per_layer"]] == [tokens] * described["layers"]
    assert "hottest expert" in moeplan("trace", "info", TRACE).stdout


def test_plan_then_plan_again_with_few_moves(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    sizes = ("--devices", 16, "--slots", 5, "--layers", "0", "--work-limit", 300)
    text = moeplan("plan", TRACE, *sizes, "-o", first).stdout
    assert "written to" in text
    again = moeplan(
        "plan", TRACE, *sizes, "-o", second, "--current", first, "--window", 3, "--max-moves", 4, "--format", "json"
    )
    document = json.loads(second.read_text())
    assert document == json.loads(again.stdout)
    assert document["layers"][0]["imbalance_before"] >= document["layers"][0]["imbalance"]
    (layer,) = document["layers"]
    assert len(layer["moves"]) <= 4
    assert 1 <= layer["bound"] <= layer["imbalance"]
    before, after = PlanFile.read(first).layouts[0], PlanFile.read(second).layouts[0]
    assert (after.placed & ~before.placed).sum() == len(layer["moves"])


def test_traffic_sends_less_between_nodes(tmp_path: Path) -> None:
    sizes = ("--devices", 16, "--slots", 6, "--nodes", 4, "--layers", "0", "--work-limit", 1000)
    parts = {}
    for policy in ("hybrid", "traffic"):
        text = moeplan("plan", TRACE, *sizes, "--policy", policy, "-o", tmp_path / "plan.json").stdout
        parts[policy] = [float(word.rstrip("%")) for word in text.split() if word.endswith("%")][1]
    assert parts["traffic"] < parts["hybrid"]
    text = moeplan("plan", TRACE, *sizes, "--traffic-tolerance", -1, "-o", tmp_path / "plan.json", code=2).stderr
    assert "--traffic-tolerance = -1.0" in text


def test_compare_answers_as_documented() -> None:
    done = moeplan(
        *("compare", TRACE, "--devices", 16, "--slots", 5, "--policies", "static,eplb,hybrid", "--window", 5),
        *("--every", 20, "--layers", "0", "--work-limit", 300, "--max-moves", 8, "--format", "json"),
    )
    rows = {row["policy"]: row for row in json.loads(done.stdout)["policies"]}
    assert list(rows) == ["static", "eplb", "hybrid"]
    for row in rows.values():
        assert row.keys() == {"policy", "fitted", "next_step", "gap_to_bound", "moved_fraction", "plan_ms_per_layer"}
        for summary in (row["fitted"], row["next_step"]["even"], row["next_step"]["optimal"]):
            assert 1 <= summary["mean"] <= summary["max"]
            assert summary["p95"] <= summary["max"]
        assert row["gap_to_bound"]["mean"] <= row["gap_to_bound"]["max"]
        assert row["plan_ms_per_layer"]["p50"] <= row["plan_ms_per_layer"]["p99"]
    assert rows["static"]["moved_fraction"]["mean"] == 0
    assert 0 < rows["hybrid"]["moved_fraction"]["mean"] <= 8 / 80
    assert rows["hybrid"]["fitted"]["mean"] < rows["eplb"]["fitted"]["mean"] < rows["static"]["fitted"]["mean"]


def test_compare_prints_a_plain_table_when_piped() -> None:
    text = moeplan(
        *("compare", TRACE, "--devices", 4, "--slots", 17, "--policies", "static,eplb", "--window", 5, "--every", 60)
    ).stdout
    assert "next step" in text
    assert "\x1b" not in text


COUNTS = np.ones((12, 2, 4, 8), np.int32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"counts": COUNTS[0]}, "must be [step, layer, source, expert]"),
        ({"counts": COUNTS.astype(np.float32)}, "must hold integers"),
        ({"counts": -COUNTS}, "must be 0 to 2**53"),
        ({"other": COUNTS}, "has no array named `counts`"),
        ({"counts": COUNTS[:0]}, "is empty"),
        ({"counts": np.asfortranarray(COUNTS)}, "must be in C order"),
        ({"counts": COUNTS, "top_k": np.array([1.5])}, "must be one integer"),
        ({"counts": COUNTS[:5]}, "a window of 10 and the step after it need 11"),
    ],
)
def test_broken_traces_are_explained(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "broken.npz", **arrays)
    done = moeplan("compare", path, "--devices", 4, "--slots", 3, "--policies", "static", code=2)
    assert message in done.stderr
    assert str(path) in done.stderr


@pytest.mark.parametrize("keep", [0, 30, 0.5, 0.95])
def test_truncated_files_are_explained(tmp_path: Path, keep: float) -> None:
    whole = save(tmp_path / "whole.npz", counts=np.random.default_rng(0).integers(0, 99, COUNTS.shape)).read_bytes()
    path = tmp_path / "cut.npz"
    path.write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    for arguments in (("trace", "info", path), ("compare", path, "--devices", 4, "--slots", 3)):
        assert f"moeplan: {path}" in moeplan(*arguments, code=2).stderr


def test_damaged_data_is_explained(tmp_path: Path) -> None:
    path = save(tmp_path / "whole.npz", counts=np.random.default_rng(0).integers(0, 99, (40, 2, 4, 8)))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(data))
    assert "is damaged" in moeplan("trace", "info", path, code=2).stderr


def test_compare_with_known_counts_answers_as_documented() -> None:
    done = moeplan(
        *("compare", TRACE, "--known-counts", "--devices", 24, "--spare", 1, "--every", 30, "--format", "json"),
    )
    rows = {row["policy"]: row for row in json.loads(done.stdout)["policies"]}
    assert list(rows) == ["static", "llep", "quota"]
    for row in rows.values():
        assert row.keys() == {"policy", "imbalance", "replicas", "us_per_call", "remote_fraction"}
        assert 1 <= row["imbalance"]["mean"] <= row["imbalance"]["max"]
        assert 0 < row["remote_fraction"]["mean"] < 1
    assert rows["static"]["replicas"]["max"] == 0
    assert 0 < rows["quota"]["replicas"]["max"] <= 24
    assert rows["quota"]["imbalance"]["mean"] < rows["static"]["imbalance"]["mean"]
    options = ("--devices", 16, "--domain", 4, "--policies", "quota", "--every", 60)
    near = moeplan("compare", TRACE, "--known-counts", *options)
    assert "us/layer" in near.stdout
    assert "--slots" in moeplan("compare", TRACE, "--devices", 16, code=2).stderr


def test_plan_honours_a_file_of_limits(tmp_path: Path) -> None:
    limits = tmp_path / "limits.json"
    limits.write_text(json.dumps({"forbidden": [[0, 1], [0, 2]], "pinned": [[5, 3]], "slots": 6}))
    out = tmp_path / "plan.json"
    options = ("--devices", 16, "--slots", 5, "--layers", 0, "--work-limit", 300, "-o", out)
    moeplan("plan", TRACE, *options, "--constraints", limits)
    slots = json.loads(out.read_text())["layers"][0]["slots"]
    assert 5 in slots[3]
    assert 0 not in slots[1] + slots[2]
    assert len(slots[0]) == 6
    again = tmp_path / "again.json"
    moeplan("plan", TRACE, *options[:-1], again, "--current", out, "--failed", "3,7-8", "--constraints", limits, code=2)
    moeplan("plan", TRACE, *options[:-1], again, "--slots", 6, "--current", out, "--failed", "3,7-8")
    after = json.loads(again.read_text())["layers"][0]["slots"]
    assert all(set(after[d]) == {-1} for d in (3, 7, 8))
    assert {e for row in after for e in row} - {-1} == set(range(64))


def test_slots_are_shared_over_layers(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    moeplan("plan", TRACE, "--devices", 16, "--slots", 5, "--share-slots", "--work-limit", 100, "-o", out)
    document = json.loads(out.read_text())
    assert sum(len(layer["slots"][0]) for layer in document["layers"]) <= 5 * len(document["layers"])
