"""A small GPT of Megatron-core with its DDP, schedules, expert parallelism and checkpoints, as it is and with ours."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from tests.support.daemon import Start
from tests.support.frameworks import EXAMPLES, check_trained, launch, python_of, train

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
HOOKED = """
import sys

import torch
import torch.distributed as dist

sys.path.append(sys.argv[1])
import megatron_loop as loop
from megatron.core import parallel_state
from moeplan.runtime_client.integrations.megatron import balance

dist.init_process_group("gloo")
parallel_state.initialize_model_parallel()
for kind in ("resident", "sharded"):
    spec = balance(loop.get_gpt_layer_local_spec(num_experts=loop.EXPERTS), "spill", kind=kind)
    layer = loop.make(spec, "aux_loss").decoder.layers[0].mlp
    hidden, arrived = torch.randn(loop.LENGTH, 1, 32), set()

    def gather(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data.fill_(0.1)
            arrived.add(parameter)

    if kind == "resident":
        for parameter in layer.experts.parameters():
            parameter.data.zero_()
        try:
            layer(hidden)
        except RuntimeError as error:
            assert str(error).startswith("MoE layer 1: its experts are zeros"), error
        else:
            raise AssertionError("experts that are zeros")
    for module in layer.experts.modules():
        gather(module)
    expected, _ = layer(hidden)
    assert expected.any()
    for parameter in arrived:
        parameter.data.normal_()
    before, _ = layer(hidden)
    assert not torch.equal(before, expected)
    arrived.clear()
    for module in layer.experts.modules():
        module.register_forward_pre_hook(gather)
    output, _ = layer(hidden)
    assert arrived == set(layer.experts.parameters())
    assert torch.equal(output, expected)
"""


def test_weights_are_read_once_ddp_has_gathered_them() -> None:
    """It does so in hooks of the modules that hold them, where gathering overlaps with the pass."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(HOOKED)
        launch(Path(folder) / "program.py", str(EXAMPLES), python=python_of("megatron"), ranks=1)


OPTIMIZED = """
import sys
from pathlib import Path

import torch.distributed as dist

folder, examples = Path(sys.argv[1]), sys.argv[2]
sys.path.append(examples)
import megatron_loop as loop
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from moeplan.runtime_client.integrations.megatron import balance


class Training:
    def __init__(self, kind):
        spec = loop.get_gpt_layer_local_spec(num_experts=loop.EXPERTS)
        self.gpt = loop.make(balance(spec, "spill", kind=kind) if kind else spec, "aux_loss")
        self.model = DistributedDataParallel(self.gpt.config, DistributedDataParallelConfig(), self.gpt)
        self.gpt.config.finalize_model_grads_func = finalize_model_grads
        # Megatron clips gradients of GPUs alone
        self.optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=0.0), [self.model])

    def run(self, data):
        seen = []
        run = loop.get_forward_backward_func()
        for step in range(3):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            losses = run(
                data_iterator=data, num_microbatches=4, micro_batch_size=1, forward_step_func=loop.forward,
                model=[self.model], seq_length=loop.LENGTH,
            )
            seen.append(loop.mean_of_ranks(losses))
            self.optimizer.prepare_grads()
            seen.append(float(self.optimizer.get_grad_norm()))
            self.optimizer.step()
        return seen

    def state(self, loading=False):
        model = self.gpt.sharded_state_dict()
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading)}

    def load(self, path):
        loaded = dist_checkpointing.load(self.state(loading=True), path)
        self.gpt.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])


def close(mine, others):
    assert max(abs(a - b) for a, b in zip(mine, others, strict=True)) < 1e-5, (mine, others)


def main():
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    runs = {}
    for kind in ("", "sharded"):
        training, data = Training(kind), loop.batches()
        path = folder / (kind or "megatron")
        if dist.get_rank() == 0:
            path.mkdir()
        dist.barrier()
        before = training.run(data)
        dist_checkpointing.save(training.state(), str(path))
        runs[kind] = before + training.run(data)
    close(runs["sharded"], runs[""])
    for saved, kind in (("megatron", "sharded"), ("sharded", ""), ("sharded", "sharded")):
        training, data = Training(kind), loop.batches()
        for _ in range(12):
            next(data)
        training.load(str(folder / saved))
        close(training.run(data), runs[""][6:])


if __name__ == "__main__":
    with loop.OnCpu():
        main()
"""


def test_an_optimizer_goes_on_from_what_the_other_kind_saved(tmp_path: Path) -> None:
    """Losses and norms of gradients are those of Megatron alone, before a checkpoint and after it."""
    (tmp_path / "program.py").write_text(OPTIMIZED)
    launch(tmp_path / "program.py", str(tmp_path), str(EXAMPLES), python=python_of("megatron"))


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
