"""Synthetic traces with known skew, drift, locality and affinity.

Tokens belong to topics. In every layer a topic prefers its own experts, so the experts that a token meets in two layers
depend on each other (`affinity`), and sources that read different topics ask for different experts (`locality`). On top
of that every layer's experts differ in popularity (`skew`, Zipf), and popularity wanders from step to step (`drift`).

A token's experts are drawn from its topic's distribution, independently for each of its `top_k` picks and each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["SyntheticTrace", "generate"]


@dataclass(frozen=True, slots=True)
class SyntheticTrace:
    """Description of a trace to generate.

    Attributes:
        steps: Training steps.
        layers: MoE layers.
        sources: Ranks whose tokens are routed.
        experts: Experts per layer.
        top_k: Experts per token.
        tokens_per_rank: Tokens that each source routes per step.
        skew: Exponent of Zipf's law over the experts of a layer; 0 for equal popularity.
        drift: Standard deviation by which the logarithm of each popularity changes per step.
        locality: Part of a source's tokens that come from its own topic; the others come from all topics alike.
        affinity: Standard deviation of the logarithm of a topic's preference for an expert; 0 for topics that agree.
        topics: Number of topics; source i of n reads topic ``i * topics // n``.
        seed: Seed of every draw.

    Raises:
        ProblemError: a value is out of range.
    """

    steps: int = 100
    layers: int = 4
    sources: int = 16
    experts: int = 64
    top_k: int = 4
    tokens_per_rank: int = 4096
    skew: float = 0.6
    drift: float = 0.02
    locality: float = 0.0
    affinity: float = 1.0
    topics: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "sources", "experts", "top_k", "tokens_per_rank", "topics"):
            if getattr(self, name) < 1:
                raise ProblemError(name, getattr(self, name), "must be at least 1")
        if self.top_k > self.experts:
            raise ProblemError("top_k", self.top_k, f"must be at most the number of experts ({self.experts})")
        for name, most in (("skew", 10.0), ("drift", 10.0), ("affinity", 10.0), ("locality", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ProblemError(name, getattr(self, name), f"must be 0 to {most:g}")
        if not 0 <= self.seed < 2**32:
            raise ProblemError("seed", self.seed, "must be 0 to 2**32 - 1")


def generate(wanted: SyntheticTrace, on_step: Callable[[], None] = lambda: None) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of a trace file, by name.

    Args:
        wanted: What to generate.
        on_step: Called after every step, for progress.

    Returns:
        ``counts`` uint32[steps, layers, sources, experts], ``pairs`` int64[layers - 1, experts, experts] (expected
        counts given the topics of all tokens, in whole numbers), and the scalars that describe a trace.
    """
    rng = np.random.default_rng(wanted.seed)
    shape = (wanted.layers, wanted.experts)
    rank = np.stack([rng.permutation(wanted.experts) for _ in range(wanted.layers)])
    popularity = -wanted.skew * np.log1p(rank)
    taste = wanted.affinity * rng.standard_normal((wanted.topics, *shape))
    own = np.arange(wanted.sources) * wanted.topics // wanted.sources
    mix = np.full((wanted.sources, wanted.topics), (1 - wanted.locality) / wanted.topics)
    mix[np.arange(wanted.sources), own] += wanted.locality
    counts = np.empty((wanted.steps, wanted.layers, wanted.sources, wanted.experts), np.uint32)
    pairs = np.zeros((wanted.layers - 1, wanted.experts, wanted.experts))
    for step in range(wanted.steps):
        of_topic: Int64 = np.asarray(rng.multinomial(wanted.tokens_per_rank, mix))  # by source, topic
        chance = _softmax(popularity + taste)
        picks = of_topic[:, :, None] * wanted.top_k
        routed: Int64 = np.asarray(rng.multinomial(picks, chance[None]))  # by source, topic, layer, expert
        counts[step] = routed.sum(axis=1).transpose(1, 0, 2)
        pairs += _pairs(routed.sum(axis=0), of_topic.sum(axis=0))
        popularity += wanted.drift * rng.standard_normal(shape)
        on_step()
    return {
        "counts": counts,
        "pairs": np.rint(pairs).astype(np.int64),
        "first_step": np.array(0),
        "top_k": np.array(wanted.top_k),
        "tokens_per_rank": np.array(wanted.tokens_per_rank),
    }


def _softmax(logits: Float64) -> Float64:
    """Chances over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    chances: Float64 = weights / weights.sum(axis=-1, keepdims=True)
    return chances


def _pairs(routed: Int64, tokens: Int64) -> Float64:
    """float64[layers - 1, experts, experts]: expected pairs, `routed` [topics, layers, experts], `tokens` [topics].

    A topic's tokens choose in each layer independently, so of n tokens with a and b picks of two experts a b / n pairs
    are expected.
    """
    here, there = routed[:, :-1].astype(np.float64), routed[:, 1:] / np.maximum(tokens, 1)[:, None, None]
    return np.einsum("tle,tlf->lef", here, there)
