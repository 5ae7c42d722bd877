"""UltraEP's load profile (schema ``ultra_ep_trace_v1``): a manifest, and chunks of records in ``.npz`` files.

A record is one layer in one micro-batch, with the loads of logical experts before balancing. Micro-batches are the
steps. Source: UltraEP v1, its load profiler.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
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
    records: dict[int, dict[int, Int64]] = {}
    for chunk in chunks:
        for layer, batch, loads in _records(chunk, dropped):
            records.setdefault(batch, {})[layer] = loads
    layers = sorted({layer for batch in records.values() for layer in batch})
    whole = [batch for batch in sorted(records) if len(records[batch]) == len(layers)]
    if not whole:
        raise TraceError(manifest, f"its {len(chunks)} chunks hold no micro-batch with every layer")
    if len(whole) < len(records):
        dropped.append(f"{len(records) - len(whole)} micro-batches that lack a layer")
    sources, experts = records[whole[0]][layers[0]].shape
    steps = (np.stack([records[batch][layer] for layer in layers]) for batch in whole)
    return Recording(layers, sources, experts, steps, whole[0], len(whole), dropped)


def _records(chunk: Path, dropped: list[str]) -> Iterator[tuple[int, int, Int64]]:
    """Layer, micro-batch and int64[sources, experts] of each record."""
    try:
        with chunk.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            layers, batches = arrays["layers"], arrays["microbatches"]
            loads = arrays["pre_logical_loads"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        dropped.append(f"{chunk}, which was cut off or is broken")
        return
    counts = counts_of(chunk, "pre_logical_loads", loads[:, np.newaxis] if loads.ndim == 2 else loads, 3)
    for layer, batch, load in zip(layers.tolist(), batches.tolist(), counts, strict=True):
        yield int(layer), int(batch), load
