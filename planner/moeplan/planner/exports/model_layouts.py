"""The layouts of a whole model, in the form that engines have: every slot holds an expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeplan.planner.errors import FileError
from moeplan.solvers import Layout, ProblemError

__all__ = ["ModelLayouts", "layout_of_slots"]


@dataclass(frozen=True, slots=True, eq=False)
class ModelLayouts:
    """Layouts by the number of their layer in the model.

    Attributes:
        layouts: By layer, in the order of layers; all of as many devices, slots and experts.

    Raises:
        ProblemError: layers differ in devices, slots or experts, or a slot is empty.
    """

    layouts: Mapping[int, Layout]

    def __post_init__(self) -> None:
        first, *_ = self.layouts.values()
        for layer, layout in self.layouts.items():
            if layout.slots.shape != first.slots.shape or layout.experts != first.experts:
                sizes = f"{layout.slots.shape[0]} x {layout.slots.shape[1]} slots, {layout.experts} experts"
                raise ProblemError(f"layers[{layer}]", sizes, "must be as large as the first; engines know one size")
            if empty := int((layout.slots < 0).sum()):
                raise ProblemError(
                    f"layers[{layer}].slots",
                    f"{empty} empty slots",
                    "must all hold an expert; plan with `moeplan plan --for ENGINE`",
                )

    @property
    def devices(self) -> int:
        """Number of devices."""
        return next(iter(self.layouts.values())).devices

    @property
    def experts(self) -> int:
        """Number of experts."""
        return next(iter(self.layouts.values())).experts

    @property
    def slots(self) -> int:
        """Slots of all devices together."""
        return next(iter(self.layouts.values())).slots.size

    def by_layer(self) -> dict[int, list[int]]:
        """Expert of each slot, device by device, by the number of the layer."""
        return {layer: layout.slots.reshape(-1).tolist() for layer, layout in self.layouts.items()}


def layout_of_slots(path: Path, layer: int, slots: Sequence[int], devices: int | None) -> Layout:
    """The layout that a file says of a layer.

    Args:
        path: The file, for errors.
        layer: Number of the layer.
        slots: Expert of each slot, device by device.
        devices: Number of devices, among which slots are dealt evenly.

    Raises:
        FileError: slots cannot be dealt evenly, or the layout lacks an expert.
    """
    if devices is None:
        raise FileError(path, "does not say how many devices there are; give --devices")
    try:
        array = np.asarray(slots, np.int32)
        if array.ndim != 1 or not array.size or array.size % devices:
            raise FileError(path, f"must be dealt evenly to {devices} devices", f"layer {layer}", f"{array.size} slots")
        return Layout(array.reshape(devices, -1), int(array.max()) + 1)
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, FileError):
            raise
        cause = str(error) if isinstance(error, ProblemError) else "must be a list of experts"
        raise FileError(path, f"layer {layer}: {cause}") from None
