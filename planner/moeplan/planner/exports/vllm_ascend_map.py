"""vllm-ascend's ``expert_map.json`` (`eplb_config.expert_map_path`, model runner 1): experts by layer and device.

Layers are MoE layers in order, from 0. Source: vllm-ascend, eplb/core/eplb_utils.py. With model runner 2 the engine
uses vLLM's own balancer.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

from moeplan.planner.errors import FileError
from moeplan.planner.exports.model_layouts import ModelLayouts, layout_of_slots
from moeplan.solvers import Layout

__all__ = ["read_vllm_ascend", "write_vllm_ascend"]


def write_vllm_ascend(model: ModelLayouts) -> str:
    """The file's text."""
    layers = [
        {
            "layer_id": order,
            "device_count": model.devices,
            "device_list": [
                {"device_id": device, "device_expert": row} for device, row in enumerate(layout.slots.tolist())
            ],
        }
        for order, layout in enumerate(model.layouts.values())
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n"


def read_vllm_ascend(path: Path, devices: int | None) -> dict[int, Layout]:
    """Layouts by MoE layer; the file says how many devices there are.

    Raises:
        FileError: the file is not such a map, or has another number of devices.
    """
    try:
        layers = {
            int(layer["layer_id"]): [
                entry["device_expert"] for entry in sorted(layer["device_list"], key=lambda entry: entry["device_id"])
            ]
            for layer in json.loads(path.read_text())["layer_list"]
        }
    except (ValueError, KeyError, TypeError):
        raise FileError(path, "holds no layer_list with a device_list in each layer") from None
    for layer, rows in layers.items():
        if devices not in (None, len(rows)):
            raise FileError(path, f"has {len(rows)} devices", f"layer {layer}", f"--devices {devices}")
    return {
        layer: layout_of_slots(path, layer, list(chain.from_iterable(rows)), len(rows))
        for layer, rows in sorted(layers.items())
    }
