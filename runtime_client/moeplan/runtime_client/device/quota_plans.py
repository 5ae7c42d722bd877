"""Plans of experts at home, from which a planning thread lends what a pass needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.runtime_client.device.desk import (
    INVALID,
    SHORT,
    Desk,
    next_request,
    note,
    reply,
    take_counts,
    use_exact_sleep,
)
from moeplan.runtime_client.device.routes import AnswerShape, Numbering, Owners, Places, write_answer
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.spill.quota import fill_plans

__all__ = ["QuotaPlans"]


@dataclass(frozen=True, slots=True, eq=False)
class QuotaPlans:
    """What a planning thread lends by.

    Attributes:
        options: Homes, spare slots and limits.
        numbering: Rows of this rank.
    """

    options: SpillOptions
    numbering: Numbering

    @property
    def devices(self) -> int:
        """Number of ranks."""
        return self.options.devices

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.options.experts

    @property
    def shape(self) -> AnswerShape:
        """Places in the answers."""
        spare = np.minimum(self.options.spare, self.experts)
        owned = int((self.options.home == self.numbering.rank).sum())
        return AnswerShape(self.experts, int(spare.sum()), owned, int(spare[self.numbering.rank]))

    def serve(self, desk: Desk) -> None:
        """Answer the requests of a desk until there will be none."""
        options, shape = self.options, self.shape
        own = QuotaPlanner(options, options.devices, dtype=np.int32, quick=True)
        owners = Owners.of(options)
        _serve(
            desk,
            own.workspace,
            np.zeros((1, options.devices, options.experts), np.int32),
            shape.places(),
            self.numbering,
            (owners.home, owners.row, owners.order, owners.first),
            (np.zeros((4, max(options.experts, options.devices)), np.int64), np.zeros((3, shape.slots), np.int64)),
        )


@kernel
def _serve(
    desk: Desk, workspace: Any, counts: Int32, places: Places, numbering: Numbering, owners: Any, scratch: Any
) -> None:
    replicas, home_quota, devices, sent, kept, summary = workspace[-6:]
    answered = 0
    use_exact_sleep()
    while True:
        request = next_request(desk, answered)
        if request == answered:
            return
        answered = request
        planned = take_counts(desk, counts[0])
        if planned:
            if fill_plans(counts, *workspace) >= 0:
                note(desk, INVALID, 0, 0, 0)
                planned = False
            for d in range(devices.shape[2]):
                if planned and devices[0, 1, d]:
                    note(desk, SHORT, d, devices[0, 0, d], devices[0, 1, d])
                    planned = False
        if planned:
            write_answer(
                desk.answer, places, numbering, int(summary[0, 0]), replicas[0, 0], replicas[0, 1],
                home_quota[0], sent[0], kept[0], *owners, *scratch,
            )  # fmt: skip
        reply(desk, request, planned)
