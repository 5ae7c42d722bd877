"""Planning homes over link domains, so that what spilling inside each domain leaves is least.

Spilling cannot leave a link domain, so domains that own busier experts stay slower whatever ranks know. Within a domain
it evens the load, so a domain counts as one pool with the speed and memory of its devices. Homes are planned for the
scenarios of a forecast by exchanges between pools; a domain without spare slots cannot spill, so there every device is
a pool. The plan is judged by spilling itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moeplan.solvers.homes.exchanges import Pools, deal, exchange, slowest
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.scalars import integer, number
from moeplan.solvers.spill.options import SpillOptions
from moeplan.solvers.spill.quota import QuotaPlanner

__all__ = ["HomePlan", "plan_homes", "pool_of_devices", "spilled_imbalance"]


@dataclass(frozen=True, slots=True, eq=False)
class HomePlan:
    """Homes of one layer's experts.

    Attributes:
        home: int32[experts], the device that owns each expert.
        moved: int64[moved], experts whose home changes, ascending.
        before: Imbalance that spilling leaves with the homes in force, on average over the scenarios.
        after: The same with `home`.
    """

    home: Int32
    moved: Int64
    before: float
    after: float


def plan_homes(
    demand: Demand,
    options: SpillOptions,
    *,
    max_moves: int | None = None,
    price: float = 0.0,
    groups: int = 1,
) -> HomePlan:
    """Homes for the steps to come, from those in force.

    Experts change places, so every device keeps as many as it has. The same arguments give the same plan.

    Args:
        demand: The forecast.
        options: Homes in force, spare slots, domains, speeds and token caps.
        max_moves: Most experts whose home may change; None for no limit.
        price: Imbalance that moving all experts must gain; moving a share of them, that share of it.
        groups: Groups of consecutive experts, each of which stays in one domain: they move as a whole. 1 for none.

    Returns:
        The plan; the homes in force where nothing pays, or where spilling would leave more.

    Raises:
        ProblemError: sizes differ, a value is out of range, or a group is at home in several domains.
    """
    if demand.experts != options.experts:
        raise ProblemError("demand.tokens", f"{demand.experts} experts", f"the homes are of {options.experts}")
    limit = demand.experts if max_moves is None else integer("max_moves", max_moves, 0)
    if not 0 <= number("price", price) < float("inf"):
        raise ProblemError("price", price, "must be finite and at least 0")
    pool = pool_of_devices(options)
    size = _unit_size(options, groups)
    place = pool[options.home].reshape(-1, size)[:, 0].copy()
    pools = _pools(demand, options, pool, size)
    start = place.copy()
    gain = price * 2 * size / demand.experts
    exchange(pools, place, limit // (2 * size), gain)
    if max_moves is None:
        dealt = deal(pools, np.bincount(place, minlength=len(pools.rate)))
        exchange(pools, dealt, len(dealt), 0.0)
        worth = [slowest(pools, p) + gain / 2 * np.count_nonzero(p != start) for p in (place, dealt)]
        if worth[1] < worth[0]:
            place = dealt
    home = _new_homes(options.home, start, place, size)
    moved = np.flatnonzero(home != options.home)
    before = spilled_imbalance(demand, options)
    if not len(moved):
        return HomePlan(options.home, moved, before[0], before[0])
    after = spilled_imbalance(demand, replace(options, home=home))
    if (after[1], after[0] + price * len(moved) / demand.experts) >= (before[1], before[0]):
        return HomePlan(options.home, moved[:0], before[0], before[0])
    return HomePlan(home, moved, before[0], after[0])


def spilled_imbalance(demand: Demand, options: SpillOptions) -> tuple[float, int]:
    """Imbalance that spilling by `QuotaPlanner` leaves.

    Returns:
        Imbalance on average over the scenarios, and tokens above the token caps in all of them together.
    """
    planner = QuotaPlanner(options, demand.sources)
    imbalance, short = 0.0, 0
    for weight, tokens in zip(demand.weights, demand.tokens, strict=True):
        plan = planner.plan(tokens)
        imbalance += float(weight) * plan.imbalance
        short += int(plan.shortfall.sum())
    return imbalance, short


def pool_of_devices(options: SpillOptions) -> Int64:
    """int64[devices]: pools numbered from 0: domains, and single devices of domains without spare slots."""
    spills = np.isin(options.domain, options.domain[options.spare > 0])
    alone = int(options.domain.max()) + 1 + np.arange(options.devices)
    return np.unique(np.where(spills, options.domain, alone), return_inverse=True)[1].astype(np.int64)


def _unit_size(options: SpillOptions, groups: int) -> int:
    """Experts that move together: one, or a group."""
    groups = integer("groups", groups, 1)
    if options.experts % groups:
        raise ProblemError("groups", groups, f"must divide the number of experts ({options.experts})")
    if groups == 1:
        return 1
    domains = options.domain[options.home].reshape(groups, -1)
    for group in np.flatnonzero((domains != domains[:, :1]).any(axis=1)):
        raise ProblemError(
            f"groups[{group}]",
            f"at home in domains {np.unique(domains[group]).tolist()}",
            "must be in one: groups move as a whole; give homes that keep each in a domain, or groups=1",
        )
    return domains.shape[1]


def _pools(demand: Demand, options: SpillOptions, pool: Int64, size: int) -> Pools:
    scenarios = demand.scenarios
    tokens = demand.loads().astype(np.float64)
    share = np.maximum(tokens.sum(axis=1, keepdims=True), 1.0) / options.devices
    rate = np.bincount(pool, options.speed / options.speed.mean()).astype(np.float64)
    cap = np.bincount(pool, options.token_cap.astype(np.float64)).astype(np.float64)
    load = (tokens / share).reshape(scenarios, -1, size).sum(axis=2)
    return Pools(load, demand.weights, rate, cap / share)


def _new_homes(home: Int32, start: Int64, place: Int64, size: int) -> Int32:
    """Homes in which units that enter a pool take, in order, the devices of those that leave it."""
    units, new = home.reshape(-1, size), home.reshape(-1, size).copy()
    for pool in np.unique(start):
        leaving = np.flatnonzero((start == pool) & (place != pool))
        entering = np.flatnonzero((start != pool) & (place == pool))
        new[entering] = units[leaving]
    return new.reshape(-1)
