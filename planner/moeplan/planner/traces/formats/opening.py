"""Opening a recording of any format: as it is named, or as its content shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeplan.planner.traces.formats.harmoeny import is_harmoeny, read_harmoeny
from moeplan.planner.traces.formats.megatron import is_megatron, read_megatron
from moeplan.planner.traces.formats.recording import Reader, Recording
from moeplan.planner.traces.formats.sglang import is_sglang, read_sglang
from moeplan.planner.traces.formats.slime import is_slime, read_slime
from moeplan.planner.traces.formats.table import is_table, read_table
from moeplan.planner.traces.formats.tensorrt_llm import is_tensorrt_llm, read_tensorrt_llm
from moeplan.planner.traces.formats.ultraep import is_ultraep, read_ultraep
from moeplan.planner.traces.formats.vllm import is_vllm, read_vllm
from moeplan.planner.traces.formats.vllm_ascend import is_vllm_ascend, read_vllm_ascend
from moeplan.planner.traces.trace import TraceError

__all__ = ["FORMATS", "open_recording"]


@dataclass(frozen=True, slots=True)
class _Format:
    is_its: Callable[[Path], bool]
    read: Reader


FORMATS = {
    "sglang": _Format(is_sglang, read_sglang),
    "vllm": _Format(is_vllm, read_vllm),
    "tensorrt-llm": _Format(is_tensorrt_llm, read_tensorrt_llm),
    "megatron": _Format(is_megatron, read_megatron),
    "slime": _Format(is_slime, read_slime),
    "ultraep": _Format(is_ultraep, read_ultraep),
    "harmoeny": _Format(is_harmoeny, read_harmoeny),
    "csv": _Format(is_table, read_table),
    "vllm-ascend": _Format(is_vllm_ascend, read_vllm_ascend),
}
"""By name, in the order in which they are asked whether a file is theirs."""


def open_recording(paths: Sequence[Path], name: str | None = None) -> tuple[str, Recording]:
    """The name of the format and the recording.

    Args:
        paths: Files or folders.
        name: One of `FORMATS`; None to look.

    Raises:
        TraceError: a file is missing or broken, or no format is known whose it is.
    """
    for path in paths:
        if not path.exists():
            raise TraceError(path, "no such file or folder")
    if name is None:
        name = next((each for each, known in FORMATS.items() if known.is_its(paths[0])), None)
    if name is None:
        raise TraceError(paths[0], f"is no recording that is known; name its format with --from: {', '.join(FORMATS)}")
    return name, FORMATS[name].read(paths)
