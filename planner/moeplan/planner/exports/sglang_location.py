"""SGLang's `--init-expert-location`: JSON with a row of expert ids per decoder layer, dense ones too.

No other key may stand beside ``physical_to_logical_map``. Source: SGLang 0.5.23, srt/eplb/expert_location.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from moeplan.planner.errors import FileError
from moeplan.planner.exports.model_layouts import ModelLayouts, layout_of_slots
from moeplan.solvers import Layout

__all__ = ["read_sglang", "write_sglang"]

KEY = "physical_to_logical_map"


def write_sglang(model: ModelLayouts, decoder_layers: int | None = None) -> str:
    """The file's text.

    Args:
        model: Layouts.
        decoder_layers: Layers of the model; by default the last one is that of the last layout. Rows of layers without
            experts repeat the next layer's, as SGLang asks for a row but does not use it.
    """
    rows = model.by_layer()
    count = max(rows) + 1 if decoder_layers is None else decoder_layers
    table = [rows[min((number for number in rows if number >= layer), default=max(rows))] for layer in range(count)]
    return json.dumps({KEY: table}) + "\n"


def read_sglang(path: Path, devices: int | None) -> dict[int, Layout]:
    """Layouts by decoder layer.

    Raises:
        FileError: the file is not such a map.
    """
    try:
        rows = json.loads(path.read_text())[KEY]
    except (ValueError, KeyError, TypeError):
        raise FileError(path, f"holds no {KEY}") from None
    return {layer: layout_of_slots(path, layer, row, devices) for layer, row in enumerate(rows)}
