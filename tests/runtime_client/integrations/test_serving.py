"""Plug-ins of serving engines: asked as the engine asks, they give layouts that it can run, the same on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch

from moeplan.planner.traces.formats.opening import open_recording
from moeplan.runtime_client.integrations import sglang, vllm
from moeplan.solvers import Cluster, Demand, Layout, Problem, evaluate

LAYERS, EXPERTS, DEVICES, SLOTS = 2, 16, 4, 20
LOADS = torch.from_numpy(np.random.default_rng(0).zipf(1.5, (LAYERS, EXPERTS)).clip(1, 500))
STATIC = torch.arange(SLOTS).remainder(EXPERTS).expand(LAYERS, SLOTS)


def imbalance(slots: torch.Tensor, layer: int) -> float:
    """As the engine runs it: tokens divided evenly among replicas."""
    problem = Problem(Cluster.uniform(DEVICES, SLOTS // DEVICES), Demand.of(LOADS[layer].numpy()))
    return evaluate(problem, Layout(slots[layer].reshape(DEVICES, -1).numpy(), EXPERTS), "even").mean_imbalance


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPLAN_EPLB_WORK", "300")


def test_vllm_is_given_every_slot_and_better_balance() -> None:
    slots = vllm.rebalance_experts(LOADS, SLOTS, 1, 1, DEVICES)
    assert slots.shape == (LAYERS, SLOTS)
    for layer in range(LAYERS):
        assert set(slots[layer].tolist()) == set(range(EXPERTS))
        assert imbalance(slots, layer) <= imbalance(STATIC, layer)


def test_vllm_moves_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPLAN_EPLB_MAX_MOVES", "2")
    slots = vllm.rebalance_experts(LOADS, SLOTS, 1, 1, DEVICES, STATIC.to(torch.int32))
    assert slots.dtype == torch.int32
    for old, new in zip(STATIC, slots, strict=True):
        pairs = [set(enumerate_devices(row)) for row in (old, new)]
        assert len(pairs[1] - pairs[0]) <= 2


def enumerate_devices(row: torch.Tensor) -> list[tuple[int, int]]:
    """Pairs of device and expert."""
    return [(slot * DEVICES // SLOTS, int(expert)) for slot, expert in enumerate(row)]


def test_sglangs_three_maps_say_the_same() -> None:
    slots, places, replicas = sglang.rebalance_experts(LOADS.expand(3, -1, -1), SLOTS, SLOTS // DEVICES, None, 1)
    for layer in range(LAYERS):
        assert torch.equal(replicas[layer], torch.bincount(slots[layer], minlength=EXPERTS))
        for expert in range(EXPERTS):
            found = places[layer, expert][places[layer, expert] >= 0]
            assert (slots[layer][found] == expert).all()
            assert len(found) == replicas[layer, expert]


def test_every_process_plans_the_same() -> None:
    program = (
        "import torch; from moeplan.runtime_client.integrations.vllm import rebalance_experts as plan\n"
        f"print(plan(torch.tensor({LOADS.tolist()}), {SLOTS}, 1, 1, {DEVICES}).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == vllm.rebalance_experts(LOADS, SLOTS, 1, 1, DEVICES).tolist()


def test_loads_are_kept_as_a_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPLAN_EPLB_LOADS", str(tmp_path / "loads.jsonl"))
    for _ in range(2):
        vllm.rebalance_experts(LOADS, SLOTS, 1, 1, DEVICES)
    name, recording = open_recording([tmp_path / "loads.jsonl"])
    assert name == "vllm"
    steps = list(recording.steps)
    assert len(steps) == 2
    assert np.array_equal(steps[0][:, 0], LOADS.numpy())


def test_engines_find_the_plug_ins_and_they_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEPLAN_EPLB", raising=False)
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        (found,) = [point for point in entry_points(group=group) if point.name == "moeplan"]
        found.load()()  # imports no engine


def test_a_word_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPLAN_EPLB", "yes")
    with pytest.raises(ValueError, match="MOEPLAN_EPLB = yes: must be 1"):
        vllm.register()


ENGINES = Path(os.environ.get("MOEPLAN_ENGINES", "/nowhere"))
"""Folder with unpacked sources of engines, such as ``pip download --no-deps sglang`` and unzip make it."""


@pytest.mark.slow
@pytest.mark.skipif(not (ENGINES / "sglang").is_dir(), reason="MOEPLAN_ENGINES names no folder with sglang unpacked")
def test_sglangs_registry_takes_the_plug_in() -> None:
    """Its own registry and planners, without the parts that need a GPU."""
    program = f"""
