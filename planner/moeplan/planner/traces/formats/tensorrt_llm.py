"""TensorRT-LLM's expert statistics (`EXPERT_STATISTIC_ITER_RANGE`, `EXPERT_STATISTIC_PATH`).

A folder with ``meta_info.json`` and a file ``rank{r}.safetensors`` per rank, whose tensors ``"{iteration}_{layer}"``
are counts of logical experts, [experts]. Layers are decoder layers, dense ones counted but not recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.planner.traces.formats.recording import Recording, counts_of
from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import Int64

__all__ = ["is_tensorrt_llm", "read_tensorrt_llm"]

NAME = re.compile(r"rank(\d+)\.safetensors")
KEY = re.compile(r"(\d+)_(\d+)")


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(folder / "meta_info.json", f"does not tell num_experts ({type(error).__name__})") from None
    files = {int(match[1]): file for file in folder.iterdir() if (match := NAME.fullmatch(file.name))}
    if not files:
        raise TraceError(folder, "holds no rank0.safetensors")
    with ExitStack() as stack:
        keys = [set(_keys(stack.enter_context(_open(files[rank])))) for rank in sorted(files)]
    every = set.intersection(*keys)
    layers = sorted({layer for _, layer in set.union(*keys)})
    numbers = sorted({step for step, _ in set.union(*keys)})
    whole = [step for step in numbers if all((step, layer) in every for layer in layers)]
    if not whole:
        raise TraceError(folder, "no iteration holds every layer on every rank")
    dropped = []
    if len(whole) < len(numbers):
        dropped.append(f"{len(numbers) - len(whole)} iterations that some rank or layer lacks")

    def steps() -> Iterator[Int64]:
        with ExitStack() as opened:
            ranks = [opened.enter_context(_open(files[rank])) for rank in sorted(files)]
            for step in whole:
                counts = np.zeros((len(layers), len(ranks), experts), np.int64)
                for source, file in enumerate(ranks):
                    for row, layer in enumerate(layers):
                        found = counts_of(folder, f"{step}_{layer}", file.get_tensor(f"{step}_{layer}"), 1)
                        if len(found) != experts:
                            raise TraceError(folder, f"must have {experts} experts", f"{step}_{layer}", len(found))
                        counts[row, source] = found
                yield counts

    return Recording(layers, len(files), experts, steps(), first_step=whole[0], total=len(whole), dropped=dropped)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise TraceError(path, f"is no safetensors file, or was cut off ({error})") from None


def _keys(file: Any) -> Iterator[tuple[int, int]]:
    for key in sorted(file.keys()):
        if match := KEY.fullmatch(key):
            yield int(match[1]), int(match[2])
