"""UltraEP's load profile (schema ``ultra_ep_trace_v1``): a manifest, and chunks of records in ``.npz`` files.

A record is one layer in one micro-batch, with the loads of logical experts before balancing. Micro-batches are the
steps. Source: UltraEP v1, its load profiler.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from moeplan.planner.traces.formats.recording import Recording, counts_of
from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import Int64

__all__ = ["is_ultraep", "read_ultraep"]

SUFFIX = ".manifest.json"


def is_ultraep(path: Path) -> bool:
    """True if the file is a manifest, or the folder holds one."""
    return path.name.endswith(SUFFIX) or (path.is_dir() and any(path.glob(f"*{SUFFIX}")))


def read_ultraep(paths: Sequence[Path]) -> Recording:
    """The chunks beside one manifest."""
    found = sorted(paths[0].glob(f"*{SUFFIX}")) if paths[0].is_dir() else list(paths)
    if len(found) != 1 or not found[0].name.endswith(SUFFIX):
        raise TraceError(paths[0], f"give one {SUFFIX[1:]} of UltraEP; {len(found)} are there")
    (manifest,) = found
    try:
        facts = json.loads(manifest.read_text())
        schema, lost = facts["schema"], int(facts.get("dropped_records", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(manifest, f"is no manifest ({type(error).__name__}: {error})") from None
    if schema != "ultra_ep_trace_v1":
        raise TraceError(manifest, "must be ultra_ep_trace_v1", "schema", schema)
    dropped = [f"{lost} records that UltraEP itself dropped"] if lost else []
    chunks = sorted(manifest.parent.glob(f"{manifest.name.removesuffix(SUFFIX)}.chunk*.npz"))
    places: dict[int, dict[int, tuple[Path, int]]] = {}
    for chunk in chunks:
        for row, (layer, batch) in enumerate(_keys(chunk, dropped)):
            places.setdefault(batch, {})[layer] = chunk, row
    layers = sorted({layer for batch in places.values() for layer in batch})
    whole = [batch for batch in sorted(places) if len(places[batch]) == len(layers)]
    if not whole:
        raise TraceError(manifest, f"its {len(chunks)} chunks hold no micro-batch with every layer")
    if len(whole) < len(places):
        dropped.append(f"{len(places) - len(whole)} micro-batches that lack a layer")
    loads = lru_cache(maxsize=2)(_loads)  # a micro-batch may begin in one chunk and end in the next
    chunk, _ = places[whole[0]][layers[0]]
    _, sources, experts = loads(chunk).shape

    def steps() -> Iterator[Int64]:
        for batch in whole:
            of_batch = [places[batch][layer] for layer in layers]
            yield np.stack([loads(chunk)[row] for chunk, row in of_batch])

    return Recording(layers, sources, experts, steps(), whole[0], len(whole), dropped)


def _keys(chunk: Path, dropped: list[str]) -> list[tuple[int, int]]:
    """Layer and micro-batch of each record."""
    try:
        with chunk.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            keys = list(zip(arrays["layers"].tolist(), arrays["microbatches"].tolist(), strict=True))
            arrays["pre_logical_loads"]  # is there, and whole
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        dropped.append(f"{chunk}, which was cut off or is broken")
        return []
    return keys


def _loads(chunk: Path) -> Int64:
    """Loads of all records of a chunk, int64[records, sources, experts]."""
    with np.load(chunk, allow_pickle=False) as arrays:
        loads = arrays["pre_logical_loads"]
    return counts_of(chunk, "pre_logical_loads", loads[:, np.newaxis] if loads.ndim == 2 else loads, 3)
