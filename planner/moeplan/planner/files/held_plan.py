"""A plan file as something to hold against a trace: layouts, the rule of the split, and what it promised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeplan.planner.errors import FileError
from moeplan.planner.files.plan_file import read_layouts
from moeplan.solvers import Layout, ProblemError, SplitRule

__all__ = ["HeldPlan", "Promise"]


@dataclass(frozen=True, slots=True)
class Promise:
    """Figures of a layer in a plan: imbalance of the layout before and of its own, on its forecast, and its proven gap.

    None where it says nothing.
    """

    before: float | None
    imbalance: float | None
    gap: float | None


@dataclass(frozen=True, slots=True, eq=False)
class HeldPlan:
    """A plan as `moeplan plan` wrote it.

    Attributes:
        path: The file.
        policy: Policy that made it.
        split_rule: How tokens are divided.
        layouts: By layer.
        promises: By layer.
    """

    path: Path
    policy: str
    split_rule: SplitRule
    layouts: Mapping[int, Layout]
    promises: Mapping[int, Promise]

    @classmethod
    def read(cls, path: Path) -> HeldPlan:
        """Read a file.

        Raises:
            FileError: it is missing or not a plan.
        """
        layouts = read_layouts(path)
        document = json.loads(path.read_text())
        try:
            rule = SplitRule(document["split_rule"])
            promises = {
                int(entry["layer"]): Promise(entry.get("imbalance_before"), entry.get("imbalance"), entry.get("gap"))
                for entry in document["layers"]
            }
            return cls(path, str(document.get("policy", "?")), rule, layouts, promises)
        except (KeyError, ValueError) as error:
            raise FileError(path, f"is not a plan that `moeplan plan` wrote ({error})") from None

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
