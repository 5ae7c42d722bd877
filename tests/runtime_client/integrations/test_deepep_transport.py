"""The gradients of passes by DeepEP's collectives, against one process; a stand-in does what its wheel says it does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.support.repository import ROOT
from torch import Tensor

from moeplan.runtime_client.integrations.deepep import layout_of, physical_choices, redundancy_mapping, sent_by
from moeplan.runtime_client.integrations.deepep_transport import DeepEPTransport
from moeplan.runtime_client.integrations.versions import UnsupportedVersionError
from moeplan.solvers import ProblemError, QuotaPlanner, SpillOptions

EXPERTS, OWNED, SLOTS, HIDDEN, TOKENS, K = 4, 2, 1, 8, 12, 2


def installed(folder: Path, version: str) -> None:
    """What pip leaves of the wheel, beside the stand-in."""
    info = folder / f"sgl_deep_ep_v25-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: sgl-deep-ep-v25\nVersion: {version}\n")


@contextmanager
def found(*folders: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = before
        sys.modules.pop("deep_ep_v25", None)


def transport(elements: int = HIDDEN * HIDDEN) -> DeepEPTransport:
    group = dist.group.WORLD
    assert group is not None
    return DeepEPTransport(group, OWNED, SLOTS, elements, tokens=TOKENS, hidden=HIDDEN, k=K)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of all experts, and all ranks' tokens, of which most choose expert 0."""
    rng = torch.Generator().manual_seed(0)
    scores = torch.rand(2 * TOKENS, EXPERTS, generator=rng) + torch.tensor([1.0, 0.2, 0.1, 0.0])
    weight, index = scores.topk(K)
    hidden = torch.randn(2 * TOKENS, HIDDEN, generator=rng).bfloat16()
    return torch.randn(EXPERTS, HIDDEN * HIDDEN, generator=rng).bfloat16(), hidden, index, weight


def computed(experts: Tensor, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """What the experts of index [tokens, k] make of tokens, weighed; -1 is no expert."""
    each = torch.einsum("tkoh,th->tko", experts.unflatten(1, (HIDDEN, HIDDEN))[index.clamp(min=0)], hidden)
    return (each * (weight * (index >= 0)).to(each.dtype)[..., None]).sum(dim=1)


def train(folder: Path) -> int:
    rank = dist.get_rank()
    leaves = [part.float().requires_grad_(part.is_floating_point()) for part in batch()]
    experts, hidden, index, weight = leaves[0], leaves[1], batch()[2], leaves[3]
    expected = computed(experts, hidden, index, weight)
    expected.square().sum().backward()

    counts = np.stack([np.bincount(part.flatten(), minlength=EXPERTS) for part in index.chunk(2)])
    options = SpillOptions.uniform(EXPERTS, 2, SLOTS)
    plan = QuotaPlanner(options, 2).plan(counts)
    mapping = redundancy_mapping(plan, options)
    layout = layout_of(mapping, EXPERTS)
    physical = physical_choices(index.chunk(2)[rank].numpy(), sent_by(rank, plan, layout), layout)
    mine = [part.chunk(2)[rank].detach().clone().requires_grad_() for part in (batch()[0], batch()[1], weight)]
    with found(folder, ROOT / "tests/support/stand_ins"):
        through = transport()
        held = torch.cat([mine[0], through.lend(mine[0], mapping)])
        rows, slot, received, handle = through.dispatch(mine[1], torch.from_numpy(physical), mine[2])
        results = computed(held, rows, slot, received)
        output = through.combine(results.bfloat16(), handle)
        output.float().square().sum().backward()
    for got, wanted in zip(
        [output, *(part.grad for part in mine)], [expected, *(p.grad for p in (experts, hidden, weight))], strict=True
    ):
        assert got is not None and wanted is not None  # noqa: PT018
        own = wanted.detach().chunk(2)[rank]
        torch.testing.assert_close(got.float(), own, rtol=0.05, atol=0.02 * float(own.abs().max()))
    with pytest.raises(ProblemError, match=r"mapping = array of shape \(2, 3\): must be \[ranks, 1\]"):
        through.lend(mine[0], np.full((2, 3), -1, np.int32))
    return plan.replicas


def test_a_pass_has_the_gradients_of_one_process(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    installed(tmp_path, "0.1.0rc0")
    assert ranks(2, train, tmp_path) == [1, 1]


def refused(folder: Path) -> None:
    with pytest.raises(UnsupportedVersionError, match=r"sgl-deep-ep-v25 is not installed; .* 0\.1\.x"):
        transport()
    with (
        found(folder),
        pytest.raises(UnsupportedVersionError, match=r"sgl-deep-ep-v25 0\.2\.0 is installed; .* 0\.1\.x"),
    ):
        transport()


def test_without_its_wheel_or_with_another_release_it_is_refused(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    installed(tmp_path, "0.2.0")
    ranks(1, refused, tmp_path)


def odd(folder: Path) -> None:
    with found(folder), pytest.raises(ProblemError, match="elements = 63: must be a multiple of 8"):
        transport(63)


def test_experts_that_it_cannot_move_are_refused(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    installed(tmp_path, "0.1.0rc0")
    ranks(1, odd, tmp_path)
