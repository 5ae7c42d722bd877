"""Exports: what an engine loads is the plan's layout, and layouts of an engine are judged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moeplan.planner.commands.main import main
from moeplan.planner.commands.options import EngineName
from moeplan.planner.exports.engines import ENGINES, read_any
from moeplan.planner.files.plan_file import PlanFile
from moeplan.solvers import Cluster, Demand, Layout, Problem, SplitRule, evaluate

DEVICES, SLOTS, EXPERTS, FIRST = 4, 3, 8, 3
COUNTS = np.random.default_rng(0).integers(1, 99, (12, 2, DEVICES, EXPERTS))

Call = Callable[..., str]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the program in a folder with a trace whose layers are the fourth and fifth of their model."""
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "trace.npz", counts=COUNTS, layer_numbers=np.array([FIRST, FIRST + 1]))

    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["moeplan", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert (end.value.code or 0) == code, said.err
        return said.err if code else said.out

    return run


def plan(call: Call, engine: str, name: str = "plan.json") -> dict[int, Any]:
    call("plan", "trace.npz", "--devices", DEVICES, "--slots", SLOTS, "--for", engine, "--work-limit", 200, "-o", name)
    return dict(PlanFile.read(Path(name)).layouts)


def test_every_engine_can_be_named() -> None:
    assert set(ENGINES) == set(EngineName)


@pytest.mark.parametrize("engine", ["sglang", "vllm", "tensorrt-llm", "vllm-ascend"])
def test_what_is_written_is_read_as_the_same_layout(call: Call, engine: str) -> None:
    layouts = plan(call, engine)
    call("export", "plan.json", "--to", engine, "-o", "layout")
    read = read_any(Path("layout"), DEVICES)
    numbered = engine in ("sglang", "tensorrt-llm")
    for layer, layout in layouts.items():
        assert read[FIRST + layer if numbered else layer] == layout


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.split_rule is SplitRule.EVEN])
def test_plans_are_for_the_split_of_the_engine(call: Call, engine: str) -> None:
    layouts = plan(call, engine)
    document = json.loads(Path("plan.json").read_text())
    assert document["split_rule"] == "even"
    for layer, layout in layouts.items():
        problem = Problem(Cluster.uniform(DEVICES, SLOTS), Demand.of(COUNTS[-1, layer]))
        static = evaluate(problem, Layout.contiguous(EXPERTS, np.full(DEVICES, SLOTS)), "even")
        assert evaluate(problem, layout, "even").mean_imbalance < static.mean_imbalance
        assert (layout.slots >= 0).all()


def test_every_slot_holds_an_expert_where_a_further_replica_does_harm(call: Call) -> None:
    counts = np.full((12, 1, 4, 8), 50)
    np.savez("trace.npz", counts=counts, layer_numbers=np.array([FIRST]))  # even: one replica of each is perfect
    (layout,) = plan(call, "vllm").values()
    assert (layout.slots >= 0).all()
    call("export", "plan.json", "--to", "vllm", "-o", "layout.json")


def test_sglang_gets_a_row_for_every_decoder_layer_and_no_other_key(call: Call) -> None:
    layouts = plan(call, "sglang")
    call("export", "plan.json", "--to", "sglang", "--decoder-layers", 6, "-o", "layout.json")
    content = json.loads(Path("layout.json").read_text())
    assert list(content) == ["physical_to_logical_map"]
    rows = content["physical_to_logical_map"]
    assert [len(row) for row in rows] == [DEVICES * SLOTS] * 6
    assert rows[FIRST] == layouts[0].slots.reshape(-1).tolist()
    assert all(set(row) == set(range(EXPERTS)) for row in rows)


def test_tensorrt_llm_gets_the_numbers_of_moe_layers(call: Call) -> None:
    layouts = plan(call, "tensorrt-llm")
    call("export", "plan.json", "--to", "tensorrt-llm", "-o", "layout.yaml")
    content = yaml.safe_load(Path("layout.yaml").read_text())
    assert content == {
        "num_slots": DEVICES * SLOTS,
        "initial_global_assignments": {
            FIRST + layer: layout.slots.reshape(-1).tolist() for layer, layout in layouts.items()
        },
        "layer_updates_per_iter": 0,
    }


