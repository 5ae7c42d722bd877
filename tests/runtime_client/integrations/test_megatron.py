"""A small GPT of Megatron-core with its DDP, schedules, expert parallelism and checkpoints, as it is and with ours."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from tests.support.daemon import Start
from tests.support.frameworks import check_trained, launch, python_of, train

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4
"""Of losses, which fall from 4.5 to 3.4: Megatron weighs choices before the second matrix, and we after it."""

ALONE, DATA, PIPELINE = (), ("expert=2",), ("expert=2", "pipeline=2")
DIMENSIONS = [
    pytest.param(ALONE, id="expert"),
    pytest.param(DATA, id="expert and data"),
    pytest.param(PIPELINE, id="expert and pipeline"),
]
"""Two ranks over which the experts are spread; two such groups that hold the same ones; two stages of such groups."""


def run(folder: Path, mode: str, *options: str, dimensions: tuple[str, ...]) -> dict[str, Any]:
    ranks = 4 if dimensions else 2
    python = python_of("megatron")
    return train("megatron_loop.py", str(folder), mode, *dimensions, *options, python=python, ranks=ranks)


KINDS = [
    *(pytest.param("resident", *each.values, id=f"resident, {each.id}") for each in DIMENSIONS),
    pytest.param("sharded", ALONE, id="sharded, expert"),
    pytest.param("sharded", DATA, id="sharded, expert and data"),
    pytest.param("sharded", PIPELINE, id="sharded, expert and pipeline"),
]


@cache
def static(dimensions: tuple[str, ...], *options: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        return run(Path(folder), "static", *options, dimensions=dimensions)


DENSE_STAGE = """
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from moeplan.runtime_client.integrations.megatron import balance

dense = TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec()])
try:
    balance(dense, "spill")
except ValueError as error:
    assert "none of its layers has the module MoELayer" in str(error)
else:
    raise AssertionError("a model without MoE layers")
dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
assert balance(dense, "spill") is dense
"""

REFUSED = """
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from moeplan.runtime_client.integrations.megatron import balance

legacy = "moe_grouped_gemm = True: with the local spec it names the legacy GroupedMLP"
for options, kind, answer in (
    ({"moe_grouped_gemm": True}, "resident", legacy),
    ({"moe_grouped_gemm": True}, "sharded", legacy),
    ({}, "shared", "kind = 'shared': must be resident or sharded"),
):
    try:
        balance(get_gpt_layer_local_spec(num_experts=8, **options), "spill", kind=kind)
    except ValueError as error:
        assert str(error).startswith(answer), error
    else:
        raise AssertionError(answer)
balance(get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=True), "record")
"""


def test_a_stage_of_dense_layers_stays_as_it_is_and_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(DENSE_STAGE)
    launch(tmp_path / "program.py", python=python_of("megatron"))


def test_experts_and_kinds_that_are_not_known_are_refused(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(REFUSED)
    launch(tmp_path / "program.py", python=python_of("megatron"), ranks=1)


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_recording_changes_nothing(tmp_path: Path, dimensions: tuple[str, ...]) -> None:
    recorded = run(tmp_path, "record", f"trace={tmp_path / 'trace.npz'}", dimensions=dimensions)
    imbalances = check_trained(recorded, static(dimensions), tolerance=0)
    assert (imbalances[:, 0] == imbalances[:, 1]).all()
    names = ["trace-0.npz", "trace-2.npz"] if dimensions else ["trace.npz"]
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == names
    layers = 1 if dimensions == PIPELINE else 2
    for name in names:
        with np.load(tmp_path / name) as arrays:
            assert arrays["counts"].shape == (19, layers, 2, 8)


@pytest.mark.parametrize(("kind", "dimensions"), KINDS)
def test_spilling_balances_with_the_same_losses(tmp_path: Path, kind: str, dimensions: tuple[str, ...]) -> None:
    spilled = run(tmp_path, "spill", f"kind={kind}", dimensions=dimensions)
    home, computed = check_trained(spilled, static(dimensions), TOLERANCE).T
    assert home.max() > 1.1
    assert computed.max() < 1.01


@pytest.mark.parametrize(("kind", "dimensions"), KINDS)
def test_planned_layouts_balance_with_the_same_losses(
    tmp_path: Path, kind: str, dimensions: tuple[str, ...], start: Start
) -> None:
    daemon = start().serving()
    options = (f"planner={daemon.address}", "job=tiny", f"kind={kind}")
    planned = run(tmp_path, "planned", *options, dimensions=dimensions)
    imbalances = check_trained(planned, static(dimensions), TOLERANCE)
    home, computed = imbalances[8:].T  # the planner has what it needs after five steps
    assert computed.mean() < home.mean()


@pytest.mark.parametrize("kind", ["resident", "sharded"])
def test_expert_biases_are_those_of_megatron_on_all_ranks(tmp_path: Path, kind: str) -> None:
    """Each micro-batch counts its tokens, and at the end of a step all ranks move the biases alike."""
    plain = static(ALONE, "router=expert_bias")
    spilled = run(tmp_path, "spill", f"kind={kind}", "router=expert_bias", dimensions=ALONE)
    home, computed = check_trained(spilled, plain, TOLERANCE).T
    assert home.max() > 1.1 > computed.max()
    first, second = spilled["biases"]
    assert first == second == plain["biases"][0]
    assert all(any(layer) for layer in first)
