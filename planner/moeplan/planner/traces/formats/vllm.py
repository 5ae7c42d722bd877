"""Expert loads of vLLM, in either of two forms. Layers are MoE layers in order, without the dense ones.

Load statistics (proposed, vllm-project/vllm#41141): one JSON object per line, of physical experts.
``expert_load[layer][slot]`` is summed over ranks, ``p2l_map[layer][slot]`` says which expert a slot held.

A load history, as benchmarks of vLLM's planner have it (`expert-load.json` of ADRS): a JSON object with the array
``load_history``, whose elements hold ``logical_expert_load[layer][expert]`` of one rebalancing interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.planner.traces.formats.json_array import json_elements
from moeplan.planner.traces.formats.recording import Recording, counts_of, experts_of, json_lines, start_of
from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import Int64

__all__ = ["is_vllm", "read_vllm"]

HISTORY, LOAD = "load_history", "logical_expert_load"
HISTORY_KEY = f'"{HISTORY}"'.encode()


def is_vllm(path: Path) -> bool:
    """True if the content is such a recording."""
    head = start_of(path)
    return b'"eplb_load_stats"' in head or HISTORY_KEY in head


def read_vllm(paths: Sequence[Path]) -> Recording:
    """The records of all files, one after the other."""
    return _history(paths) if HISTORY_KEY in start_of(paths[0]) else _statistics(paths)


def _history(paths: Sequence[Path]) -> Recording:
    dropped: list[str] = []
    loads = (
        counts_of(path, LOAD, element.get(LOAD) if isinstance(element, dict) else None, 2)
        for path in paths
        for element in json_elements(path, HISTORY, dropped)
    )
    first = next(loads, None)
    if first is None:
        raise TraceError(paths[0], f"holds no whole element in {HISTORY}")
    layers, experts = first.shape
    return Recording(
        range(layers), 1, experts, (load[:, np.newaxis] for load in chain([first], loads)), dropped=dropped
    )


def _statistics(paths: Sequence[Path]) -> Recording:
    dropped: list[str] = []
    records = ((path, record) for path in paths for record in json_lines(path, dropped))
    loads = ((path, record) for path, record in records if record.get("record_type") == "eplb_load_stats")
    first = next(loads, None)
    if first is None:
        raise TraceError(paths[0], "holds no record of type eplb_load_stats")
    p2l = counts_of(first[0], "p2l_map", first[1].get("p2l_map"), 2)
    shape = (len(p2l), experts_of(first[0], "p2l_map", p2l))
    steps = (_logical(path, record, shape) for path, record in chain([first], loads))
    number = first[1].get("step", 0)
    start = number if isinstance(number, int) else 0
    return Recording(range(shape[0]), 1, shape[1], steps, first_step=start, dropped=dropped)


def _logical(path: Path, record: dict[str, Any], shape: tuple[int, int]) -> Int64:
    load = counts_of(path, "expert_load", record.get("expert_load"), 2)
    p2l = counts_of(path, "p2l_map", record.get("p2l_map"), 2)
    if load.shape != p2l.shape or len(load) != shape[0] or p2l.max(initial=0) >= shape[1]:
        raise TraceError(path, f"must be as large as p2l_map, {p2l.shape}", "expert_load", load.shape)
    counts = np.zeros((shape[0], 1, shape[1]), np.int64)
    for layer in range(shape[0]):
        np.add.at(counts[layer, 0], p2l[layer], load[layer])
    return counts
