"""The integer model of a placement, free of any solver.

    y[d, e] in {0, 1}       device d holds a replica of expert e
    x[s, d, e] >= 0         tokens of e that d computes in scenario s
    z[s]                    largest load per speed

    minimise    sum_s weights[s] z[s], or the mean of the worst part of it (below)
    such that   sum_d x[s, d, e] = loads[s, e]
                sum_e x[s, d, e] <= speed[d] z[s]
                x[s, d, e] <= min(loads[s, e], speed[d] cap[s]) y[d, e]
                sum_d y[d, e] >= fewest[e],   sum_e y[d, e] <= capacity[d]
                memory:   replica_bytes sum_e y[d, e] + activation_bytes sum_e x[s, d, e] <= memory[d]
                limits:   y is 0 or 1 where they say so, sum_d y[d, e] <= most[e], arrivals within their limits,
                          and y[d, e] <= g[unit of e, region of d] with one g of each unit

`cap` and `fewest` come from the incumbent, which every model starts from: a plan that is better keeps every z[s] below
cap[s], so an expert needs enough replicas to fit under it. Without them the relaxation is no better than the average.
Interchangeable devices are ordered by their load in the first scenario.

The mean of the worst part `tail` of the scenarios is linear after Rockafellar & Uryasev (2000), with the imbalance
z[s] / floor[s] of each, and its importance weights[s] floor[s]:

    minimise    eta + sum_s weights[s] v[s] / tail
    such that   v[s] >= z[s] - eta floor[s],   v[s] >= 0,   eta >= 1

`eta` is at least 1, since no imbalance is less; so scenarios without tokens, whose imbalance is 1, need no variable.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplan.solvers.objective.score import risk
from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.limits import Limits
from moeplan.solvers.split.flow import optimal_quota

__all__ = ["Answer", "Effort", "Model", "OutOfTime", "Report", "check"]


@dataclass(frozen=True, eq=False)
class Model:
    """One placement problem with a plan to start from.

    Attributes:
        loads: int64[scenarios, experts].
        weights: float64[scenarios], importance of each scenario per unit of its load; where there is a `tail`, the
            part of all scenarios that it is, over its average load per speed.
        speed: float64[devices].
        capacity: int32[devices].
        incumbent: int32[devices, width], a valid layout; None if none is known.
        limits: Limits on replicas; None for none.
        memory: int64[devices], bytes; None for no limit.
        replica_bytes: Memory of a replica.
        activation_bytes: Memory of a token that is computed.
        hinted: Whether solvers are told of the incumbent, beyond what it says about `cap`.
        tail: Part of the scenarios, the worst, that counts; 1.0 for all.
        even: Whether all replicas of an expert take the same share, which only `even_model` knows.
    """

    loads: Int64
    weights: Float64
    speed: Float64
    capacity: Int32
    incumbent: Int32 | None
    limits: Limits | None = None
    memory: Int64 | None = None
    replica_bytes: int = 0
    activation_bytes: int = 0
    hinted: bool = True
    tail: float = 1.0
    even: bool = False

    @property
    def scenarios(self) -> int:
        """Number of scenarios."""
        return self.loads.shape[0]

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.loads.shape[1]

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.capacity)

    @cached_property
    def equal_speeds(self) -> bool:
        """True if all devices are as fast as the first."""
        return bool((self.speed == self.speed[0]).all())

    @cached_property
    def interchangeable(self) -> bool:
        """True if devices can be renamed freely, so that an order may be imposed on them."""
        limited = self.limits is not None or (self.memory is not None and bool((self.memory != self.memory[0]).any()))
        return not limited and self.equal_speeds and bool((self.capacity == self.capacity[0]).all())

    @cached_property
    def start(self) -> tuple[Bool, Int64]:
        """The incumbent as ``y`` bool[devices, experts] and ``x`` int64[scenarios, devices, experts].

        Where devices are interchangeable they come in descending order of load in the first scenario.
        """
        assert self.incumbent is not None
        quota, _ = optimal_quota(self.incumbent, self.loads, self.speed)
        device, slot = np.nonzero(self.incumbent >= 0)
        expert = self.incumbent[device, slot]
        y = np.zeros((self.devices, self.experts), np.bool_)
        x = np.zeros((self.scenarios, self.devices, self.experts), np.int64)
        y[device, expert] = True
        x[:, device, expert] = quota[:, device, slot]
        if self.interchangeable:
            order = np.argsort(-x[0].sum(axis=1), kind="stable")
            return y[order], x[:, order]
        return y, x

    @cached_property
    def level(self) -> Float64:
        """float64[scenarios]: largest load per speed of the incumbent."""
        level: Float64 = (self.start[1].sum(axis=2) / self.speed).max(axis=1)
        return level

    @cached_property
    def floor(self) -> Float64:
        """float64[scenarios]: average load per speed."""
        floor: Float64 = self.loads.sum(axis=1) / self.speed[self.capacity > 0].sum()
        return floor

    def objective(self, level: Float64) -> float:
        """The objective, for the largest load per speed of each scenario, float64[scenarios]."""
        if self.tail >= 1:
            return float(self.weights @ level)
        share = self.weights * self.floor
        idle = max(0.0, 1.0 - float(share.sum()))
        return risk(np.append(level / self.floor, 1.0), np.append(share, idle), self.tail)

    @cached_property
    def cap(self) -> Float64:
        """float64[scenarios]: a plan no worse than the incumbent keeps its largest load per speed at or below this."""
        most = np.maximum(1.0, self.loads.sum(axis=1) / self.speed.min())
        if (
            self.incumbent is None or self.activation_bytes
        ):  # the memory limit can force a split above the unconstrained optimum
            return most
        slack = self.objective(self.level) - self.objective(self.floor)
        # All others at their average, a scenario alone has at least this part of the objective.
        part = self.weights if self.tail >= 1 else np.minimum(1 / self.floor, self.weights / self.tail)
        with np.errstate(divide="ignore", over="ignore"):
            cap: Float64 = self.floor + slack / part
        return np.minimum(cap * (1 + 1e-9), most)

    @cached_property
    def fewest(self) -> Int64:
        """int64[experts]: replicas that an expert needs so that its load fits under `cap` on the fastest devices."""
        fastest = np.cumsum(np.sort(self.speed)[::-1])
        needed = np.ones(self.experts, np.int64)
        for s in range(self.scenarios):
            room = self.cap[s] * fastest * (1 + 1e-9)
            needed = np.maximum(needed, np.searchsorted(room, self.loads[s]) + 1)
        return np.minimum(needed, self.devices)


@dataclass(frozen=True, slots=True)
class Effort:
    """Limits of a solver.

    Attributes:
        deadline: Time on `time.perf_counter` to stop at; None for none.
        work: Limit that does not depend on the clock, in the solver's own deterministic seconds or nodes.
        threads: Threads of the solver.
        seed: Seed of its random choices.
        gap: Relative gap to stop at.
    """

    deadline: float | None = None
    work: float = 1.0
    threads: int = 1
    seed: int = 0
    gap: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds left, at least a millisecond; infinity without a deadline."""
        return np.inf if self.deadline is None else max(1e-3, self.deadline - time.perf_counter())


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A solver's answer.

    Attributes:
        placed: bool[devices, experts], its best placement; None if it found none.
        bound: No placement has a smaller objective; 0 where the solver does not say.
        status: ``optimal``, ``feasible``, ``infeasible`` or ``unknown``.
    """

    placed: Bool | None
    bound: float
    status: str


Report = Callable[[Bool], None]
"""Takes a better placement, bool[devices, experts], while a solver runs."""


class OutOfTime(Exception):  # noqa: N818 - a signal, not an error
    """The deadline passed while a model was being built."""


def check(effort: Effort) -> None:
    """Give up building once the deadline has passed.

    Raises:
        OutOfTime: it has.
    """
    if effort.deadline is not None and time.perf_counter() > effort.deadline:
        raise OutOfTime
