"""Synthetic traces have the properties that they were asked for, and can be planned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.planner.commands.test_main import moeplan

from moeplan.planner.traces.synthetic import SyntheticTrace, generate
from moeplan.planner.traces.trace import Trace, TraceError
from moeplan.planner.traces.writer import write_trace
from moeplan.solvers import ProblemError


def counts_of(**wanted: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Counts of a small trace, as float64[steps, layers, sources, experts]."""
    settings = {"steps": 8, "layers": 2, "sources": 8, "experts": 16, "top_k": 2, "tokens_per_rank": 2048} | wanted
    return np.asarray(generate(SyntheticTrace(**settings))["counts"], np.float64)


def test_tokens_are_conserved_and_the_seed_decides() -> None:
    wanted = SyntheticTrace(steps=4, sources=4, experts=16, top_k=2, tokens_per_rank=500, seed=3)
    one, two = generate(wanted), generate(wanted)
    assert all((one[name] == two[name]).all() for name in one)
    counts, pairs = np.asarray(one["counts"]), np.asarray(one["pairs"])
    assert (counts.sum(axis=3) == 1000).all()
    assert pairs.shape == (3, 16, 16)
    assert pairs.sum(axis=(1, 2)) == pytest.approx(np.full(3, 4 * 4 * 500 * 4), rel=0.01)
    assert (
        counts != generate(SyntheticTrace(steps=4, sources=4, experts=16, top_k=2, tokens_per_rank=500))["counts"]
    ).any()


def test_each_property_does_what_it_says() -> None:
    def hottest(counts: np.ndarray[Any, np.dtype[np.float64]]) -> float:
        loads = counts.sum(axis=(0, 2))
        return float((loads.max(axis=1) / loads.mean(axis=1)).mean())

    assert hottest(counts_of(skew=0, affinity=0, drift=0)) < 1.1
    assert hottest(counts_of(skew=1.2, affinity=0, drift=0)) > 3

    def apart(counts: np.ndarray[Any, np.dtype[np.float64]]) -> float:
        share = counts.sum(axis=0) / counts.sum(axis=(0, 3))[..., None]
        return float(np.abs(share - share.mean(axis=1, keepdims=True)).sum(axis=2).mean() / 2)

    assert apart(counts_of(locality=0.0)) < 0.05
    assert apart(counts_of(locality=0.8)) > 0.15

    def wander(counts: np.ndarray[Any, np.dtype[np.float64]]) -> float:
        loads = counts.sum(axis=2)
        return float(np.abs(loads[-1] - loads[0]).sum() / loads[0].sum())

    assert wander(counts_of(drift=0.0)) < 0.05
    assert wander(counts_of(drift=0.3)) > 0.2


def test_a_written_trace_is_read_back(tmp_path: Path) -> None:
    arrays = generate(SyntheticTrace(steps=3, layers=3, sources=2, experts=8, top_k=2, tokens_per_rank=100))
    path = tmp_path / "synthetic.npz"
    write_trace(path, arrays)
    trace = Trace.open(path)
    assert (trace.steps, trace.layers, trace.sources, trace.experts) == (3, 3, 2, 8)
    assert (trace.top_k, trace.tokens_per_rank, trace.first_step) == (2, 100, 0)
    assert (np.stack(list(trace.read())) == arrays["counts"]).all()
    pairs = trace.pairs()
    assert pairs is not None
    assert (pairs == arrays["pairs"]).all()


@pytest.mark.parametrize(
    "pairs",
    [np.ones((1, 8, 8)), np.ones((2, 8, 8), np.int64), np.ones((1, 8, 4), np.int64), -np.ones((1, 8, 8), np.int64)],
)
def test_broken_pairs_are_explained(tmp_path: Path, pairs: np.ndarray[Any, np.dtype[Any]]) -> None:
    path = tmp_path / "broken.npz"
    np.savez(path, counts=np.ones((2, 2, 1, 8), np.int64), pairs=pairs)
    with pytest.raises(TraceError, match="pairs"):
        Trace.open(path).pairs()


@pytest.mark.parametrize(
    ("wanted", "field"),
    [({"steps": 0}, "steps"), ({"top_k": 99}, "top_k"), ({"skew": -1}, "skew"), ({"locality": 1.5}, "locality")],
)
def test_impossible_wishes_are_explained(wanted: dict[str, Any], field: str) -> None:
    with pytest.raises(ProblemError) as error:
        SyntheticTrace(**wanted)
    assert error.value.field == field


def test_generate_then_place_by_affinity(tmp_path: Path) -> None:
    trace, plan = tmp_path / "synthetic.npz", tmp_path / "plan.json"
    sizes = ("--steps", 12, "--layers", 3, "--sources", 8, "--experts", 16, "--top-k", 2, "--affinity", 2)
    assert "12 steps" in moeplan("trace", "generate", trace, *sizes).stdout
    text = moeplan("affinity", trace, "--devices", 8, "--nodes", 2, "--ilp-seconds", 2, "-o", plan).stdout
    ordered, placed, proof = (float(word.rstrip("%")) for word in text.split() if word.endswith("%"))
    assert proof <= placed < ordered
    document = json.loads(plan.read_text())
    assert document["affinity"]["crossing"] / document["affinity"]["transitions"] == pytest.approx(
        placed / 100, abs=1e-3
    )
    assert len(document["layers"]) == 3
    bare = tmp_path / "bare.npz"
    np.savez(bare, counts=np.ones((2, 2, 1, 8), np.int64))
    assert "affinity needs pairs" in moeplan("affinity", bare, "--devices", 4, code=2).stderr
    assert "skew = -1" in moeplan("trace", "generate", trace, "--skew", -1, code=2).stderr