def test_deepep_gets_replicas_beyond_those_at_home(call: Call) -> None:
    layouts = plan(call, "deepep")
    call("export", "plan.json", "--to", "deepep", "-o", "layout.npz")
    each = EXPERTS // DEVICES
    with np.load("layout.npz") as mappings:
        assert sorted(mappings) == [f"layer_{FIRST}", f"layer_{FIRST + 1}"]
        for layer, layout in layouts.items():
            mapping = mappings[f"layer_{FIRST + layer}"]
            assert mapping.dtype == np.int32
            assert mapping.shape == (DEVICES, SLOTS - each)
            for device, slots in enumerate(layout.slots):
                home = set(range(device * each, (device + 1) * each))
                assert home <= set(slots.tolist())
                assert set(mapping[device][mapping[device] >= 0].tolist()) == set(slots[slots >= 0].tolist()) - home


def test_a_layout_of_an_engine_is_judged(call: Call) -> None:
    layouts = plan(call, "sglang")
    call("export", "plan.json", "--to", "sglang", "-o", "layout.json")
    said = json.loads(
        call("evaluate", "trace.npz", "--layout", "layout.json", "--devices", DEVICES, "--format", "json")
    )
    for row, (layer, layout) in zip(said["layers"], layouts.items(), strict=True):
        problem = Problem(Cluster.uniform(DEVICES, SLOTS), Demand.of(COUNTS[-1, layer]))
        assert row["layer"] == layer
        assert row["next_step"] == pytest.approx(evaluate(problem, layout, "even").mean_imbalance)
        assert row["bound"] <= row["planned"] <= row["imbalance"] + 1e-9
    assert said["mean"] == pytest.approx(np.mean([row["next_step"] for row in said["layers"]]))
    saved = said["seconds"] - said["seconds_planned"]
    assert said["pays_after_steps"] == (pytest.approx(said["move_seconds"] / saved) if saved > 0 else None)


def test_what_a_layout_costs_is_said_in_seconds(call: Call) -> None:
    plan(call, "sglang")
    static = np.stack([np.arange(DEVICES * SLOTS).reshape(DEVICES, SLOTS) % EXPERTS] * 2)
    Path("static.json").write_text(json.dumps({"physical_to_logical_map": static.reshape(2, -1).tolist()}))
    arguments = ("evaluate", "trace.npz", "--layout", "static.json", "--devices", DEVICES, "--hidden", 64)
    said = json.loads(call(*arguments, "--intermediate", 32, "--format", "json"))
    assert said["seconds"] > said["seconds_planned"] > 0
    assert said["move_seconds"] > 0
    assert "moving pays after" in call(*arguments, "--intermediate", 32)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("export", "plan.json", "--to", "vllm", "--decoder-layers", 9, "-o", "x"), "is for --to sglang; drop it"),
        (
            ("export", "plan.json", "--to", "sglang", "--decoder-layers", 4, "-o", "x"),
            "must be above 4, the last layer",
        ),
        (("export", "plan.json", "--to", "deepep", "-o", "x"), "plan with `moeplan plan --for deepep`"),
        (
            ("evaluate", "trace.npz", "--layout", "layout.json"),
            "does not say how many devices there are; give --devices",
        ),
        (("evaluate", "trace.npz", "--layout", "layout.json", "--devices", 5), "must be dealt evenly to 5 devices"),
        (("evaluate", "trace.npz", "--layout", "trace.npz"), "trace.npz: cannot be read"),
        (("evaluate", "trace.npz", "--layout", "no.json"), "no.json: is no layout that is known; give a plan file, or"),
        (
            ("plan", "trace.npz", "--devices", 4, "--slots", 3, "--for", "vllm", "--split-rule", "home"),
            "--split-rule = home: vllm divides by even; drop one of both",
        ),
        (("plan", "trace.npz", "--devices", 3, "--slots", 3, "--for", "deepep"), "deepep needs a divisor of the 8"),
        (
            ("plan", "trace.npz", "--devices", 4, "--slots", 9, "--for", "vllm"),
            "--slots = 9: vllm fills every slot, and no device takes an expert twice; give 8 at most",
        ),
        (
            ("plan", "trace.npz", "--devices", 4, "--slots", 3, "--for", "sglang", "--share-slots"),
            "--share-slots = on: sglang knows one number of slots for all layers; drop it",
        ),
    ],
)
def test_wrong_calls_are_answered_in_one_line(call: Call, arguments: tuple[object, ...], line: str) -> None:
    plan(call, "sglang")
    call("export", "plan.json", "--to", "sglang", "-o", "layout.json")
    Path("no.json").write_text("{}")
    said = call(*arguments, code=2)
    assert line in said
    assert said.count("\n") == 1
