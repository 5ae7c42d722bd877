"""What passes without the host are tried with on CPUs: a small layer, tokens, layouts, and when answers are equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime_client.layers.dividing import Division, PlannedLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.solvers import Cluster, ExpertSpec, Layout, SplitRule

SHAPE, EXPERTS, CHOICES, TOKENS = ExpertShape(16, 24), 6, 2, 20
CPU = torch.device("cpu")
TOLERANCE = 1e-5


def fill_unused_memory() -> None:
    """From now on this rank's new tensors hold what is not a number until they are written: no result may show it."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def batch(seed: int, tokens: int = TOKENS, skew: float = 3.0) -> list[Tensor]:
    """This rank's tokens, choices, weights and a gradient; the larger the skew, the more go to the first experts."""
    random = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    hidden, gradient = torch.randn(2, tokens, SHAPE.hidden, generator=random)
    weight, place = torch.rand(2, tokens, CHOICES, generator=random)
    return [hidden, (place**skew * EXPERTS).long().clamp(max=EXPERTS - 1), weight, gradient]


def uneven_batch(seed: int, skew: float = 3.0) -> list[Tensor]:
    """As `batch`, with other numbers of tokens on the ranks, none among them."""
    return batch(seed, (TOKENS, 0, 13)[(seed + dist.get_rank()) % 3], skew)


def assert_close(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Equal but for the rounding of sums in another order."""
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        if one.numel():
            assert float((one - other).abs().max()) <= TOLERANCE * max(1.0, float(one.abs().max()))


def draw_plan(rng: np.random.Generator, devices: int, experts: int) -> PlannedLayer:
    """Any number of replicas, in any slots, some of them empty, of any speeds, by either rule; none idle."""
    placed = rng.random((devices, experts)) < rng.choice([0.0, 0.4, 0.9])
    owners = rng.permutation(np.append(np.arange(devices), rng.integers(devices, size=experts - devices)))
    placed[owners, np.arange(experts)] = True
    width = int(placed.sum(axis=1).max()) + int(rng.integers(3))
    slots = np.full((devices, width), -1, np.int32)
    for device in range(devices):
        held = rng.permutation(np.flatnonzero(placed[device]))
        slots[device, rng.permutation(width)[: len(held)]] = held
    cluster = Cluster.uniform(devices, 1, speed=rng.choice([1.0, 0.5, 0.75], devices))
    division = Division(cluster, ExpertSpec(), rng.choice([SplitRule.OPTIMAL, SplitRule.EVEN]))
    return PlannedLayer(Layout(slots, experts), division)
