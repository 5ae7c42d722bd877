"""A planned layout where homes are fixed: replicas that it has elsewhere are lent for each pass."""

from __future__ import annotations

import numpy as np

from moeplan.runtime_client.layers.dividing import Division, PlannedLayer
from moeplan.runtime_client.layers.fingerprints import fingerprint
from moeplan.solvers import SpillOptions, SpillPlan
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import ExpertSpec
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["PlannedReplicas"]


class PlannedReplicas:
    """A `SpillPlanner` whose transient replicas are those of a layout, with tokens divided by its rule.

    Weights, their gradients and the optimizer's state stay where the framework keeps them. A layout may leave an
    expert's home without it; then all its tokens go to its replicas. Replicas without tokens are not lent.

    Args:
        experts: Number of experts.
        ranks: Number of ranks; homes are contiguous.
        spare: Slots of a rank beyond its own experts.

    Attributes:
        options: Homes and spare slots.
        plan_in_force: What the next pass follows, on all ranks alike; at first the homes.
    """

    def __init__(self, experts: int, ranks: int, spare: int) -> None:
        self.options = SpillOptions.uniform(experts, ranks, spare)
        slots = -(-experts // ranks) + spare
        home = Layout.contiguous(experts, np.full(ranks, slots, np.int32))
        division = Division(Cluster.uniform(ranks, slots), ExpertSpec(), SplitRule.OPTIMAL)
        self.plan_in_force = PlannedLayer(home, division)

    def plan(self, counts: Int64) -> SpillPlan:
        """The replicas of the layout and their tokens, for known counts int64[sources, experts]."""
        layout, division = self.plan_in_force
        sent = division.sent(layout, counts)
        device, home = layout.hosts.device.astype(np.int64), self.options.home
        expert = layout.slots[device, layout.hosts.slot].astype(np.int64)
        at_home = device == home[expert]
        away = ~at_home & sent.any(axis=0)
        kept = np.zeros_like(counts)
        kept[:, expert[at_home]] = sent[:, at_home]
        load = np.bincount(device, weights=sent.sum(axis=0), minlength=len(self.options.spare)).astype(np.int64)
        mean = load.sum() / len(load)
        return SpillPlan(
            expert=expert[away],
            device=device[away],
            quota=sent[:, away].sum(axis=0),
            home_quota=kept.sum(axis=0),
            sent=sent[:, away],
            kept=kept,
            load=load,
            shortfall=np.zeros_like(load),
            times=np.array([load.max(), mean, mean]),
        )

    @property
    def fingerprint(self) -> int:
        """Differs between ranks that follow different plans."""
        layout, division = self.plan_in_force
        return fingerprint(layout.slots.tobytes()) ^ division.fingerprint
