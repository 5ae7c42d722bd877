"""TensorRT-LLM's load balancer (`moe_config.load_balancer`): YAML with a row of expert ids per decoder layer.

Only MoE layers have a row, by their number among all decoder layers. Source: TensorRT-LLM's MoeLoadBalancerConfig and
examples/wide_ep/ep_load_balancer/generate_eplb_config.py.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from moeplan.planner.errors import FileError
from moeplan.planner.exports.model_layouts import ModelLayouts, layout_of_slots
from moeplan.solvers import Layout

__all__ = ["read_tensorrt_llm", "write_tensorrt_llm"]

KEY = "initial_global_assignments"


def write_tensorrt_llm(model: ModelLayouts) -> str:
    """The file's text; the layout is static (``layer_updates_per_iter: 0``)."""
    content = {"num_slots": model.slots, KEY: model.by_layer(), "layer_updates_per_iter": 0}
    return yaml.safe_dump(content, default_flow_style=None, sort_keys=False, width=2**31)


def read_tensorrt_llm(path: Path, devices: int | None) -> dict[int, Layout]:
    """Layouts by decoder layer.

    Raises:
        FileError: the file is not such a configuration.
    """
    try:
        rows = yaml.safe_load(path.read_text())[KEY]
        layers = sorted((int(layer), row) for layer, row in rows.items())
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError):
        raise FileError(path, f"holds no {KEY}") from None
    return {layer: layout_of_slots(path, layer, row, devices) for layer, row in layers}
