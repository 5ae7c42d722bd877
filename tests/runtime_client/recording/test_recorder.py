"""Counts of real transformers models and of stand-ins for other frameworks' layers, against their routers' choices."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeplan.planner.traces.trace import Trace
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.runtime_client.layers.lending import LoanBuffer
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.runtime_client.recording.probes import PROBES, Form, Probe
from moeplan.runtime_client.recording.recorder import record
from moeplan.runtime_client.recording.trace_ring import TraceRing
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.layout import Layout

Launch = Callable[..., list[Any]]
EXPERTS, TOP_K, LAYERS, VOCABULARY = 5, 2, 2, 32
FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]


def make_model(family: str, implementation: str = "eager") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that transformers imports
        import transformers
    torch.manual_seed(0)
    families: dict[str, dict[str, Any]] = {
        "mixtral": {"num_local_experts": EXPERTS},
        "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 12, "head_dim": 8},
        "olmoe": {"num_experts": EXPERTS},
        "deepseek_v3": {
            "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 12,
            "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8,
        },
        "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8, "layer_types": ["full_attention"] * LAYERS},
    }  # fmt: skip
    dense = int(family == "deepseek_v3")  # its first layer has no experts
    config = transformers.AutoConfig.for_model(
        family, **families[family], vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24,
        num_hidden_layers=LAYERS + dense, num_attention_heads=2, num_key_value_heads=2 if dense else 1,
        num_experts_per_tok=TOP_K, max_position_embeddings=64,
    )  # fmt: skip
    if family == "gpt_oss":
        config.num_hidden_layers = LAYERS
    make: Callable[..., Any] = transformers.AutoModelForCausalLM.from_config
    model = make(config, experts_implementation=implementation)
    for name, weight in model.named_parameters():
        if "gate.weight" in name or "router.weight" in name:  # zeros in a fresh model: every token would go one way
            nn.init.normal_(weight)
    return model.train()


def make_batch(seed: int = 0, sequences: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (sequences, 8), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, batch: Tensor) -> None:
    model(batch, labels=batch, use_cache=False).loss.backward()


def expected(model: nn.Module, *batches: Tensor) -> Int64:
    """Choices that the routers return, from a copy of the model, counted by NumPy."""
    twin = copy.deepcopy(model)
    counts: dict[str, Int64] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            counts[name] = counts.get(name, 0) + np.bincount(output[2].numpy().ravel(), minlength=EXPERTS)

        module.register_forward_hook(hook)

    for name, module in twin.named_modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            watch(name, module)
    with torch.no_grad():
        for batch in batches:
            twin(batch, use_cache=False)
    return np.stack(list(counts.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_the_routers_choices(family: str) -> None:
    model = make_model(family)
    batches = [make_batch(seed, sequences) for seed, sequences in enumerate([3, 1, 2])]
    with record(model) as recorder:
        assert (len(recorder.layers), recorder.experts) == (LAYERS, EXPERTS)
        got = []
        for batch in batches:
            train(model, batch)
            got.append(recorder.step())
        got.append(recorder.finish())
        assert recorder.finish() is None
    assert got[0] is None
    for batch, counts in zip(batches, got[1:], strict=True):
        assert counts is not None
        assert counts.dtype == np.int64
        assert counts.sum(axis=1).tolist() == [batch.numel() * TOP_K] * LAYERS
        np.testing.assert_array_equal(counts, expected(model, batch))
    assert len({tuple(row) for row in expected(model, batches[0])}) == LAYERS  # layers are told apart


def test_counts_are_those_of_output_router_logits() -> None:
    model = make_model("qwen3_moe")
    batch = make_batch()
    with record(model) as recorder:
        logits = model(batch, output_router_logits=True, use_cache=False).router_logits
        recorder.step()
        counts = recorder.finish()
    chosen = [layer.topk(TOP_K).indices.numpy().ravel() for layer in logits]
    np.testing.assert_array_equal(counts, [np.bincount(row, minlength=EXPERTS) for row in chosen])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_counted(reentrant: bool) -> None:
    model = make_model("mixtral")
    batch = make_batch()
    wanted = expected(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # renamed in later versions of transformers
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ran = 0

    def count_run(*_: Any) -> None:
        nonlocal ran
        ran += 1

    model.model.layers[0].mlp.experts.register_forward_pre_hook(count_run)
    with record(model) as recorder:
        train(model, batch)
        recorder.step()
        counts = recorder.finish()
    assert ran == 2  # once more in the backward pass
    np.testing.assert_array_equal(counts, wanted)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_other_implementations_of_the_experts(implementation: str) -> None:
    model = make_model("olmoe", implementation)
    batch = make_batch()
    with record(model) as recorder:
        train(model, batch)
        recorder.step()
        np.testing.assert_array_equal(recorder.finish(), expected(model, batch))


def test_passes_add_up_and_evaluation_does_not_count() -> None:
    model = make_model("qwen3_moe")
    batches = [make_batch(seed) for seed in range(3)]
    with record(model) as recorder:
        for batch in batches:
            train(model, batch)
            with torch.no_grad():
                model(batch)
            with torch.inference_mode():
                model(batch)
            model.eval()
            model(batch)
            model.train()
        recorder.step()
        np.testing.assert_array_equal(recorder.finish(), expected(model, *batches))
        recorder.step()  # nothing ran
        np.testing.assert_array_equal(recorder.finish(), np.zeros((LAYERS, EXPERTS)))
    train(model, batches[0])
    recorder.step()
    assert not np.any(recorder.finish())  # closed


def test_a_failed_pass_leaves_the_recorder_usable() -> None:
    model = make_model("mixtral")
    with record(model) as recorder:
        with pytest.raises(ValueError):
            model()
        with torch.no_grad():
            model.model(make_batch())  # not through the module that was given
        train(model, make_batch())
        recorder.step()
        np.testing.assert_array_equal(recorder.finish(), expected(model, make_batch()))


CHOICES = torch.tensor([[0, 1], [4, 0], [2, 0]])
TALLY = [3, 1, 1, 0, 1]


# Stand-ins with the names, attributes and outputs of the modules that the probes were written from.
class TopKRouter(nn.Module):
    """Megatron-core 005742f: (scores, bool[tokens, experts])."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.topk = SimpleNamespace(num_moe_experts=EXPERTS), TOP_K

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.zeros(len(CHOICES), EXPERTS, dtype=torch.bool).scatter(1, CHOICES, True)
        return chosen * hidden.sum(), chosen


