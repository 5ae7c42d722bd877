"""Plans on disk: one JSON document with a layout per layer and the proof of its quality."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moeplan.solvers import Layout, Plan, ProblemError

__all__ = ["FORMAT", "plan_document", "read_layouts", "write"]

FORMAT = "moeplan.plan/1"


def plan_document(plans: Mapping[int, Plan]) -> dict[str, object]:
    """A JSON-ready document of plans by layer.

    Per layer: ``slots[device][slot]`` (expert, -1 for empty), ``quota[device][slot]`` (tokens of the slot, averaged
    over the window), imbalance, bound, gap, and the replicas to copy as ``[expert, from, to]``.
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
            }
            for layer, plan in plans.items()
        ],
    }


def write(path: Path, document: Mapping[str, object]) -> None:
    """Write a document in one step, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(document) + "\n")
    temporary.replace(path)


def read_layouts(path: Path) -> dict[int, Layout]:
    """The layouts of a plan file, by layer.

    Raises:
        ProblemError: the file is missing or not a plan.
    """
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise ProblemError(f"{path}: format", document["format"], f"must be {FORMAT}")
        experts = int(document["experts"])
        return {
            int(entry["layer"]): Layout(np.array(entry["slots"], np.int32), experts) for entry in document["layers"]
        }
    except ProblemError:
        raise
    except OSError as error:
        raise ProblemError(str(path), error.strerror, "give a file that `moeplan plan` wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ProblemError(
            str(path), type(error).__name__, f"is not a plan that `moeplan plan` wrote ({error})"
        ) from None
