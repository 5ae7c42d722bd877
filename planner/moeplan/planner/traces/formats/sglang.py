"""SGLang's expert distribution recorder (`--expert-distribution-recorder-mode stat | stat_approx | per_pass`).

``stat`` writes a file per dump: ``logical_count`` int32[steps, decoder layers, experts], summed over ranks. Its rows
are those of a ring buffer, which a dump empties: not in order once it has wrapped, and zero where it was never written.
``per_pass`` writes a file per dump and rank with ``records``, each of a forward pass, and the map from physical to
logical experts. Decoder layers are counted with the dense ones, whose rows are zero. Source: SGLang 0.5.23,
srt/eplb/expert_distribution.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.planner.traces.formats.recording import (
    Recording,
    counts_of,
    experts_of,
    load_torch,
    start_of,
    whole_numbers,
)
from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import Int64

__all__ = ["is_sglang", "read_sglang"]


def is_sglang(path: Path) -> bool:
    """True if the content is such a recording."""
    head = start_of(path)
    if head.startswith(b"PK"):  # a file of torch.save is a zip archive
        return b"logical_count" in head or b"global_physical_count" in head
    return head.lstrip().startswith(b"{") and b'"logical_count"' in head


def read_sglang(paths: Sequence[Path]) -> Recording:
    """The recording of ``stat`` files, one after the other, or of the ``per_pass`` files of all ranks and dumps."""
    contents = [_content(path) for path in paths]
    if all("records" in content for content in contents):
        return _passes(paths, contents)
    counts = [_counts(path, content) for path, content in zip(paths, contents, strict=True)]
    shape = counts[0].shape[1:]
    any_tokens = np.zeros(shape[0], np.bool_)
    written = []
    for path, of_file in zip(paths, counts, strict=True):
        if of_file.shape[1:] != shape:
            raise TraceError(path, f"must have {shape}, as {paths[0]}", "logical_count", of_file.shape[1:])
        written.append([step for step, row in enumerate(of_file) if row.any()])
        for step in written[-1]:
            any_tokens |= of_file[step].any(axis=1)
    dropped: list[str] = []
    total = sum(map(len, written))
    if total < sum(map(len, counts)):
        never = sum(map(len, counts)) - total
        dropped.append(f"{never} steps without tokens, which the ring buffer never held")
    routed = _routed(any_tokens, paths[0], dropped)
    steps = (
        counts_of(path, "logical_count", of_file[step], 2)[routed, np.newaxis]
        for path, of_file, of_path in zip(paths, counts, written, strict=True)
        for step in of_path
    )
    return Recording(routed, 1, shape[1], steps, total=total, dropped=dropped)


def _counts(path: Path, content: dict[str, Any]) -> npt.NDArray[np.integer[Any]]:
    """[steps, decoder layers, experts] of a ``stat`` file, as it lies there."""
    if "logical_count" not in content:
        raise TraceError(path, f"holds neither logical_count nor records, but {', '.join(map(str, content))[:200]}")
    counts = whole_numbers(path, "logical_count", content["logical_count"], 2, 3)
    return counts[np.newaxis] if counts.ndim == 2 else counts


def _content(path: Path) -> dict[str, Any]:
    if start_of(path).lstrip().startswith(b"{"):
        try:
            content = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise TraceError(path, f"is no JSON ({error})") from None
    else:
        content = load_torch(path)
    if not isinstance(content, dict):
        raise TraceError(path, f"holds a {type(content).__name__}, not what SGLang's recorder writes")
    return content


def _routed(any_tokens: Any, path: Path, dropped: list[str]) -> list[int]:
    """Numbers of the layers that routed tokens."""
    routed = [int(layer) for layer in np.flatnonzero(any_tokens)]
    if not routed:
        raise TraceError(path, "no layer has routed a token")
    if len(routed) < len(any_tokens):
        dropped.append(f"{len(any_tokens) - len(routed)} layers without tokens (dense layers)")
    return routed


def _passes(paths: Sequence[Path], contents: Sequence[dict[str, Any]]) -> Recording:
    """Physical counts of every rank, as logical ones; ranks are sources. Each dump has a map of its own."""
    maps = {
        path: counts_of(path, "last_physical_to_logical_map", content.get("last_physical_to_logical_map"), 2)
        for path, content in zip(paths, contents, strict=True)
    }
    layers, experts = (
        len(maps[paths[0]]),
        max(experts_of(path, "last_physical_to_logical_map", p2l) for path, p2l in maps.items()),
    )
    for path, p2l in maps.items():
        if len(p2l) != layers:
            raise TraceError(
                path, f"must have {layers} layers, as {paths[0]}", "last_physical_to_logical_map", len(p2l)
            )
    passes = _by_pass(paths, contents)
    ranks = sorted({rank for of_pass in passes.values() for rank in of_pass})
    whole = [number for number in sorted(passes) if len(passes[number]) == len(ranks)]
    dropped: list[str] = []
    if len(whole) < len(passes):
        dropped.append(f"{len(passes) - len(whole)} passes that not all of {len(ranks)} ranks recorded")
    if not whole:
        raise TraceError(paths[0], "no forward pass was recorded by every rank; give the files of all ranks")

    def logical(number: int) -> Int64:
        counts = np.zeros((layers, len(ranks), experts), np.int64)
        for source, rank in enumerate(ranks):
            path, recorded = passes[number][rank]
            physical = counts_of(path, "global_physical_count", recorded, 2)
            if physical.shape != maps[path].shape:
                raise TraceError(path, f"must be {maps[path].shape}", "global_physical_count", physical.shape)
            for layer, expert_of in enumerate(maps[path]):
                np.add.at(counts[layer, source], expert_of, physical[layer])
        return counts

    any_tokens = np.zeros(layers, np.bool_)
    for number in whole:
        any_tokens |= logical(number).any(axis=(1, 2))
    routed = _routed(any_tokens, paths[0], dropped)

    def steps() -> Iterator[Int64]:
        for number in whole:
            yield logical(number)[routed]

    return Recording(routed, len(ranks), experts, steps(), total=len(whole), dropped=dropped)


def _by_pass(paths: Sequence[Path], contents: Sequence[dict[str, Any]]) -> dict[int, dict[int, tuple[Path, Any]]]:
    """By forward pass and rank: file, and the counts [decoder layers, physical experts] as they lie there."""
    passes: dict[int, dict[int, tuple[Path, Any]]] = {}
    for path, content in zip(paths, contents, strict=True):
        if not isinstance(content["records"], list):
            raise TraceError(path, "must be a list", "records", type(content["records"]).__name__)
        for record in content["records"]:
            try:
                counts = record["global_physical_count"]
                number, rank = (int(whole_numbers(path, name, record[name], 0)) for name in ("forward_pass_id", "rank"))
            except (KeyError, TypeError, IndexError) as error:
                raise TraceError(path, f"holds a record without {error}") from None
            of_pass = passes.setdefault(number, {})
            if rank in of_pass:
                reason = f"is of rank {rank}, as one in {of_pass[rank][0]} is; import each run of the engine by itself"
                raise TraceError(path, reason, "forward_pass_id", number)
            of_pass[rank] = (path, counts)
    return passes
