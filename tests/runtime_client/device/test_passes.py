"""Passes without the host on CPUs: real processes and signals, kernels in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
    fill_unused_memory,
    uneven_batch,
)
from tests.support.expert_groups import make_group
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moeplan.runtime_client.device.exchange import DeviceExchange
from moeplan.runtime_client.device.memory import symmetric_memory
from moeplan.runtime_client.device.routes import FULLEST
from moeplan.runtime_client.errors import LayoutMismatchError, MissedPassError, PassError, RanksDifferError, RouterError
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.models.gradients import ExpertGradients
from moeplan.solvers import LlepPlanner, QuotaPlanner, SpillOptions
from moeplan.solvers.problem.errors import InfeasibleError

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux only")

Launch = Callable[..., list[Any]]
SLOW = pytest.mark.slow


def make_layers(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    spare: int = 2,
    shape: ExpertShape = SHAPE,
    limit: timedelta = timedelta(hours=1),
    capacity: int | None = None,
    rounds: int = 1,
    tokens: int = TOKENS,
) -> tuple[ResidentExperts, ResidentExperts, DeviceExchange]:
    """A layer on gloo and one without the host, with equal weights of this type, computing in float32."""
    fill_unused_memory()
    group = make_group()
    planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, spare), group.size)
    exchange = DeviceExchange(
        group, planner, shape, max_tokens=tokens, choices=CHOICES, device=CPU, dtype=torch.float32, weights=dtype,
        capacity=capacity, rounds=rounds, time_limit=limit, memory=shared_memory(folder),
    )  # fmt: skip
    layers = [
        ResidentExperts(
            shape, EXPERTS, group, planner=planner, exchange=own, dtype=dtype, compute_dtype=torch.float32
        )
        for own in (None, exchange)
    ]  # fmt: skip
    flat = torch.randn(EXPERTS, shape.elements, generator=torch.Generator().manual_seed(0)) / 4
    for layer in layers:
        layer.load_experts(0, flat)
    return layers[0], layers[1], exchange


def answers(layer: ResidentExperts, parts: Sequence[Tensor], *, recompute: bool = False) -> list[Tensor]:
    hidden, index, weight, gradient = parts
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    layer.flat.grad = None
    parts = (hidden, index, weight)
    output: Tensor = checkpoint(layer, *parts, use_reentrant=False) if recompute else layer(*parts)
    output.backward(gradient)
    found = [output.detach(), hidden.grad, weight.grad, layer.flat.grad]
    return [part.clone() for part in found if part is not None]


def equals_gloo(folder: Path, dtype: torch.dtype, spare: int, shape: ExpertShape) -> list[int]:
    gloo, own, exchange = make_layers(folder, dtype=dtype, spare=spare, shape=shape)
    for layer in (gloo, own):
        ExpertGradients(layer)
    lent = []
    for seed, skew in enumerate((1.0, 4.0, 1000.0)):  # even, uneven, all on one expert
        parts = uneven_batch(seed, skew)
        assert_close(answers(gloo, parts), answers(own, parts))
        lent.append(int(exchange.mailbox.answer[2]))
    with torch.no_grad():
        assert_close([gloo(*parts[:3])], [own(*parts[:3])])
    exchange.check()
    exchange.mailbox.close()
    return lent


@pytest.mark.parametrize(
    ("size", "dtype", "spare", "shape"),
    [
        (2, torch.float32, 2, SHAPE),
        pytest.param(2, torch.float64, 2, SHAPE, marks=SLOW),
        (2, torch.float32, 0, ExpertShape(16, 8, gated=False, activation="relu")),
        (2, torch.float64, 0, ExpertShape(16, 8, gated=False, activation="relu")),
        (3, torch.float64, 1, ExpertShape(16, 344, activation="gelu")),  # parts of a loan reach both borrowers
    ],
)
def test_a_pass_equals_that_on_collectives(
    ranks: Launch, tmp_path: Path, size: int, dtype: torch.dtype, spare: int, shape: ExpertShape
) -> None:
    lent = ranks(size, equals_gloo, tmp_path, dtype, spare, shape, timeout_s=200)
    assert (sum(map(sum, lent)) > 0) == (spare > 0)


def laid_out_by_columns(folder: Path) -> None:
    gloo, own, exchange = make_layers(folder)
    for place in range(4):
        parts = batch(1)
        parts[place] = parts[place].T.contiguous().T
        assert_close(answers(gloo, parts), answers(own, parts))
    exchange.mailbox.close()


def test_tokens_choices_and_gradients_may_be_laid_out_by_columns(ranks: Launch, tmp_path: Path) -> None:
    ranks(2, laid_out_by_columns, tmp_path, timeout_s=200)


def overflows(folder: Path, dtype: torch.dtype, spare: int) -> tuple[float, float]:
    """Rounds that the rows of a rank take, with few and with uneven tokens."""
    gloo, own, exchange = make_layers(
        folder, dtype=dtype, spare=spare, capacity=56 if spare else 64, rounds=4, tokens=96
    )
    for layer in (gloo, own):
        ExpertGradients(layer)
    fullest = []
    for seed, tokens in enumerate((7, 96 - dist.get_rank())):
        parts = batch(seed, tokens, 1.5)
        found = answers(own, parts)
        assert_close(answers(gloo, parts), found)
        fullest.append(int(exchange.mailbox.answer[FULLEST]) / exchange.span)
        for one, other in zip(found, answers(own, parts, recompute=True), strict=True):
            assert torch.equal(one, other)
    with torch.no_grad():
        assert_close([gloo(*parts[:3])], [own(*parts[:3])])
    exchange.check()
    exchange.mailbox.close()
    return fullest[0], fullest[1]


def round_once(folder: Path, spare: int) -> None:
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        _, layer, exchange = make_layers(
            folder / str(dtype), dtype=dtype, spare=spare, capacity=48 if spare else 64, rounds=4, tokens=96
        )
        flat = torch.randn(EXPERTS, SHAPE.elements, generator=torch.Generator().manual_seed(0)) / 4
        layer.load_experts(0, flat.bfloat16())
        parts = batch(0, 96 - dist.get_rank(), 1.5)
        found.append(answers(layer, parts))
        assert int(exchange.mailbox.answer[FULLEST]) > 2 * exchange.span
        exchange.mailbox.close()
    (output, *_, wide), (same, *_, narrow) = found
    assert torch.equal(output, same)
    assert torch.equal(wide.float().bfloat16(), narrow)


@pytest.mark.parametrize("spare", [3, pytest.param(0, marks=SLOW)])
def test_gradients_of_rounds_and_loans_are_rounded_once(ranks: Launch, tmp_path: Path, spare: int) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        (tmp_path / str(dtype)).mkdir()
    ranks(2, round_once, tmp_path, spare, timeout_s=200)


@pytest.mark.parametrize(
    ("dtype", "spare"),
    [(torch.float64, 1), pytest.param(torch.float32, 0, marks=SLOW), pytest.param(torch.float32, 3, marks=SLOW)],
)
def test_rows_beyond_the_capacity_are_computed_in_rounds(
    ranks: Launch, tmp_path: Path, dtype: torch.dtype, spare: int
) -> None:
    for few, most in ranks(2, overflows, tmp_path, dtype, spare, timeout_s=200):
        assert 2 < most <= 4
        assert few <= 1


def repeated(folder: Path) -> None:
    gloo, own, exchange = make_layers(folder)
    one, other = batch(1), batch(2)
    first = answers(own, one)
    for recompute in (True, False):
        for expected, found in zip(first, answers(own, one, recompute=recompute), strict=True):
            assert torch.equal(expected, found)
    flats: list[list[Tensor]] = []
    for layer in (gloo, own):  # two micro-batches in flight, whose gradients add up
        layer.flat.grad = None
        outputs = [layer(*parts[:3]) for parts in (one, other)]
        for output, parts in zip(outputs, (one, other), strict=True):
            output.backward(parts[3])
        assert layer.flat.grad is not None
        flats.append([layer.flat.grad])
    assert_close(*flats)
    exchange.mailbox.close()


def test_passes_repeat_bit_for_bit_and_may_overlap(ranks: Launch, tmp_path: Path) -> None:
    ranks(2, repeated, tmp_path, timeout_s=200)


def failure(folder: Path, kind: str) -> tuple[str, list[str]]:
    """The name of the error that `check` raises; and its message, that of `charge`, and that of the next pass."""
    rank = dist.get_rank()
    short = kind == "capacity"
    limit = timedelta(milliseconds=0.2 if kind == "missing" else 1e6)
    _, own, exchange = make_layers(
        folder, spare=0 if short else 2, limit=limit, capacity=TOKENS * CHOICES if short else None
    )
    hidden, index, weight, _ = batch(0, TOKENS + 3 * rank if kind == "tokens" else TOKENS, 1000.0 if short else 3.0)
    if kind == "router" and rank == 1:
        index[3, 1], weight[4, 0] = -1, float("nan")
    if kind == "broadcast":
        own.flat.data.fill_(1.0)
    if kind == "pass":
        own._passes += rank
    if kind == "steps" and rank == 1:
        own.steps = 1
    if kind == "backward":
        outputs = [own(*batch(0)[:3]) for _ in range(2)]
        for before in outputs if rank else reversed(outputs):
            before.sum().backward()
    if kind == "missing" and rank == 1:
        dist.barrier()  # comes when the other has given up
    output = own(hidden, index, weight)
    if kind == "missing" and rank == 0:
        dist.barrier()
    assert output.isnan().all()
    assert output.shape == hidden.shape
    output.backward(torch.ones_like(output))
    assert own.flat.grad is not None
    assert own.flat.grad.isnan().any(dim=1).all()
    said = []
    for again in (exchange.check, lambda: exchange.charge(1.0), lambda: own(*batch(0)[:3])):
        with pytest.raises(Exception) as caught:
            again()
        said.append(str(caught.value))
    exchange.mailbox.close()
    return type(caught.value).__name__, said


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            "router",
            RouterError,
            "layer 1: router output of rank 1: 1 choices outside 0..5 and 1 weights that are not finite",
        ),
        ("tokens", PassError, "layer 1: 3 tokens more than max_tokens on rank 1"),
        ("capacity", InfeasibleError, "raise the cap or the capacity"),
        ("broadcast", RanksDifferError, "layer 1: ranks 0 and 1 hold the same part of the experts"),
        (
            "pass",
            MissedPassError,
            "layer 1: the ranks are not in the same pass: rank 0 in pass 1 of layer 1",
        ),
        ("steps", LayoutMismatchError, "write ShardedGradScaler"),
        ("backward", LayoutMismatchError, "of which passes they have run the backward, and in what order"),
        ("missing", MissedPassError, "rank 1 has not come to a pass in time"),
    ],
)
def test_all_ranks_fail_alike(ranks: Launch, tmp_path: Path, kind: str, error: type[Exception], message: str) -> None:
    for name, said in ranks(2, failure, tmp_path, kind, timeout_s=200):
        assert name == error.__name__
        assert message in said[0]
        assert said == said[:1] * 3


def priced(folder: Path) -> list[int]:
    _, _, exchange = make_layers(folder)
    told = []
    for price in (1000.0, 20.0):
        exchange.charge(price)
        told.append(int(exchange.options.min_tokens))
    exchange.mailbox.close()
    return told


def test_the_price_of_a_loan_may_fall(ranks: Launch, tmp_path: Path) -> None:
    assert ranks(2, priced, tmp_path, timeout_s=200) == [[1000, 20]] * 2


def meetings(folder: Path) -> None:
    _, _, exchange = make_layers(folder)
    rank, size = exchange.group.rank, exchange.group.size
    for number in range(6):
        time.sleep(0.05 * ((number + rank) % size))
        exchange.share.fill_(10 * number + rank)
        exchange.meet()
        for peer in range(size):
            # Seen through the addresses that kernels use.
            theirs = exchange.memory.held[peer]  # type: ignore[index]
            place = exchange.share.data_ptr() - exchange.memory.own.data_ptr()
            assert theirs[place : place + 4].view(torch.float32).item() == 10 * number + peer
        exchange.meet()
    assert exchange.state.item() == 12
    exchange.mailbox.close()


def test_after_a_meeting_all_ranks_see_what_was_written_before(ranks: Launch, tmp_path: Path) -> None:
    ranks(3, meetings, tmp_path, timeout_s=200)


def refusals(folder: Path) -> list[str]:
    group = make_group()
    quota = QuotaPlanner(SpillOptions.uniform(EXPERTS, 2, 1), 2)
    llep = LlepPlanner(SpillOptions.uniform(EXPERTS, 2, 1), 2)
    apart = QuotaPlanner(SpillOptions.uniform(EXPERTS, 2, 1, domain=1), 2)
    idle = QuotaPlanner(SpillOptions.uniform(EXPERTS, 2, 1, home=[0] * EXPERTS), 2)
    make: dict[str, Any] = {"max_tokens": 4, "choices": 2, "device": CPU, "memory": shared_memory(folder)}
    said = []
    for planner, shape, changes in (
        (llep, SHAPE, {}),
        (apart, SHAPE, {}),
        (idle, SHAPE, {}),
        (quota, ExpertShape(12, 8), {}),
        (quota, ExpertShape(16, 8, limit=7.0), {}),
        (quota, ExpertShape(16, 8, transposed=True), {}),
        (quota, SHAPE, {"capacity": 7}),
        (quota, SHAPE, {"capacity": 3, "rounds": 2}),
        (quota, SHAPE, {"rounds": 0}),
        (quota, SHAPE, {"max_tokens": 0}),
        (quota, SHAPE, {"device": torch.device("cuda"), "dtype": torch.float32}),
    ):
        with pytest.raises(ValueError) as caught:
            DeviceExchange(group, planner, shape, **make | changes)  # type: ignore[arg-type]
        said.append(str(caught.value))
    return said


def test_what_cannot_run_without_the_host_is_refused_by_name(ranks: Launch, tmp_path: Path) -> None:
    said, _ = ranks(2, refusals, tmp_path)
    expected = (
        "LlepPlanner",
        "one link domain",
        "must own",
        "expert.hidden = 12",
        "limit=7.0",
        "transposed=True",
        "capacity = 7: must be 8 to 16 rows with 1 rounds",
        "capacity = 3: must be 4 to 16 rows with 2 rounds",
        "rounds = 0",
        "max_tokens",
        "dtype",
    )
    for message, word in zip(said, expected, strict=True):
        assert word in message
    with pytest.raises(ValueError, match="group of one rank"):
        DeviceExchange(
            ExpertGroup(), QuotaPlanner(SpillOptions.uniform(4, 1, 0), 1), SHAPE, max_tokens=1, choices=1, device=CPU
        )


def test_an_old_torch_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu130")
    with pytest.raises(RuntimeError, match=r"torch 2\.10\.1\+cu130: .* 2\.11 or later"):
        symmetric_memory(None, 8, CPU)  # type: ignore[arg-type]


def test_layers_need_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; from moeplan.runtime_client import DeviceExchange, ResidentExperts"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