import os, sys, types, torch
for name in ("sglang", "sglang.srt", "sglang.srt.eplb"):
    module = types.ModuleType(name)
    module.__path__ = [os.path.join({str(ENGINES)!r}, *name.split("."))]
    sys.modules[name] = module
plugins = types.ModuleType("sglang.srt.plugins")
plugins.__path__ = [os.path.join({str(ENGINES)!r}, "sglang/srt/plugins")]
sys.modules["sglang.srt.plugins"] = plugins
from sglang.srt.eplb import eplb_algorithms
from sglang.srt.plugins.hook_registry import HookRegistry
from moeplan.runtime_client.integrations.sglang import rebalance_experts, register
loads = torch.tensor({LOADS.tolist()})[None]
asked = dict(tokens_per_expert=loads, num_physical_experts={SLOTS}, num_local_physical_experts={SLOTS // DEVICES},
             num_groups=None, num_nodes=1, algorithm=eplb_algorithms.EplbAlgorithm.deepseek)
theirs = eplb_algorithms.rebalance_experts(**asked)
register()
HookRegistry.apply_hooks()
ours = eplb_algorithms.rebalance_experts(**asked)
for a, b in zip(theirs, ours):
    assert a.dtype == b.dtype and a.ndim == b.ndim, (a, b)
assert torch.equal(ours[0], rebalance_experts(**asked)[0])
elastic = types.ModuleType("sglang.srt.elastic_ep.elastic_ep")
elastic.ElasticEPStateManager = types.SimpleNamespace(
    instance=lambda: None, healthy_rank_state=lambda: torch.ones({DEVICES}, dtype=torch.int32))
sys.modules["sglang.srt.elastic_ep"] = types.ModuleType("sglang.srt.elastic_ep")
sys.modules["sglang.srt.elastic_ep.elastic_ep"] = elastic
theirs = eplb_algorithms.rebalance_experts(**{{**asked, "algorithm": eplb_algorithms.EplbAlgorithm.elasticity_aware}})
assert not torch.equal(theirs[0], ours[0])
print("taken")
"""
    environment = {**os.environ, "MOEPLAN_EPLB": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip().endswith("taken"), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (ENGINES / "vllm").is_dir(), reason="MOEPLAN_ENGINES names no folder with vllm unpacked")
def test_vllms_table_takes_the_plug_in() -> None:
    """Its own table and abstract policy, without the parts that need a GPU."""
    program = f"""
import os, sys, types, typing, torch
for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb", "vllm.config"):
    module = types.ModuleType(name)
    module.__path__ = [os.path.join({str(ENGINES)!r}, *name.split("."))]
    sys.modules[name] = module
parallel = types.ModuleType("vllm.config.parallel")
parallel.EPLBPolicyOption = typing.Literal["default"]
sys.modules["vllm.config.parallel"] = parallel
from vllm.distributed.eplb.policy import EPLB_POLICIES
from moeplan.runtime_client.integrations.vllm import rebalance_experts, register
asked = (torch.tensor({LOADS.tolist()}), {SLOTS}, 1, 1, {DEVICES}, torch.tensor({STATIC.tolist()}))
theirs = EPLB_POLICIES["default"].rebalance_experts(*asked)
register()
ours = EPLB_POLICIES["default"].rebalance_experts(*asked)
assert theirs.dtype == ours.dtype and theirs.shape == ours.shape, (theirs, ours)
assert torch.equal(ours, rebalance_experts(*asked))
print("taken")
"""
    environment = {**os.environ, "MOEPLAN_EPLB": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip().endswith("taken"), done.stderr
