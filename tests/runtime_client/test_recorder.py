"""The recorder on real models: its counts are those of the routers, whatever training does around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeplan.planner.trace import Trace
from moeplan.runtime_client.ffn import ExpertShape
from moeplan.runtime_client.fsep import FullyShardedExperts
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.recorder import Observed, Recorder, record
from moeplan.runtime_client.trace_ring import TraceRing
from moeplan.solvers.arrays import Int64

EXPERTS, TOP_K, LAYERS = 5, 2, 2
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 12},
    "olmoe": {"num_experts": EXPERTS},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS, "moe_intermediate_size": 12, "first_k_dense_replace": 0, "n_group": 1,
        "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "n_shared_experts": 1, "num_key_value_heads": 2,
    },
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8, "layer_types": ["full_attention"] * LAYERS},
}  # fmt: skip


def make_model(family: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that transformers imports
        import transformers
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **(fields | FAMILIES[family]))
    make: Callable[..., nn.Module] = transformers.AutoModelForCausalLM.from_config
    return make(config, experts_implementation="eager")


def batch(seed: int, length: int = 7) -> Tensor:
    return torch.randint(32, (3, length), generator=torch.Generator().manual_seed(seed))


def routed(model: nn.Module, tokens: Tensor) -> Any:
    """int64[layers, experts] as the routers say themselves, from their own output."""
    chosen: list[Tensor] = []
    gates = [module for _, module in model.named_modules() if type(module).__name__.lower().endswith("topkrouter")]
    hooks = [gate.register_forward_hook(lambda m, a, output: chosen.append(output[2])) for gate in gates]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    assert len(chosen) == LAYERS
    return np.stack([np.bincount(index.flatten().numpy(), minlength=EXPERTS) for index in chosen])


def last(recorder: Recorder) -> Int64:
    counts = recorder.flush()
    assert counts is not None
    return counts


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_counts_are_those_of_the_routers(family: str) -> None:
    model = make_model(family)
    expected = [routed(model, batch(step)) for step in range(3)]
    recorder = record(model)
    assert (len(recorder.names), recorder.experts) == (LAYERS, EXPERTS)
    seen = []
    for step in range(3):
        model(input_ids=batch(step)).logits.sum().backward()
        seen.append(recorder.step())
    assert seen[0] is None
    for actual, counts in zip([*seen[1:], last(recorder)], expected, strict=True):
        assert actual is not None
        assert np.array_equal(actual, counts)
        assert counts.sum() == LAYERS * TOP_K * 21
    recorder.close()
    model(input_ids=batch(0))
    recorder.step()
    assert recorder.flush() is not None
    assert not recorder.flush()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_not_counted_twice(use_reentrant: bool) -> None:
    model = make_model("mixtral")
    expected = routed(model, batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its newer name, which earlier transformers lack
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})  # type: ignore[operator]
    model.train()
    recorder = record(model)
    model(input_ids=batch(0)).logits.sum().backward()
    recorder.step()
    assert np.array_equal(last(recorder), expected)


def test_micro_batches_add_up_and_evaluation_does_not_count() -> None:
    model = make_model("qwen3_moe")
    expected = routed(model, batch(0)) + routed(model, batch(1, length=4))
    recorder = record(model)
    for tokens in (batch(0), batch(1, length=4)):
        with torch.no_grad():
            model(input_ids=batch(9))
        model(input_ids=tokens).logits.sum().backward()
    recorder.step()
    assert np.array_equal(last(recorder), expected)


def test_a_pass_that_fails_leaves_the_recorder_well() -> None:
    model = make_model("mixtral")
    recorder = record(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 99))
    recorder.step()
    expected = routed(model, batch(0))
    model(input_ids=batch(0)).logits.sum().backward()
    recorder.step()
    assert np.array_equal(last(recorder), expected)
    layer = nn.Module.get_submodule(model, recorder.names[0])
    layer(torch.zeros(4, 16), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))  # not a pass of the model
    recorder.step()
    counts = recorder.flush()
    assert counts is not None
    assert counts.sum() == 0


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FullyShardedExperts(ExpertShape(4, 4), 3, ExpertGroup()) for _ in range(2))

    def forward(self, hidden: Tensor, index: Tensor) -> Tensor:
        weight = torch.ones(index.shape)
        for layer in self.layers:
            hidden = hidden + checkpoint(layer, hidden, index, weight, use_reentrant=False)
        return hidden


def test_our_own_layers() -> None:
    model = Own()
    recorder = record(model)
    index = torch.tensor([[0, 1], [1, 2], [1, 0]])
    model(torch.ones(3, 4, requires_grad=True), index).sum().backward()
    recorder.step()
    assert np.array_equal(last(recorder), [[2, 3, 1]] * 2)


# Stand-ins of frameworks that do not run here: what the recorder relies on of each, as its source defines it.


class TopKRouter(nn.Module):
    """megatron.core.transformer.moe.router.TopKRouter: (probabilities, routing map)."""

    __module__ = "megatron.core.transformer.moe.router"

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits, torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(2, dim=1).indices, True)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.routing(logits)


class TokenChoiceTopKRouter(nn.Module):
    """torchtitan.models.common.moe.TokenChoiceTopKRouter: (scores, index, tokens of each expert)."""

    __module__ = "torchtitan.models.common.moe"

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, index = logits.topk(2, dim=1)
        return scores, index, torch.bincount(index.flatten(), minlength=3)


class MoE(nn.Module):
    """deepspeed.moe.layer.MoE: (output, auxiliary loss, exp_counts)."""

    __module__ = "deepspeed.moe.layer"

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logits, logits.sum(), torch.bincount(logits.topk(2, dim=1).indices.flatten(), minlength=3)


@pytest.mark.parametrize("kind", [TopKRouter, TokenChoiceTopKRouter, MoE])
def test_other_frameworks(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind())
    recorder = record(model)
    model(torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]]))
    recorder.step()
    assert np.array_equal(last(recorder), [[2, 3, 1]])


def test_a_reader_for_anything_else() -> None:
    class Chooser(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.argmax(dim=1)

    def read(module: nn.Module) -> Observed | None:
        return Observed(3, lambda a, k, output: output, "index") if isinstance(module, Chooser) else None

    model = nn.Sequential(Chooser())
    with pytest.raises(ValueError, match="no MoE layer found"):
        record(model)
    recorder = record(model, readers=[read])
    model(torch.eye(3)[[0, 1, 1, -1]])
    recorder.step()
    assert np.array_equal(last(recorder), [[1, 2, 1]])


def ring(folder: str) -> None:
    kept = TraceRing(3)
    for step in range(5):
        kept.add(np.full((2, 4), 10 * step + dist.get_rank()))
    kept.save(f"{folder}/run.npz", top_k=2)


def test_the_last_steps_become_a_trace(ranks: Any, tmp_path: Path) -> None:
    ranks(2, ring, str(tmp_path))
    trace = Trace.open(tmp_path / "run.npz")
    assert (trace.first_step, trace.top_k) == (2, 2)
    counts = np.stack(list(trace.read()))
    assert counts.shape == (3, 2, 2, 4)
    assert counts[:, 0, :, 0].tolist() == [[20, 21], [30, 31], [40, 41]]