class TokenChoiceTopKRouter(nn.Module):
    """torchtitan b5bcd76 and DeepSpeed AutoEP 0.19.8: (scores, int64[tokens, k], ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = EXPERTS, TOP_K

    def forward(self, hidden: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return hidden.sum() * torch.ones(CHOICES.shape), CHOICES, torch.zeros(len(CHOICES), EXPERTS)


class GroupedExperts(nn.Module):
    """torchtitan's experts, which see tokens only after dispatch: not a source of choices."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        return x_RD


class MoE(nn.Module):
    """DeepSpeed 0.19.8, `deepspeed.moe.layer.MoE`: (hidden, loss, int64[experts])."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.deepspeed_moe = EXPERTS, nn.Identity()

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.deepspeed_moe(hidden), hidden.sum(), torch.tensor(TALLY)


@pytest.mark.parametrize("kind", [TopKRouter, TokenChoiceTopKRouter, MoE])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_layers_of_other_frameworks(kind: type[nn.Module], reentrant: bool | None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.experts = kind(), kind(), GroupedExperts()

        def forward(self, hidden: Tensor) -> Tensor:
            for layer in (self.first, self.second):
                out = layer(hidden) if reentrant is None else checkpoint(layer, hidden, use_reentrant=reentrant)
                hidden = hidden + out[0].sum()
            return hidden

    model = Model()
    with record(model) as recorder:
        assert recorder.layers == ("first", "second")
        model(torch.ones(3, 4, requires_grad=True)).sum().backward()
        recorder.step()
        np.testing.assert_array_equal(recorder.finish(), [TALLY, TALLY])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler about itself
def test_compiled_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), ChoosingLayer(), nn.Linear(4, 4))
    with record(model) as recorder:
        compiled: Any = torch.compile(model, backend="eager")
        for _ in range(2):
            compiled(torch.ones(3, 4)).sum().backward()
        with torch.no_grad():
            compiled(torch.ones(3, 4))
        recorder.step()
        np.testing.assert_array_equal(recorder.finish(), [2 * np.array(TALLY)])


class ChoosingLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = TokenChoiceTopKRouter()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.router(hidden)[0].sum()


class OwnLayer(nn.Module):
    def forward(self, chosen: Tensor) -> Tensor:
        return chosen


OWN = Probe(
    "my layers",
    lambda module: EXPERTS if isinstance(module, OwnLayer) else None,
    lambda arguments, named, output: (output, Form.INDEX),
)


def test_a_probe_of_ones_own_and_entries_that_are_no_expert() -> None:
    model = OwnLayer()
    with record(model, (OWN, *PROBES)) as recorder:
        model(torch.tensor([[0, -1], [4, EXPERTS], [4, 3]], dtype=torch.int32))
        model(torch.zeros(0, 2, dtype=torch.int64))
        recorder.step()
        model(torch.tensor([[-100, -2], [9, 1], [2**40, -(2**40)]]))
        np.testing.assert_array_equal(recorder.step(), [[1, 0, 0, 1, 2]])
        assert recorder.ignored.tolist() == [2]
        np.testing.assert_array_equal(recorder.finish(), [[0, 1, 0, 0, 0]])
        assert recorder.ignored.tolist() == [7]


def test_a_copy_of_a_recorded_model_is_not_counted() -> None:
    model = make_model("mixtral")
    batch = make_batch()
    with record(model) as recorder:
        train(model, batch)
        twin = copy.deepcopy(model)
        train(twin, batch)
        train(copy.deepcopy(twin), batch)
        recorder.step()
        np.testing.assert_array_equal(recorder.finish(), expected(model, batch))
    with record(twin) as second:  # it can have a recorder of its own
        train(twin, batch)
        second.step()
        np.testing.assert_array_equal(second.finish(), expected(model, batch))


def test_what_cannot_be_recorded_is_said() -> None:
    with pytest.raises(ValueError, match=r"Linear: no MoE layer found in its 1 modules.*transformers 5.*Megatron"):
        record(nn.Linear(2, 2))
    other = TokenChoiceTopKRouter()
    other.num_experts = EXPERTS + 1
    with pytest.raises(ValueError, match=r"layers differ in experts \(0: 5, 1: 6\)"):
        record(nn.Sequential(TokenChoiceTopKRouter(), other))


class OwnBlock(nn.Module):
    """A router that prefers the first expert, and experts of ours; it keeps what the router chose in each call."""

    def __init__(self, experts: FullyShardedExperts | ResidentExperts) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, EXPERTS, bias=False), experts
        self.chosen: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        scores = self.router(hidden) + torch.eye(EXPERTS)[0]
        weight, index = scores.softmax(dim=-1).topk(TOP_K)
        self.chosen.append(index)
        output: Tensor = hidden + self.experts(hidden, index, weight)
        return output


class OwnModel(nn.Module):
    def __init__(self, blocks: Sequence[OwnBlock], reentrant: bool | None) -> None:
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList(blocks), reentrant

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is not None and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=self.reentrant)
            else:
                hidden = block(hidden)
        return hidden


def make_own(kind: str, group: ExpertGroup) -> list[OwnBlock]:
    torch.manual_seed(0)
    shape = ExpertShape(6, 4)
    layers: list[FullyShardedExperts] | list[ResidentExperts]
    if kind == "sharded":
        layers = [FullyShardedExperts(shape, EXPERTS, group) for _ in range(LAYERS)]
        chain(layers)
    else:
        planner, buffer = QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, 2), group.size), LoanBuffer()
        layers = [ResidentExperts(shape, EXPERTS, group, planner=planner, buffer=buffer) for _ in range(LAYERS)]
    for layer in layers:
        layer.load_experts(0, torch.randn(EXPERTS, shape.elements))
    return [OwnBlock(layer) for layer in layers]


def record_own(kind: str, reentrant: bool | None) -> list[tuple[Int64, Int64, int, dict[str, int]]]:
    """Of each step: what was recorded, what the routers chose, passes recomputed, and traffic."""
    group = ExpertGroup.create()
    assert group is not None
    blocks = make_own(kind, group)
    model = OwnModel(blocks, reentrant).train()
    torch.manual_seed(1 + group.rank)
    steps = []

    def taken() -> list[Tensor]:
        """Choices of each layer since they were last taken."""
        taken = [torch.cat([torch.empty(0, TOP_K, dtype=torch.int64), *block.chosen]) for block in blocks]
        for block in blocks:
            block.chosen.clear()
        return taken

    with record(model) as recorder:
        for step in range(2):
            if kind == "sharded":  # replicas, and another layout in each step
                slots = [[[0, 1, 2], [3, 0, 4]], [[4, 0, 3], [0, 2, 1]]][step]
                for block in blocks:
                    block.experts.layout = Layout(np.array(slots, np.int32), EXPERTS)
            counts, recomputed = np.zeros((LAYERS, EXPERTS), np.int64), 0
            for size in (9 + group.rank, 4 * group.rank):  # the first rank has no tokens in the second micro-batch
                output = model(torch.randn(size, 6, requires_grad=True))
                for row, index in zip(counts, taken(), strict=True):
                    row += np.bincount(index.numpy().ravel(), minlength=EXPERTS)
                output.square().sum().backward()
                recomputed += sum(map(len, taken()))
                with torch.no_grad():
                    model(torch.randn(5, 6))
                assert sum(map(len, taken())) == 5 * LAYERS
            recorder.step()
            got = recorder.finish()
            assert got is not None
            steps.append((got, counts, recomputed, dict(blocks[0].experts.traffic)))
    return steps


@pytest.mark.parametrize("kind", ["sharded", "resident"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_own_layers_on_two_ranks(ranks: Launch, kind: str, reentrant: bool | None) -> None:
    of_ranks = ranks(2, record_own, kind, reentrant)
    for rank, steps in enumerate(of_ranks):
        tokens = LAYERS * (9 + 5 * rank)
        for got, chosen, recomputed, _ in steps:
            np.testing.assert_array_equal(got, chosen)
            assert got.sum() == TOP_K * tokens
            assert recomputed == (0 if reentrant is None else tokens)
    assert sum(steps[-1][3]["weights.forward"] for steps in of_ranks) > 0  # gathered, or lent


def numbered(steps: int) -> Iterator[Int64]:
    for step in range(steps):
        yield np.arange(LAYERS * EXPERTS, dtype=np.int64).reshape(LAYERS, EXPERTS) + 100 * step


def test_a_trace_holds_the_last_steps(tmp_path: Path) -> None:
    ring = TraceRing(3, top_k=TOP_K)
    ring.add(None)
    with pytest.raises(ValueError, match="no steps"):
        ring.save(tmp_path / "trace.npz")
    for counts in numbered(5):
        ring.add(counts)
        ring.save(tmp_path / "trace.npz")
    trace = Trace.open(tmp_path / "trace.npz")
    assert (trace.first_step, trace.top_k, trace.tokens_per_rank) == (2, TOP_K, None)
    np.testing.assert_array_equal(list(trace.read()), np.stack(list(numbered(5)))[2:, :, None])
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_a_trace_of_several_sources(tmp_path: Path) -> None:
    ring = TraceRing(10, tokens_per_rank=7)
    steps = [np.stack([counts, counts + 2**31], axis=1) for counts in numbered(2)]
    for counts in steps:
        ring.add(counts)
    with pytest.raises(ValueError, match=r"\(2, 5\): must be \(2, 2, 5\)"):
        ring.add(steps[0][:, 0])
    ring.save(tmp_path / "trace.npz")
    trace = Trace.open(tmp_path / "trace.npz")
    assert (trace.sources, trace.tokens_per_rank, len(ring)) == (2, 7, 2)
    np.testing.assert_array_equal(list(trace.read()), steps)
