"""Passes of sharded experts without the host, on CPUs: real processes, kernels in Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.runtime_client.device.shared_memory import shared_memory
from tests.runtime_client.device.small_passes import (
    CHOICES,
    CPU,
    EXPERTS,
    SHAPE,
    TOKENS,
    assert_close,
    batch,
    draw_plan,
    fill_unused_memory,
    uneven_batch,
)
from tests.support.expert_groups import load_alike, make_group
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moeplan.runtime_client.device.exchange import DeviceExchange, SlotsOfLayouts
from moeplan.runtime_client.device.routes import FULLEST
from moeplan.runtime_client.device.shard_memory import ShardMemory
from moeplan.runtime_client.errors import LayoutMismatchError, PassError
from moeplan.runtime_client.layers.dividing import Division, PlannedLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.runtime_client.models.gradients import ExpertGradients
from moeplan.solvers import Cluster, ExpertSpec, Layout, QuotaPlanner, SpillOptions, SplitRule

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux only")

Launch = Callable[..., list[Any]]
Layers = Sequence[FullyShardedExperts]


def make_layers(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    computing: torch.dtype | None = torch.float32,
    reshard: bool = True,
    count: int = 2,
    slots: int = EXPERTS,
    **limits: int | None,
) -> tuple[Layers, Layers, DeviceExchange]:
    """Layers on gloo and without the host, with equal weights of this type; `computing` None: as autocast to float16
    has it.
    """
    fill_unused_memory()
    group, wait = make_group(), {"time_limit": timedelta(hours=1)}
    for name in ("shards", "tokens"):
        (folder / name).mkdir(exist_ok=True)
    on_way: dict[str, Any] = {"device": CPU, "dtype": computing or torch.float16} | wait
    memory = ShardMemory(
        group, SHAPE.elements, EXPERTS, slots=EXPERTS, memory=shared_memory(folder / "shards"), **on_way
    )
    sizes: dict[str, Any] = {"max_tokens": TOKENS} | limits
    exchange = DeviceExchange(
        group, SlotsOfLayouts(EXPERTS, slots), SHAPE, choices=CHOICES, memory=shared_memory(folder / "tokens"), **sizes,
        **on_way,
    )  # fmt: skip
    kinds: list[list[FullyShardedExperts]] = []
    ways: list[dict[str, Any]] = [{}, {"memory": memory, "exchange": exchange}]
    for way in ways:
        layers = [
            FullyShardedExperts(
                SHAPE, EXPERTS, group, reshard=reshard, compute_dtype=computing, dtype=dtype, **way
            )
            for _ in range(count)
        ]  # fmt: skip
        load_alike(layers)
        chain(layers)
        kinds.append(layers)
    return kinds[0], kinds[1], exchange


def use(layers: Layers, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for layer in layers:
        layer.plan = draw_plan(rng, dist.get_world_size(), EXPERTS)


def answers(layers: Layers, parts: Sequence[Tensor], *, recompute: bool = False) -> list[Tensor]:
    """Output and gradients, those of shards too."""
    hidden, index, weight, gradient = parts
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    output = hidden
    for layer in layers:
        args = (output, index, weight)
        output = output + (checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args))
    output.backward(gradient)
    found = [output.detach(), hidden.grad, weight.grad, *(layer.shard.grad for layer in layers)]
    for layer in layers:
        layer.shard.grad = None
    return [part.clone() for part in found if part is not None]


def watched(folder: Path) -> None:
    """With autograd looking for what is not a number or without, and a scale that changes before the backward pass."""
    gloo, own, exchange = make_layers(folder)
    for watches in (False, True):
        found = []
        for layers in (gloo, own):
            use(layers, 0)
            ExpertGradients(torch.nn.ModuleList(layers))
            hidden, index, weight, gradient = uneven_batch(0, 1.0)
            output = hidden.requires_grad_()
            with torch.autograd.set_detect_anomaly(watches and layers is own):
                for layer in layers:
                    output = output + layer(output, index, weight)
                for layer in layers:
                    layer.scale *= 3
                output.backward(gradient)
            parts = output.detach(), hidden.grad, *(layer.shard.grad for layer in layers)
            found.append([part.clone() for part in parts if part is not None])
            for layer in layers:
                layer.scale, layer.shard.grad = layer.scale / 3, None
        assert_close(*found)
    exchange.mailbox.close()


def test_anomaly_mode_finds_nothing(ranks: Launch, tmp_path: Path) -> None:
    ranks(2, watched, tmp_path, timeout_s=100)


def trains(folder: Path, dtype: torch.dtype, reshard: bool) -> None:
    gloo, own, exchange = make_layers(folder, dtype=dtype, reshard=reshard)
    for layers in (gloo, own):
        ExpertGradients(torch.nn.ModuleList(layers))
    for seed, skew in enumerate((1.0, 4.0, 1000.0)):  # even, uneven, all on one expert
        for layers in (gloo, own):
            use(layers, seed)
        parts = uneven_batch(seed, skew)
        found = answers(own, parts, recompute=seed == 1)
        assert_close(answers(gloo, parts), found)
        with torch.no_grad():
            for one, other, gradient in zip(gloo, own, found[3:], strict=True):
                for layer in (one, other):
                    layer.shard.sub_(gradient, alpha=1e-3)
            assert_close([gloo[0](*parts[:3])], [own[0](*parts[:3])])
    exchange.check()
    exchange.mailbox.close()


@pytest.mark.parametrize(
    ("size", "dtype", "reshard"),
    [
        (2, torch.float32, True),
        (3, torch.float64, False),
        pytest.param(2, torch.float32, False, marks=pytest.mark.slow),
    ],
)
def test_passes_equal_those_on_collectives(
    ranks: Launch, tmp_path: Path, size: int, dtype: torch.dtype, reshard: bool
) -> None:
    ranks(size, trains, tmp_path, dtype, reshard, timeout_s=200)


def overflows(folder: Path) -> list[float]:
    """Rounds that the rows of a rank take, where most slots of the exchange are empty."""
    gloo, own, exchange = make_layers(folder, capacity=64, rounds=4, max_tokens=90)
    fullest = []
    for tokens in (90 - dist.get_rank(), 7):
        parts = batch(0, tokens, 1.5)
        assert_close(answers(gloo, parts), answers(own, parts))
        fullest.append(int(exchange.mailbox.answer[FULLEST]) / exchange.span)
    for one, other in zip(gloo, own, strict=True):  # weights are gathered once for all rounds
        assert one.traffic["weights.forward"] == other.traffic["weights.forward"]
    exchange.check()
    exchange.mailbox.close()
    return fullest


def test_rows_beyond_the_capacity_are_computed_in_rounds(ranks: Launch, tmp_path: Path) -> None:
    for most, few in ranks(2, overflows, tmp_path, timeout_s=200):
        assert 2 < most <= 4
        assert few <= 1


def overlaps(folder: Path) -> None:
    gloo, own, exchange = make_layers(folder)
    found = []
    for layers in (gloo, own):
        outputs = []
        for seed in range(3):
            use(layers, seed)
            hidden, index, weight, _ = uneven_batch(seed)
            for layer in layers:
                hidden = hidden + layer(hidden, index, weight)
            outputs.append(hidden)
        for seed in (1, 0, 2):
            outputs[seed].backward(uneven_batch(seed)[3])
        found.append([layer.shard.grad for layer in layers if layer.shard.grad is not None])
    assert_close(*found)
    exchange.check()
    exchange.mailbox.close()


def test_layouts_may_change_while_passes_are_under_way(ranks: Launch, tmp_path: Path) -> None:
    ranks(2, overlaps, tmp_path, timeout_s=200)


def recomputes_by_another_layout(folder: Path) -> str:
    _, own, exchange = make_layers(folder, count=1)
    hidden, index, weight, gradient = uneven_batch(0)
    output = checkpoint(own[0], hidden.requires_grad_(), index, weight, use_reentrant=False)
    own[0].layout = Layout(np.ascontiguousarray(own[0].layout.slots[:, ::-1]), EXPERTS)  # of as many slots
    with pytest.raises(RuntimeError) as caught:
        output.backward(gradient)
    exchange.mailbox.close()
    return str(caught.value)


def test_a_checkpoint_whose_layout_has_changed_is_refused(ranks: Launch, tmp_path: Path) -> None:
    for message in ranks(2, recomputes_by_another_layout, tmp_path, timeout_s=200):
        assert "its layout has changed between a forward pass and its backward" in message


def begins_twice(folder: Path) -> None:
    """A pass is refused once the weights of the next layer have been shown, and none of them has set out."""
    gloo, own, exchange = make_layers(folder)
    for seed in range(2):  # the next pass has other layouts, or the same
        hidden, index, weight, gradient = uneven_batch(seed)
        more = torch.cat([index, index[:, :1]], 1), torch.cat([weight, weight[:, :1]], 1)
        with pytest.raises(ValueError, match="choices = 3: the exchange was made for 2"):
            own[0](hidden, *more)
        for layers in (gloo, own):
            if not seed:
                use(layers, seed)
        assert_close(answers(gloo, (hidden, index, weight, gradient)), answers(own, (hidden, index, weight, gradient)))
    exchange.check()
    exchange.mailbox.close()


def test_a_refused_pass_leaves_the_next_ones_right(ranks: Launch, tmp_path: Path) -> None:
    ranks(2, begins_twice, tmp_path, timeout_s=200)


def between_layers(folder: Path) -> None:
    """What the first layer has begun to gather for the next is of no use, wanted twice, or wanted later."""
    gloo, own, exchange = make_layers(folder, count=3)
    for layers in (gloo, own):
        use(layers, 0)
    hidden, index, weight, gradient = uneven_batch(0)

    def run(layer: FullyShardedExperts, outputs: list[Tensor]) -> None:
        outputs.append(hidden + layer(outputs[-1], index, weight) / 100)

    found = []
    for layers in (gloo, own):
        first, second, third = layers
        outputs = [hidden]
        first.prefetch()
        run(first, outputs)
        assert second._ahead is not None
        assert third._ahead is None
        use([second], 1)  # another layout
        run(second, outputs)
        third.load_experts(0, torch.full((1, SHAPE.elements), 0.1))  # other weights
        run(third, outputs)
        run(first, outputs)  # a layer that runs twice, and the next after another one
        with torch.no_grad():
            run(third, [*outputs])
        second.prefetch()  # and begins anew
        run(second, outputs)
        run(second, outputs)
        run(first, [*outputs])  # whose output is not used
        outputs[-1].backward(gradient)
        grads = [layer.shard.grad for layer in layers if layer.shard.grad is not None]
        found.append([output.detach() for output in outputs] + [grad.clone() for grad in grads])
        for layer in layers:
            layer.shard.grad = None
    assert_close(*found)
    parts = uneven_batch(1)
    assert_close(answers(gloo, parts), answers(own, parts))
    # Layers that gather by collectives before or after those that do not.
    for order in ((0, 1), (1, 0)):
        plain, mixed = [gloo[0], gloo[1]], [(gloo, own)[kind][place] for place, kind in enumerate(order)]
        for layers in (plain, mixed):
            chain(layers)
            use(layers, 2)
            found[layers is mixed] = answers(layers, parts)
        assert_close(*found)
    exchange.check()
    exchange.mailbox.close()


def test_what_is_gathered_ahead_may_be_of_no_use(ranks: Launch, tmp_path: Path) -> None:
    ranks(2, between_layers, tmp_path, timeout_s=200)


def no_memory(*_: object) -> Tensor:
    raise MemoryError


def breaks_off(folder: Path) -> None:
    """Passes that end in an error behind the first product, before or after the next layer is on its way."""
    gloo, own, exchange = make_layers(folder)
    parts = uneven_batch(0)
    own[1].compute_dtype = torch.float64
    for layers in (gloo, own):
        use(layers, 0)
    with pytest.raises(ValueError, match=r"dtype = torch\.float64: the memory was made for"):
        own[0](*parts[:3])
    own[1].compute_dtype = torch.float32
    assert_close(answers(gloo, parts), answers(own, parts))
    for change in range(3):  # the next pass has the same layouts and weights, other layouts, or other weights
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exchange, "activate", no_memory)
            with pytest.raises(MemoryError):
                own[0](*parts[:3])
        for layers in (gloo, own):
            if change == 1:
                use(layers, 1)
            if change == 2:
                layers[1].load_experts(0, torch.full((1, SHAPE.elements), 0.1))
        assert_close(answers(gloo, parts), answers(own, parts))
    exchange.check()
    exchange.mailbox.close()


def test_passes_that_break_off_leave_the_next_ones_right(ranks: Launch, tmp_path: Path) -> None:
    ranks(2, breaks_off, tmp_path, timeout_s=200)


def under_autocast(folder: Path) -> None:
    gloo, own, exchange = make_layers(folder, computing=None)
    for seed in range(2):
        for layers in (gloo, own):
            use(layers, seed)
        parts = uneven_batch(seed)
        with torch.autocast("cpu", torch.float16):
            for known, found in zip(answers(gloo, parts), answers(own, parts), strict=True):
                assert known.numel() == 0 or (known - found).abs().max() <= 0.01 * known.abs().max()
    exchange.check()
    exchange.mailbox.close()


def test_layers_gather_ahead_in_the_type_of_autocast(ranks: Launch, tmp_path: Path) -> None:
    ranks(2, under_autocast, tmp_path, timeout_s=200)


def unusual(folder: Path, kind: str) -> None:
    gloo, own, exchange = make_layers(folder)
    if kind == "frozen":
        for layer in (*gloo, *own):
            layer.shard.requires_grad_(False)
    if kind == "copied":
        own = copy.deepcopy(own)
        chain(own)
    for seed in range(2):
        for layers in (gloo, own):
            use(layers, seed)
        parts = [part[:0] for part in uneven_batch(seed)] if kind == "idle" else uneven_batch(seed)
        assert_close(answers(gloo, parts), answers(own, parts))
    exchange.check()
    exchange.mailbox.close()


@pytest.mark.parametrize("kind", [pytest.param("frozen", marks=pytest.mark.slow), "copied", "idle"])
def test_experts_may_be_frozen_or_copied_and_have_no_tokens(ranks: Launch, tmp_path: Path, kind: str) -> None:
    ranks(2, unusual, tmp_path, kind, timeout_s=200)


def failure(folder: Path, kind: str) -> tuple[str, str]:
    """The name of the error that `check` raises, and its message."""
    tokens = 4 * TOKENS
    _, own, exchange = make_layers(folder, max_tokens=tokens, capacity=tokens * CHOICES if kind == "rows" else None)
    layer = own[0]
    if kind == "layouts" and dist.get_rank() == 1:
        use([layer], 1)
    if kind == "gatherings":
        assert layer.memory is not None
        layer.memory._gathering.meetings += dist.get_rank()
    # Without replicas the busiest expert is all on one rank.
    output = layer(
        torch.ones(tokens, SHAPE.hidden), torch.zeros(tokens, CHOICES, dtype=torch.long), torch.ones(tokens, CHOICES)
    )
    assert output.isnan().all()
    with pytest.raises(Exception) as caught:
        exchange.check()
    exchange.mailbox.close()
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("layouts", LayoutMismatchError, "layout of ranks [1]"),
        ("gatherings", LayoutMismatchError, "layout of ranks [1]"),
        (
            "rows",
            PassError,
            "its layout gives rank 0 320 rows, more than the 208 that capacity and rounds make room for",
        ),
    ],
)
def test_all_ranks_fail_alike(ranks: Launch, tmp_path: Path, kind: str, error: type[Exception], message: str) -> None:
    for name, said in ranks(2, failure, tmp_path, kind, timeout_s=200):
        assert name == error.__name__
        assert message in said


def refusals(folder: Path) -> list[str]:
    _, own, exchange = make_layers(folder, count=1, slots=5)
    layer, group = own[0], own[0].group
    ways: dict[str, Any] = {"memory": layer.memory, "exchange": exchange, "compute_dtype": torch.float32}
    quota = QuotaPlanner(SpillOptions.uniform(EXPERTS, 2, 1), 2)
    home = DeviceExchange(
        group, quota, SHAPE, max_tokens=4, choices=2, device=CPU, dtype=torch.float32, weights=torch.float32,
        memory=shared_memory(folder / "tokens"),
    )  # fmt: skip

    def planned(layout: Layout, cluster: Cluster, rule: SplitRule = SplitRule.OPTIMAL) -> None:
        layer.plan = PlannedLayer(layout, Division(cluster, ExpertSpec(), rule))

    wide = Layout(np.array([[0, 1, 2, 3, 4, 5], [5, 0, 1, 2, 3, -1]]), EXPERTS)
    said = []
    for act in (
        lambda: FullyShardedExperts(SHAPE, EXPERTS, group, **ways | {"memory": None}),
        lambda: FullyShardedExperts(SHAPE, EXPERTS, group, **ways | {"exchange": home}),
        lambda: FullyShardedExperts(SHAPE, EXPERTS, group, planner=quota, **ways),
        lambda: FullyShardedExperts(ExpertShape(16, 32), EXPERTS, group, **ways),
        lambda: planned(wide, Cluster.uniform(2, 1)),
        lambda: planned(layer.layout, Cluster.uniform(2, 4, memory_bytes=1e12)),
        lambda: planned(layer.layout, Cluster.uniform(2, 1), SplitRule.LITE),
        lambda: setattr(layer, "split_rule", "home"),
        lambda: setattr(layer, "planner", quota),
        lambda: exchange.charge(1.0),
        lambda: DeviceExchange(group, SlotsOfLayouts(EXPERTS, 2), SHAPE, max_tokens=4, choices=2, device=CPU),
    ):
        with pytest.raises(ValueError) as caught:
            act()
        said.append(str(caught.value))
    for each in (home, exchange):
        each.mailbox.close()
    return said


def test_what_cannot_run_without_the_host_is_refused_by_name(ranks: Launch, tmp_path: Path) -> None:
    said, _ = ranks(2, refusals, tmp_path)
    expected = (
        "write memory=ShardMemory(...)",
        "write DeviceExchange(group, SlotsOfLayouts(6, slots), ...)",
        "do not lend beyond a layout",
        "shape = ExpertShape(hidden=16, width=32",
        "write SlotsOfLayouts(6, 6)",
        "cluster.memory_bytes",
        "split_rule = lite",
        "split_rule = home",
        "do not lend beyond a layout",
        "lends nothing",
        "slots = 2: must be 3 to 6",
    )
    for message, word in zip(said, expected, strict=True):
        assert word in message
