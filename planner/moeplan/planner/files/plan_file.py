"""Plans on disk: one JSON document with a layout per layer and the proof of its quality."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from moeplan.planner.errors import FileError
from moeplan.solvers import Layout, Plan, ProblemError, SplitRule

__all__ = ["FORMAT", "PlanFile", "Promise", "is_plan", "plan_document", "write"]

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


@dataclass(frozen=True, slots=True)
class Promise:
    """Figures of a layer in a plan: imbalance of the layout before and of its own, on its forecast, and its proven gap.

    None where it says nothing.
    """

    before: float | None
    imbalance: float | None
    gap: float | None


@dataclass(frozen=True, slots=True, eq=False)
class PlanFile:
    """A plan as `moeplan plan` wrote it.

    Attributes:
        path: The file.
        policy: Policy that made it.
        split_rule: How tokens are divided.
        layouts: By layer.
        model_layers: Number in the model of each layer, where the plan knows it, else its own.
        promises: By layer.
    """

    path: Path
    policy: str
    split_rule: SplitRule
    layouts: Mapping[int, Layout]
    model_layers: Mapping[int, int]
    promises: Mapping[int, Promise]

    @classmethod
    def read(cls, path: Path) -> PlanFile:
        """Read a file.

        Raises:
            FileError: it is missing or not a plan.
        """
        try:
            document = json.loads(path.read_text())
            if document["format"] != FORMAT:
                raise FileError(path, f"must be {FORMAT}", "format", document["format"])
            experts = int(document["experts"])
            entries = {int(entry["layer"]): entry for entry in document["layers"]}
            return cls(
                path,
                str(document["policy"]),
                SplitRule(document["split_rule"]),
                {layer: Layout(np.array(entry["slots"], np.int32), experts) for layer, entry in entries.items()},
                {layer: int(entry.get("model_layer", layer)) for layer, entry in entries.items()},
                {
                    layer: Promise(entry.get("imbalance_before"), entry.get("imbalance"), entry.get("gap"))
                    for layer, entry in entries.items()
                },
            )
        except FileError:
            raise
        except OSError as error:
            raise FileError(path, f"{error.strerror}; give a file that `moeplan plan` wrote") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            cause = str(error) if isinstance(error, ProblemError) else f"{type(error).__name__}: {error}"
            raise FileError(path, f"is not a plan that `moeplan plan` wrote ({cause})") from None

    @property
    def devices(self) -> int:
        """Devices of its layouts."""
        return next(iter(self.layouts.values())).devices

    @property
    def slots(self) -> int:
        """Slots of its widest layout."""
        return max(layout.slots.shape[1] for layout in self.layouts.values())

    def check(self, layers: int, experts: int) -> None:
        """Refuse a trace that it is not for.

        Raises:
            ProblemError: the trace has other layers or experts.
        """
        own = next(iter(self.layouts.values())).experts
        if own != experts:
            raise ProblemError("--plan", self.path, f"is for {own} experts, and the trace has {experts}")
        if max(self.layouts) >= layers:
            raise ProblemError("--plan", self.path, f"has layer {max(self.layouts)}, and the trace has {layers}")
