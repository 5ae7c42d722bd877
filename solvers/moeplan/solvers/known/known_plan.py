"""Planning a step whose routes are known: homes for the step, the order of its samples, replicas per micro-batch.

With known routes nothing is forecast. Homes even what the whole step has, in few moves; the order evens what single
micro-batches have beyond that; spilling evens the devices inside each link domain, as it does without a plan. Homes and
order are found in turn, each by exchanges between the pools of devices within which spilling evens the load, and judged
by spilling itself. The problem is that of ReLibra (arXiv 2605.08639), which keeps the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan.solvers.homes.home_plan import plan_homes, pool_of_devices
from moeplan.solvers.known.known_routes import KnownRoutes
from moeplan.solvers.known.reordering import Dealing, Samples, reorder
from moeplan.solvers.problem.arrays import Int32, Int64, integers
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.scalars import instance, integer, number
from moeplan.solvers.spill.options import SpillOptions
from moeplan.solvers.spill.quota import QuotaPlanner
from moeplan.solvers.spill.spill_plan import SpillPlan

__all__ = ["KnownPlan", "plan_known"]

_ROUNDS = 4
"""Times at most that homes and order are found in turn; most steps need two."""


@dataclass(frozen=True, slots=True, eq=False)
class KnownPlan:
    """A plan of one step.

    Attributes:
        routes: What it is of.
        options: What it was planned with.
        order: int64[samples], the sample to put at each position of the batch.
        home: int32[layers, experts], the device that owns each expert in this step.
        moved: int64[layers], experts whose home changes.
        before: Imbalance that spilling leaves with the homes in force and the samples as they are: the time of the
            slowest devices over that of balanced ones, each summed over layers and micro-batches.
        after: The same with the plan.
    """

    routes: KnownRoutes
    options: SpillOptions
    order: Int64
    home: Int32
    moved: Int64
    before: float
    after: float

    def spills(self, micro_batch: int) -> Iterator[SpillPlan]:
        """The replicas of a micro-batch: a plan of each layer, which lasts.

        They are those that ranks find themselves from the same counts, so they need not be sent.

        Args:
            micro_batch: Its number.

        Raises:
            ProblemError: there is no such micro-batch.
        """
        integer("micro_batch", micro_batch, 0, self.routes.micro_batches - 1)
        for home, tokens in zip(self.home, self.routes.demand(self.order, micro_batch), strict=True):
            yield QuotaPlanner(replace(self.options, home=home), self.routes.sources).plan(tokens)


class _Candidate(NamedTuple):
    """Order and homes, and what they leave: `rank` is less for what is better."""

    order: Int64
    home: Int32
    imbalance: float
    rank: tuple[int, float]


def plan_known(
    routes: KnownRoutes,
    options: SpillOptions,
    *,
    home: npt.ArrayLike | None = None,
    max_moves: int | None = None,
    price: float = 0.0,
    reordered: bool = True,
) -> KnownPlan:
    """Homes, order and replicas of a step, never worse than spilling alone.

    Experts change places, so every device keeps as many as it has; positions keep their micro-batch and rank, so every
    rank keeps as many samples, and no micro-batch's longest rank becomes longer. The same arguments give the same plan.

    Args:
        routes: The step.
        options: Spare slots, domains, speeds and token caps, and the homes in force where `home` is None.
        home: int32[layers, experts], homes in force.
        max_moves: Most experts of a layer whose home may change; None for no limit.
        price: Imbalance that moving all experts must gain; moving a share of them, that share of it.
        reordered: Whether samples may change places; where not, homes alone are planned.

    Raises:
        ProblemError: sizes differ, or a value is out of range.
    """
    instance("routes", routes, KnownRoutes, "KnownRoutes.by_rank(counts, ranks, size)")
    instance("options", options, SpillOptions, "SpillOptions.uniform(experts, devices, spare)")
    in_force = _homes_in_force(routes, options, home)
    if not 0 <= number("price", price) < float("inf"):
        raise ProblemError("price", price, "must be finite and at least 0")
    if max_moves is not None:
        integer("max_moves", max_moves, 0)
    search = _Search(routes, options, in_force, max_moves, price)
    start = search.judged(np.arange(routes.samples), in_force)
    best = start
    starts = [start]
    if reordered:
        starts += [search.with_order(start), search.with_order(search.with_homes(start, together=True))]
    for first in starts:
        last = first
        for _ in range(_ROUNDS):
            best = min(best, last, key=_rank)
            found = search.with_homes(last)
            found = min(found, search.with_order(found), key=_rank) if reordered else found
            if found.rank >= last.rank:
                break
            last = found
        best = min(best, last, key=_rank)
    moved = np.count_nonzero(best.home != in_force, axis=1)
    return KnownPlan(routes, options, best.order, best.home, moved, start.imbalance, best.imbalance)


def _rank(candidate: _Candidate) -> tuple[int, float]:
    return candidate.rank


def _homes_in_force(routes: KnownRoutes, options: SpillOptions, home: npt.ArrayLike | None) -> Int32:
    """int32[layers, experts]."""
    if home is None:
        home = np.tile(options.home, (routes.layers, 1))
    checked = integers("home", home, ndim=2, dtype=np.int32, low=0, high=options.devices - 1)
    if checked.shape != (routes.layers, routes.experts):
        wanted = f"must be [{routes.layers} layers, {routes.experts} experts], as the routes"
        raise ProblemError("home", f"array of shape {checked.shape}", wanted)
    return checked


class _Search(NamedTuple):
    """What stays the same while orders and homes are tried."""

    routes: KnownRoutes
    options: SpillOptions
    in_force: Int32
    max_moves: int | None
    price: float

    def judged(self, order: Int64, home: Int32) -> _Candidate:
        """What spilling leaves."""
        loads = self.routes.loads(order)
        time, balanced, short = 0.0, 0.0, 0
        for layer, homes in enumerate(home):
            planner = QuotaPlanner(replace(self.options, home=homes), 1, layers=len(loads))
            for plan in planner.plan_layers(loads[:, layer, np.newaxis]):
                time += plan.makespan
                balanced += plan.balanced
                short += int(plan.shortfall.sum())
        imbalance = time / balanced if balanced > 0 else 1.0
        moved = np.count_nonzero(home != self.in_force) / home.size
        return _Candidate(order, home, imbalance, (short, imbalance + self.price * moved))

    def with_homes(self, candidate: _Candidate, *, together: bool = False) -> _Candidate:
        """Homes planned from those in force: for an order, or, `together`, for the step as a whole."""
        if self.max_moves is not None and self.max_moves < 2:
            return candidate
        loads = self.routes.loads(candidate.order)
        loads = loads.sum(axis=0, keepdims=True) if together else loads
        home = self.in_force.copy()
        for layer, homes in enumerate(self.in_force):
            tokens = loads[:, layer]
            weights = tokens.sum(axis=1).astype(np.float64)
            if weights.any():
                demand = Demand.of(tokens[:, np.newaxis], weights)
                held = replace(self.options, home=homes)
                home[layer] = plan_homes(demand, held, max_moves=self.max_moves, price=self.price).home
        return self.judged(candidate.order, home)

    def with_order(self, candidate: _Candidate) -> _Candidate:
        """An order for homes, found from the candidate's."""
        routes, pool = self.routes, pool_of_devices(self.options)
        pools = int(pool.max()) + 1
        load = np.zeros((routes.samples, routes.layers, pools))
        for layer, homes in enumerate(candidate.home):
            load[:, layer] = routes.counts[:, layer] @ np.eye(pools)[pool[homes]]
        rate = np.bincount(pool, self.options.speed).astype(np.float64)
        cap = np.bincount(pool, self.options.token_cap.astype(np.float64)).astype(np.float64)
        dealing = Dealing(routes.micro_batch.astype(np.int64), routes.source.astype(np.int64), routes.sources)
        order = candidate.order.copy()
        reorder(Samples(load, routes.tokens, rate, cap), dealing, order)
        return self.judged(order, candidate.home)
