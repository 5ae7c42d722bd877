"""Balanced assignment of tokens to experts: the auction beside LAPJV, cold and from the prices of the step before.

    python benchmarks/assignment.py [--out FILE.json]

Scores are dot products of token features with expert centroids, as a BASE layer's are; features share a mean, so that
the experts differ in popularity and the router alone would be far from balance. `next step` moves every centroid and
draws new tokens. Times are the best of several runs, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.solvers import Assignment, balanced_assignment, optimal_assignment
from result_file import Columns, write_result
from result_table import show_rows

Scores = npt.NDArray[np.float32]

REPEATS = 5
WIDTH = 64
SIZES = [(1024, 8), (1022, 8), (2048, 64), (4096, 64), (16384, 64), (4096, 256)]
LAPJV_TOKENS = 2048
"""Tokens up to which the cubic reference is run."""
COLUMNS: Columns = {
    "size": ("tokens x experts", "{}"),
    "top_1": ("top-1 max/mean", "{:.2f}"),
    "ms": ("ms", "{:.2f}"),
    "ms_next_step": ("ms, next step", "{:.2f}"),
    "gap_proven": ("gap proven", "{:.4%}"),
    "lapjv_ms": ("LAPJV ms", "{:.0f}"),
    "gap_in_truth": ("gap in truth", "{:.4%}"),
}


def steps(tokens: int, experts: int) -> tuple[Scores, Scores]:
    """Scores of two consecutive steps."""
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((experts, WIDTH)) / np.sqrt(WIDTH)
    mean = rng.standard_normal(WIDTH)
    first = (rng.standard_normal((tokens, WIDTH)) + mean) @ centroids.T
    centroids += 0.02 * rng.standard_normal(centroids.shape) / np.sqrt(WIDTH)
    second = (rng.standard_normal((tokens, WIDTH)) + mean) @ centroids.T
    return first.astype(np.float32), second.astype(np.float32)


def best_of(run: Callable[[], Assignment]) -> tuple[Assignment, float]:
    """The answer, and the least seconds that it took."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        answer = run()
        seconds.append(time.perf_counter() - start)
    return answer, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    for compiles in (balanced_assignment, optimal_assignment):
        compiles(np.eye(4, dtype=np.float32))
    rows: list[dict[str, Any]] = []
    for tokens, experts in SIZES:
        first, second = steps(tokens, experts)
        alone = np.bincount(second.argmax(axis=1), minlength=experts).max() * experts / tokens
        prices = balanced_assignment(first).prices
        cold, cold_s = best_of(lambda scores=second: balanced_assignment(scores))  # type: ignore[misc]
        warm, warm_s = best_of(lambda scores=second, p=prices: balanced_assignment(scores, prices=p))  # type: ignore[misc]
        row = {
            "size": f"{tokens} x {experts}",
            "top_1": float(alone),
            "ms": cold_s * 1e3,
            "ms_next_step": warm_s * 1e3,
            "gap_proven": float(cold.gap / abs(cold.value)),
            "lapjv_ms": None,
            "gap_in_truth": None,
        }
        if tokens <= LAPJV_TOKENS:
            start = time.perf_counter()
            best = optimal_assignment(second)
            row["lapjv_ms"] = (time.perf_counter() - start) * 1e3
            row["gap_in_truth"] = float(1 - warm.value / best.value)
        rows.append(row)
    show_rows("Tokens to experts in equal numbers", rows, COLUMNS)
    if arguments.out:
        write_result(arguments.out, rows)


if __name__ == "__main__":
    main()
