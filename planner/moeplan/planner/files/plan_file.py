"""Plans on disk: one JSON document with a layout per layer and the proof of its quality."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from moeplan.planner.errors import FileError
from moeplan.solvers import Layout, Plan, ProblemError

__all__ = ["FORMAT", "is_plan", "plan_document", "read_layouts", "read_model_layers", "write"]

FORMAT = "moeplan.plan/1"


def plan_document(
    plans: Mapping[int, Plan], gains: Mapping[int, Mapping[str, object]] = MappingProxyType({})
) -> dict[str, object]:
    """A JSON-ready document of plans by layer.

    Per layer: ``slots[device][slot]`` (expert, -1 for empty), ``quota[device][slot]`` (tokens of the slot, averaged
    over the scenarios), imbalance, bound, gap, why the search ended, and the replicas to copy as
    ``[expert, from, to]``.

    Args:
        plans: By layer.
        gains: What else is to be said of a layer, by layer.
    """
    first = next(iter(plans.values()))
    return {
        "format": FORMAT,
        "policy": first.policy,
        "split_rule": first.split.rule,
        "experts": first.layout.experts,
        "devices": first.layout.devices,
        "layers": [
            {
                "layer": layer,
                "slots": plan.layout.slots.tolist(),
                "quota": plan.split.quota.mean(axis=0).round(1).tolist(),
                "imbalance": plan.mean_imbalance,
                "bound": plan.bound,
                "gap": plan.gap,
                "termination": plan.termination,
                "moves": None
                if plan.moves is None
                else np.stack([plan.moves.expert, plan.moves.source, plan.moves.device], axis=1).tolist(),
                **gains.get(layer, {}),
            }
            for layer, plan in plans.items()
        ],
    }


def write(path: Path, document: Mapping[str, object]) -> None:
    """Write a document in one step, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(document) + "\n")
    temporary.replace(path)


def is_plan(text: str) -> bool:
    """True if a file's text is that of a plan."""
    return f'"{FORMAT}"' in text


def read_model_layers(path: Path) -> dict[int, int]:
    """Number in the model of each layer of a plan file that `read_layouts` can read, where known, else its own."""
    entries = json.loads(path.read_text())["layers"]
    return {int(entry["layer"]): int(entry.get("model_layer", entry["layer"])) for entry in entries}


def read_layouts(path: Path) -> dict[int, Layout]:
    """The layouts of a plan file, by layer.

    Raises:
        FileError: the file is missing or not a plan.
    """
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise FileError(path, f"must be {FORMAT}", "format", document["format"])
        experts = int(document["experts"])
        return {
            int(entry["layer"]): Layout(np.array(entry["slots"], np.int32), experts) for entry in document["layers"]
        }
    except FileError:
        raise
    except OSError as error:
        raise FileError(path, f"{error.strerror}; give a file that `moeplan plan` wrote") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        cause = str(error) if isinstance(error, ProblemError) else f"{type(error).__name__}: {error}"
        raise FileError(path, f"is not a plan that `moeplan plan` wrote ({cause})") from None
