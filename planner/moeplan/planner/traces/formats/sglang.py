"""SGLang's expert distribution recorder (`--expert-distribution-recorder-mode stat | stat_approx | per_pass`).

``stat`` writes one file: ``logical_count`` int32[steps, decoder layers, experts], summed over ranks. Its rows are those
of a ring buffer: not in order once it has wrapped, and zero where it was never written. ``per_pass`` writes a file per
rank with ``records``, each of a forward pass, and the map from physical to logical experts. Decoder layers are counted
with the dense ones, whose rows are zero. Source: SGLang 0.5.23, srt/eplb/expert_distribution.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.planner.traces.formats.recording import Recording, counts_of, load_torch, start_of
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
    """The recording of one ``stat`` file, or of the ``per_pass`` files of all ranks."""
    contents = [_content(path) for path in paths]
    if all("records" in content for content in contents):
        return _passes(paths, contents)
    if len(paths) > 1:
        raise TraceError(paths[1], "is a second file of counts; give one, or the per_pass files of all ranks")
    if "logical_count" not in contents[0]:
        raise TraceError(paths[0], f"holds neither logical_count nor records, but {', '.join(contents[0])[:200]}")
    counts = np.asarray(contents[0]["logical_count"])
    counts = counts_of(paths[0], "logical_count", counts[None] if counts.ndim == 2 else counts, 3)
    dropped: list[str] = []
    written = counts.any(axis=(1, 2))
    if not written.all():
        dropped.append(f"{int((~written).sum())} steps without tokens, which the ring buffer never held")
    routed = _routed(counts.any(axis=(0, 2)), paths[0], dropped)
    kept = counts[written][:, routed]
    steps = (step[:, np.newaxis] for step in kept)
    return Recording(routed, 1, counts.shape[2], steps, total=len(kept), dropped=dropped)


def _content(path: Path) -> dict[str, Any]:
    if start_of(path).lstrip().startswith(b"{"):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
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
    """Physical counts of every rank, as logical ones; ranks are sources."""
    maps = [
        counts_of(path, "last_physical_to_logical_map", content.get("last_physical_to_logical_map"), 2)
        for path, content in zip(paths, contents, strict=True)
    ]
    experts = int(maps[0].max()) + 1
    passes: dict[int, dict[int, tuple[Path, Any]]] = {}
    for path, content in zip(paths, contents, strict=True):
        for record in content["records"]:
            passes.setdefault(int(record["forward_pass_id"]), {})[int(record["rank"])] = (path, record)
    ranks = sorted({rank for of_pass in passes.values() for rank in of_pass})
    whole = [number for number in sorted(passes) if len(passes[number]) == len(ranks)]
    dropped: list[str] = []
    if len(whole) < len(passes):
        dropped.append(f"{len(passes) - len(whole)} passes that not all of {len(ranks)} ranks recorded")
    if not whole:
        raise TraceError(paths[0], "no forward pass was recorded by every rank; give the files of all ranks")

    def logical(number: int) -> Int64:
        counts = np.zeros((len(maps[0]), len(ranks), experts), np.int64)
        for source, rank in enumerate(ranks):
            path, record = passes[number][rank]
            physical = counts_of(path, "global_physical_count", record.get("global_physical_count"), 2)
            if physical.shape != maps[0].shape:
                raise TraceError(path, f"must be {maps[0].shape}", "global_physical_count", physical.shape)
            for layer, expert_of in enumerate(maps[0]):
                np.add.at(counts[layer, source], expert_of, physical[layer])
        return counts

    any_tokens = np.zeros(len(maps[0]), np.bool_)
    for number in whole:
        any_tokens |= logical(number).any(axis=(1, 2))
    routed = _routed(any_tokens, paths[0], dropped)

    def steps() -> Iterator[Int64]:
        for number in whole:
            yield logical(number)[routed]

    return Recording(routed, len(ranks), experts, steps(), total=len(whole), dropped=dropped)
