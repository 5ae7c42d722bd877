"""TensorRT-LLM's expert statistics (`EXPERT_STATISTIC_ITER_RANGE`, `EXPERT_STATISTIC_PATH`).

A folder with ``meta_info.json`` and a file ``rank{r}.safetensors`` per rank, whose tensors ``"{iteration}_{layer}"``
are counts of logical experts, [experts]. Layers are decoder layers, dense ones counted but not recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from moeplan.planner.traces.formats.recording import MOST_EXPERTS, Recording, counts_of
from moeplan.planner.traces.formats.tensor_file import TensorFile
from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import Int64

__all__ = ["is_tensorrt_llm", "read_tensorrt_llm"]

NAME = re.compile(r"rank(\d{1,9})\.safetensors")
KEY = re.compile(r"(\d{1,15})_(\d{1,15})")


def is_tensorrt_llm(path: Path) -> bool:
    """True if the folder holds such statistics."""
    return (path / "meta_info.json").is_file()


def read_tensorrt_llm(paths: Sequence[Path]) -> Recording:
    """The statistics of one folder."""
    if len(paths) != 1 or not paths[0].is_dir():
        raise TraceError(paths[-1], "give one folder, which holds meta_info.json and rank0.safetensors")
    (folder,) = paths
    try:
        experts = int(json.loads((folder / "meta_info.json").read_text())["num_experts"])
    except (OSError, ValueError, OverflowError, RecursionError, KeyError, TypeError) as error:
        raise TraceError(folder / "meta_info.json", f"does not tell num_experts ({type(error).__name__})") from None
    if not 1 <= experts <= MOST_EXPERTS:
        raise TraceError(folder / "meta_info.json", f"must be 1 to {MOST_EXPERTS}", "num_experts", experts)
    files = {int(match[1]): file for file in folder.iterdir() if (match := NAME.fullmatch(file.name))}
    if not files:
        raise TraceError(folder, "holds no rank0.safetensors")
    ranks = [TensorFile.open(files[rank]) for rank in sorted(files)]
    named = {key for rank in ranks for key in _keys(rank.places)}
    every = set.intersection(*(_keys(rank.whole()) for rank in ranks))
    layers = sorted({layer for _, layer in named})
    numbers = sorted({step for step, _ in named})
    whole = [step for step in numbers if all((step, layer) in every for layer in layers)]
    if not whole:
        raise TraceError(folder, "no iteration holds every layer on every rank")
    dropped = [
        f"{rank.path}, which was cut off: {len(rank.places) - len(rank.whole())} of {len(rank.places)} counts"
        for rank in ranks
        if len(rank.whole()) < len(rank.places)
    ]
    if len(whole) < len(numbers):
        dropped.append(f"{len(numbers) - len(whole)} iterations that some rank or layer lacks")

    def steps() -> Iterator[Int64]:
        for step in whole:
            counts = np.zeros((len(layers), len(ranks), experts), np.int64)
            for source, rank in enumerate(ranks):
                for row, layer in enumerate(layers):
                    name = f"{step}_{layer}"
                    found = counts_of(rank.path, name, rank.read(name), 1)
                    if len(found) != experts:
                        raise TraceError(rank.path, f"must have {experts} experts", name, len(found))
                    counts[row, source] = found
            yield counts

    return Recording(layers, len(files), experts, steps(), first_step=whole[0], total=len(whole), dropped=dropped)


def _keys(names: Iterable[str]) -> set[tuple[int, int]]:
    """Iteration and layer of each name."""
    return {(int(match[1]), int(match[2])) for name in names if (match := KEY.fullmatch(name))}
