"""vLLM's initial mapping: one JSON object on a line (proposed, vllm-project/vllm#41141; vLLM 0.33 loads none).

Keys are MoE layers in order, from 0.
"""

from __future__ import annotations

import json
from pathlib import Path

from moeplan.planner.errors import FileError
from moeplan.planner.exports.model_layouts import ModelLayouts, layout_of_slots
from moeplan.solvers import Layout

__all__ = ["read_vllm", "write_vllm"]

TYPE = "eplb_initial_mapping"


def write_vllm(model: ModelLayouts) -> str:
    """The file's text."""
    record = {
        "record_type": TYPE,
        "version": 1,
        "num_redundant_experts": model.slots - model.experts,
        "num_slots": model.slots,
        "initial_global_assignments": {str(order): row for order, row in enumerate(model.by_layer().values())},
    }
    return json.dumps(record) + "\n"


def read_vllm(path: Path, devices: int | None) -> dict[int, Layout]:
    """Layouts by MoE layer.

    Raises:
        FileError: the file is not such a mapping.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        (record,) = (record for record in records if record["record_type"] == TYPE)
        rows = {int(layer): row for layer, row in record["initial_global_assignments"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileError(path, f"holds no record of type {TYPE}") from None
    return {layer: layout_of_slots(path, layer, row, devices) for layer, row in sorted(rows.items())}
