"""Engines: the needs of each of a plan, and the writing and reading of its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeplan.planner.errors import FileError
from moeplan.planner.exports.deepep_mapping import write_deepep
from moeplan.planner.exports.model_layouts import ModelLayouts
from moeplan.planner.exports.sglang_location import read_sglang, write_sglang
from moeplan.planner.exports.tensorrt_llm_assignments import read_tensorrt_llm, write_tensorrt_llm
from moeplan.planner.exports.vllm_ascend_map import read_vllm_ascend, write_vllm_ascend
from moeplan.planner.exports.vllm_mapping import read_vllm, write_vllm
from moeplan.planner.files.plan_file import PlanFile, is_plan
from moeplan.solvers import Layout, SplitRule

__all__ = ["ENGINES", "Engine", "homes", "read_any"]


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine.

    Attributes:
        split_rule: How it divides an expert's tokens among replicas; None where the caller's own router does.
        at_home: Whether every expert must stay on its home rank, contiguous.
        write: The content of its file.
        read: Layouts of its file by layer, given the number of devices where the file does not tell; None where files
            do not tell enough.
    """

    split_rule: SplitRule | None
    at_home: bool
    write: Callable[[ModelLayouts], str | bytes]
    read: Callable[[Path, int | None], dict[int, Layout]] | None


ENGINES = {
    "sglang": Engine(SplitRule.EVEN, False, write_sglang, read_sglang),
    "vllm": Engine(SplitRule.EVEN, False, write_vllm, read_vllm),
    "tensorrt-llm": Engine(SplitRule.EVEN, False, write_tensorrt_llm, read_tensorrt_llm),
    "vllm-ascend": Engine(SplitRule.EVEN, False, write_vllm_ascend, read_vllm_ascend),
    "deepep": Engine(None, True, write_deepep, None),
}
"""By name."""

_MARKS = {
    "sglang": "physical_to_logical_map",
    "vllm": "eplb_initial_mapping",
    "vllm-ascend": "device_list",
    "tensorrt-llm": "initial_global_assignments",
}
"""A word that stands in the files of each, in the order in which they are asked."""


def homes(experts: int, devices: int) -> list[list[int]]:
    """Pairs of expert and home device, contiguous, for `Constraints.pinned`."""
    return [[expert, int(device)] for expert, device in enumerate(np.arange(experts) * devices // experts)]


def read_any(path: Path, devices: int | None) -> dict[int, Layout]:
    """The layouts of a plan file or of an engine's file, by layer as that counts them.

    Raises:
        FileError: the file cannot be read, or is of no known kind.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"cannot be read ({error})") from None
    if is_plan(text):
        return dict(PlanFile.read(path).layouts)
    for name, mark in _MARKS.items():
        if mark in text:
            read = ENGINES[name].read
            assert read is not None, "it has a mark"
            return read(path, devices)
    raise FileError(path, f"is no layout that is known; give a plan file, or one of {', '.join(_MARKS)}")
