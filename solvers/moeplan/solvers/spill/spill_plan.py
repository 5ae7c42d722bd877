"""The answer of a spill planner."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.problem.errors import InfeasibleError

__all__ = ["SpillPlan"]


@dataclass(frozen=True, slots=True, eq=False)
class SpillPlan:
    """Transient replicas of one layer and micro-batch, and which source sends how many tokens where.

    The arrays are views into the planner's workspace, and the planner keeps the views: its next call overwrites the
    plan. `copy` makes one that lasts.

    Attributes:
        expert: int64[replicas], expert of each transient replica.
        device: int64[replicas], device that holds it for this micro-batch; never the home, never twice the same pair.
        quota: int64[replicas], tokens that it computes.
        home_quota: int64[experts], tokens that stay at each expert's home.
        sent: counts dtype[sources, replicas], tokens that each source sends to each transient replica.
        kept: counts dtype[sources, experts], tokens that each source sends to each expert's home. For every source
            and expert, `kept` and the `sent` of its replicas add up to the count.
        load: int64[devices], tokens that each device computes.
        shortfall: int64[devices], tokens by which a device exceeds its memory cap, in whole tiles; all 0 if the plan is
            feasible.
        times: float64[3], what `makespan`, `bound` and `balanced` return.
    """

    expert: Int64
    device: Int64
    quota: Int64
    home_quota: Int64
    sent: npt.NDArray[Any]
    kept: npt.NDArray[Any]
    load: Int64
    shortfall: Int64
    times: Float64

    @property
    def replicas(self) -> int:
        """Number of transient replicas."""
        return len(self.expert)

    @property
    def makespan(self) -> float:
        """Largest device time, in tokens at speed 1: load / speed + transfers; tokens count as `tile_rows` says."""
        return float(self.times[0])

    @property
    def bound(self) -> float:
        """No feasible plan with the same homes, spare slots and domains has a smaller makespan."""
        return float(self.times[1])

    @property
    def balanced(self) -> float:
        """Tokens (in tiles, as at home) / total speed: the makespan if every device worked equally long."""
        return float(self.times[2])

    @property
    def imbalance(self) -> float:
        """Makespan over its perfect value; with equal speeds and free transfers this is max load / mean load."""
        return self.makespan / self.balanced if self.balanced > 0 else 1.0

    def copy(self) -> SpillPlan:
        """The same plan in arrays of its own."""
        return SpillPlan(*(getattr(self, field.name).copy() for field in fields(self)))

    def require_feasible(self) -> SpillPlan:
        """This plan, if it respects every memory cap.

        Raises:
            InfeasibleError: a device exceeds its cap; the message names it and the missing tokens.
        """
        if self.shortfall.any():
            device = int(np.argmax(self.shortfall))
            raise InfeasibleError(
                f"spill.token_cap[{device}]",
                f"{self.load[device]} tokens planned",
                f"exceeds the cap by {self.shortfall[device]} tokens "
                f"({int(self.shortfall.sum())} on all devices together); "
                "raise the cap, add spare slots, or lower the micro-batch",
            )
        return self

    def remote_tokens(self, source_device: Int64, home: npt.NDArray[Any]) -> int:
        """Tokens computed on another device than the one that they come from.

        Args:
            source_device: int64[sources], device of each source.
            home: int[experts], home of each expert.
        """
        away_home = self.kept.sum(where=source_device[:, None] != home, dtype=np.int64)
        away_replica = self.sent.sum(where=source_device[:, None] != self.device, dtype=np.int64)
        return int(away_home + away_replica)
