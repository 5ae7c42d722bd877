"""What a step will route, sample by sample, and where its samples are computed."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Int32, Int64, integers
from moeplan.solvers.problem.cluster import MAX_DEVICES
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.scalars import integer, short

__all__ = ["KnownRoutes", "count_choices"]

_MAX_EXPERTS = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class KnownRoutes:
    """The routes of one step, and the micro-batch and rank of every position of its batch.

    A step ends with an update of the weights. Frameworks deal by position: where a sample stands in the batch says in
    which micro-batch and on which rank it is computed. So a plan that deals anew is an order of the samples.

    Several expert-parallel groups that hold the same experts compute micro-batch m at the same time: number that of
    group g ``g * micro_batches + m``.

    Attributes:
        counts: int32[samples, layers, experts], tokens of each sample that go to each expert; see `count_choices`.
        micro_batch: int32[samples], micro-batch of each position.
        source: int32[samples], rank of each position within its expert-parallel group.
        sources: Ranks of the group.

    Raises:
        ProblemError: a value is out of range, an array is empty, or lengths differ.
    """

    counts: Int32
    micro_batch: Int32
    source: Int32
    sources: int

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "counts", integers("routes.counts", self.counts, ndim=3, dtype=np.int32, low=0))
        if self.counts.size == 0:
            raise ProblemError("routes.counts", f"array of shape {self.counts.shape}", "must not be empty")
        set_(self, "sources", integer("routes.sources", self.sources, 1, MAX_DEVICES))
        for name, high in (("micro_batch", self.samples - 1), ("source", self.sources - 1)):
            values = integers(f"routes.{name}", getattr(self, name), ndim=1, dtype=np.int32, low=0, high=high)
            if len(values) != self.samples:
                raise ProblemError(
                    f"routes.{name}", f"{len(values)} values", f"must have one per sample ({self.samples})"
                )
            set_(self, name, values)

    @classmethod
    def by_rank(cls, counts: npt.ArrayLike, ranks: int, size: int) -> KnownRoutes:
        """Samples dealt as verl and NeMo-RL do: each rank has a run of them, cut into micro-batches.

        Args:
            counts: int[samples, layers, experts].
            ranks: Ranks of the expert-parallel group.
            size: Samples of a rank in a micro-batch.

        Raises:
            ProblemError: ``ranks * size`` does not divide the samples, or a value is out of range.
        """
        checked, each = _dealt(counts, ranks, size)
        position = np.arange(len(checked), dtype=np.int32)
        return cls(checked, position % each // size, position // each, ranks)

    @classmethod
    def in_turn(cls, counts: npt.ArrayLike, ranks: int, size: int) -> KnownRoutes:
        """Samples dealt as slime does: runs of `size` samples go to the ranks in turn.

        Args:
            counts: int[samples, layers, experts].
            ranks: Ranks of the expert-parallel group.
            size: Samples of a rank in a micro-batch.

        Raises:
            ProblemError: ``ranks * size`` does not divide the samples, or a value is out of range.
        """
        checked, _ = _dealt(counts, ranks, size)
        run = np.arange(len(checked), dtype=np.int32) // size
        return cls(checked, run // ranks, run % ranks, ranks)

    @property
    def samples(self) -> int:
        """Samples of the step."""
        return self.counts.shape[0]

    @property
    def layers(self) -> int:
        """MoE layers."""
        return self.counts.shape[1]

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return self.counts.shape[2]

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the step."""
        return int(self.micro_batch.max()) + 1

    @property
    def tokens(self) -> Int64:
        """int64[samples]: choices of each sample in a layer, so k times its tokens."""
        tokens: Int64 = self.counts.sum(axis=2, dtype=np.int64).max(axis=1)
        return tokens

    def loads(self, order: Int64) -> Int64:
        """int64[micro_batches, layers, experts], tokens of each expert from all ranks.

        Args:
            order: int64[samples], the sample at each position.
        """
        return np.stack([_sum(self.counts[order[self.micro_batch == m]]) for m in range(self.micro_batches)])

    def demand(self, order: Int64, micro_batch: int) -> Int64:
        """int64[layers, sources, experts], tokens of one micro-batch.

        Args:
            order: int64[samples], the sample at each position.
            micro_batch: Its number.
        """
        here = self.micro_batch == micro_batch
        return np.stack([_sum(self.counts[order[here & (self.source == s)]]) for s in range(self.sources)], axis=1)


def _dealt(counts: npt.ArrayLike, ranks: int, size: int) -> tuple[Int32, int]:
    """The counts, int32[samples, layers, experts], and the samples of a rank."""
    integer("ranks", ranks, 1, MAX_DEVICES)
    integer("size", size, 1)
    checked = integers("routes.counts", counts, ndim=3, dtype=np.int32, low=0)
    samples = len(checked)
    if samples % (ranks * size):
        raise ProblemError(
            "routes.counts", f"{samples} samples", f"must be a multiple of ranks * size ({ranks * size})"
        )
    return checked, samples // ranks


def count_choices(choices: Sequence[npt.ArrayLike], experts: int) -> Int32:
    """The choices of recorded tokens as counts, int32[samples, layers, experts].

    A token without a route in a layer is not counted there: one that names an expert below 0, or the same one twice, as
    recorders fill what they did not see.

    Args:
        choices: int[tokens, layers, k] of each sample, experts chosen; arrays, or tensors on the CPU.
        experts: Experts of a layer.

    Raises:
        ProblemError: there are no samples, they differ in layers or k, or an expert does not exist.
    """
    integer("experts", experts, 1, _MAX_EXPERTS)
    if not isinstance(choices, Sized):
        raise ProblemError("choices", short(choices), "must be a list with the choices of each sample")
    if not len(choices):
        raise ProblemError("choices", "no samples", "must hold the choices of at least one")
    counts: Any = None
    shape: tuple[int, ...] = ()
    for i, sample in enumerate(choices):
        chosen = integers(f"choices[{i}]", sample, ndim=3, dtype=np.int32, high=experts - 1)
        if counts is None:
            shape = chosen.shape[1:]
            counts = np.zeros((len(choices), shape[0], experts), np.int32)
        if chosen.shape[1:] != shape:
            raise ProblemError(
                f"choices[{i}]", f"array of shape {chosen.shape}", f"must be [tokens, {shape[0]}, {shape[1]}]"
            )
        _count(chosen, counts[i])
    frozen: Int32 = counts
    return frozen


def _sum(counts: Int32) -> Int64:
    total: Int64 = counts.sum(axis=0, dtype=np.int64)
    return total


@kernel
def _count(chosen: Int32, counts: Int32) -> None:
    tokens, layers, k = chosen.shape
    for t in range(tokens):
        for layer in range(layers):
            routed = True
            for a in range(k):
                routed &= chosen[t, layer, a] >= 0
                for b in range(a):
                    routed &= chosen[t, layer, a] != chosen[t, layer, b]
            if routed:
                for a in range(k):
                    counts[layer, chosen[t, layer, a]] += 1
