"""moeplan's own policy: bounds, constructions, and local search over scenarios, with few moves.

1. Bounds (see `bounds`) say when to stop.
2. Constructions from the mean load: the sliding window where spare slots make perfect balance attainable, groups of
   devices where they do not; longest-first packing with swaps; the published policies, so that none is ever better; and
   the current layout. Each is scored by what counts: the best split in every scenario, averaged. A layout that is
   perfect for the mean is fragile.
3. Where devices are many and spare slots suffice, blocks of a few devices that are planned apart (see `search.blocks`).
4. Local search (see `search.local`, or `search.even` where every replica takes an even share) from the best of them;
   where it stalls, large neighbourhoods (see `neighbourhoods`), or other numbers of replicas (see `search.recount`)
   where every replica takes an even share; and one step of a stronger bound, or if asked for, all of them (see
   `exact.stronger_bounds`).
5. Interchangeable devices are renamed so that the fewest replicas move. A limit of moves holds throughout: a
   construction that exceeds it is cut to the arrivals that it may have, and the search never steps over it.
6. One load vector says nothing of how loads change. Where no layout is in force, a short search on it and on a
   few that drift from it looks for a layout that is as good and less fragile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count, islice

import numpy as np

from moeplan.solvers.construct.regions import divisions, narrowings
from moeplan.solvers.construct.repair import repair, table
from moeplan.solvers.exact.model import Effort
from moeplan.solvers.exact.of_problem import any_layout, proven_by, whole
from moeplan.solvers.exact.run import building_s, run
from moeplan.solvers.exact.stronger_bounds import stronger_bounds
from moeplan.solvers.objective import score as scores
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.plan.termination import Termination
from moeplan.solvers.policies.registry import ALL_LIMITS, Progress, policy
from moeplan.solvers.policies.starts import (
    BLOCK_STARTS,
    constructions,
    current_layouts,
    of_block,
    of_regions,
    repairs,
    widened,
    window_applies,
    window_layout,
)
from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.clock import end_of, time_now
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.forecast import drifted
from moeplan.solvers.problem.layout import EMPTY, Layout, placed_in
from moeplan.solvers.problem.limit_kernels import limit_arrays
from moeplan.solvers.problem.limits import Limits, broken
from moeplan.solvers.problem.moves import keep_slots, relabel
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.search.blocks import blocks_of, divisible
from moeplan.solvers.search.cuts import Cuts, no_cuts
from moeplan.solvers.search.even import improve_even
from moeplan.solvers.search.local import Burst, Scenarios, Splits, improve, optimal_splits
from moeplan.solvers.search.neighbourhoods import neighbour
from moeplan.solvers.search.recount import recounted
from moeplan.solvers.search.rooms import Room, rooms
from moeplan.solvers.split.flow import optimal_quota
from moeplan.solvers.split.judging import judged, reordered, rule_of, score_of
from moeplan.solvers.split.memory import memory_limited, planning_speed
from moeplan.solvers.split.rules import Split

SEARCHED = (SplitRule.OPTIMAL, SplitRule.EVEN)
"""Rules that the local search knows."""

EVEN_PER_CANDIDATE = 8
"""Layouts whose even split is scored for one candidate of the work limit: nothing needs to be split anew."""

PRICED = 0.3
"""Part of a search with limited moves during which arrivals cost something, so that the most useful ones come first: at
first the distance of the layout in force from the target over `max_moves`, then less and less."""

TAKEN_BACK = 6
"""Devices at most that get back what is in force, after that, so that their arrivals are spent elsewhere."""

TAKE_BACK_AFTER = 200
"""Candidates without success after which some do."""

TRIES = 8
"""Choices of devices, as what is back may leave an expert nowhere."""

STALL = 4_000
"""Candidates in a row without success after which local search gives way to large neighbourhoods."""

NEIGHBOURHOODS = 8
"""Neighbourhoods between two bursts of local search."""

RECOUNTS = 3
"""Layouts with other numbers of replicas, between two bursts of local search."""

PER_RECOUNT = 40
"""Candidates that looking for one counts as, unless a single packing takes longer, and then that a search from it may
score."""

IN_BLOCKS = 400
"""Candidates for each block of a large cluster."""

BLOCK_GAP = 1e-3
"""Distance from its bound at which a block is good enough."""

WORK_PER_NEIGHBOURHOOD = 100
"""Candidates that a neighbourhood counts as."""

IN_ROOM, IN_ROOMS = 200, 16
"""Candidates for each start with another number of slots, where memory is tight, and one part in so many of those left
at most."""

MOST_FITTING = 50
"""Bursts of the search for a layout that fits the memory, for each number of slots."""

TO_CONSTRUCT = 0.5
"""Part of the time that constructions may take where none fits the memory yet, or blocks of devices come after them."""

TO_DIVIDE = 0.2
"""Part of the time that dividing units over regions may take."""

LAST_RESORT_S = 0.01
"""Time past a deadline that the search for any valid layout still gets."""

SHORTEST_S = 0.05
"""Time below which a neighbourhood is not begun."""

FOR_EXACT_S = 0.03
"""Time below which a small problem is not begun to be solved exactly."""

FIRST_PROOF_S = 0.5
"""Time below which a stronger bound is not begun that was not asked for."""

SMALL_DEVICES, SMALL_VARIABLES = 6, 200
"""Problems up to this size are solved exactly where local search stalls, or has had `SEARCHED_BEFORE` of the work."""

SEARCHED_BEFORE = 0.5
"""Part of the work that a small problem's local search may take, even where it still finds something now and then."""

WORK_PER_SECOND = 1_000
"""Candidates that a deterministic second of a solver counts as."""

WIDENING = 100
"""Candidates for a less fragile layout where there is only one load vector."""

WIDENING_BURST = 50
"""Candidates of it between two looks at the clock."""

WORK_PER_BURST = 2_000_000
"""Scenario x slot visits between two looks at the clock: a few milliseconds."""

LONGEST_BURST = 2_000
"""Candidates of a burst at most, so that small problems, too, get through several bursts and to the exact model."""


@policy("hybrid", source="moeplan", split=SplitRule.OPTIMAL, honours=ALL_LIMITS)
def hybrid(problem: Problem, parameters: SolveParameters) -> Iterator[Progress]:
    """Bounds, constructions, local search guided by the min cut, large neighbourhoods, few moves; the default."""
    start = time.perf_counter()
    deadline = None if parameters.deadline_s is None else start + parameters.deadline_s
    kept = _with_groups(problem)
    if kept.demand.scenarios == 1 and kept.current is None and _perfect(kept) and window_applies(kept):
        state = _Search(kept, parameters, deadline)
        state.take(window_layout(kept, end_of(deadline)))  # perfect, by the theorem
        yield state.progress()
        state.widen()
        yield state.progress()
        return
    for asked in (kept, problem):
        state = _Search(asked, parameters, deadline, required=problem)
        try:
            for progress in state.run():
                if np.isfinite(state.score):  # what does not fit the memory may yet become what does
                    yield progress
        except ProblemError:
            if asked is problem:
                raise
        if asked is problem or np.isfinite(state.score):  # else nothing fits with groups kept, which is no condition
            break
    state.widen()
    yield state.progress()  # which knows why the search ended


class _Search:
    """The best layout so far and what is left of the limits."""

    def __init__(
        self, problem: Problem, parameters: SolveParameters, deadline: float | None, *, required: Problem | None = None
    ) -> None:
        self.problem, self.parameters, self.deadline = problem, parameters, deadline
        self.required = required or problem  # without limits that are a preference: what they exclude counts for bounds
        self.preferring = self.required is not problem
        self.bounds = scores.bound(self.required)
        self.proven = 0.0  # a bound on the objective itself, where a solver proves one
        self.limits = problem.limits
        self.scenarios = Scenarios.of(problem, speed=planning_speed(problem))
        self.best: Int32 | None = None
        self.walk: Int32 | None = None  # where the last burst ended: where moves are limited, not always at the best
        self._splits: tuple[Int32 | None, Splits | None] = None, None  # of the layout that the last burst ended with
        self._cuts: Cuts | None = None  # found by the bursts before
        self.score = np.inf
        self.before = np.inf  # the first layout's objective: that of the one in force, if there is one
        self._shown: Layout | None = None
        self._divided: tuple[Int32, Split] | None = None  # a layout and its split, where to divide anew would take long
        self._shown_split: Split | None = None
        self.work = 0
        self.judging = 0.0  # seconds that judging a layout takes: the plan will be judged once more
        self.constructed = False  # whether a construction has been made

    @property
    def bound(self) -> float:
        """No layout has a smaller objective."""
        return max(self.proven, scores.objective(self.problem, self.bounds))

    @property
    def target(self) -> float:
        """The objective to stop at."""
        return self.bound * (1 + self.parameters.target_gap)

    @property
    def late(self) -> bool:
        """True if the deadline has passed, but for the time to judge the plan."""
        return self.deadline is not None and time.perf_counter() >= self.deadline - self.judging

    @property
    def _end(self) -> float:
        """The time on the clock of kernels at which the search will be late."""
        return end_of(self.deadline) - self.judging

    @property
    def _spent(self) -> float:
        """The part of the work, or of the time where only time is limited, that is over."""
        parameters = self.parameters
        if parameters.deadline_s is None or not parameters.paced_by_clock:
            return self.work / max(1, parameters.candidates)
        assert self.deadline is not None
        return 1 - (self.deadline - time.perf_counter()) / parameters.deadline_s

    @property
    def over(self) -> bool:
        """True if it is time to stop."""
        return self.score <= self.target or self.late or self.work >= self.parameters.candidates

    @property
    def _time_for_proof(self) -> bool:
        """True if a first step of a stronger bound, which halves the gap as a rule, applies and fits into the time."""
        return self._time_for(FIRST_PROOF_S) and rule_of(self.problem) in SEARCHED

    def _time_for(self, seconds: float) -> bool:
        """True if more than so much time is left."""
        return self.deadline is None or self.deadline - time.perf_counter() > seconds

    def progress(self) -> Progress:
        """The best layout, the same object until there is a better one, and the bound."""
        assert self.best is not None
        if self._shown is None:
            slots = self.best.copy()
            known = self._divided[1] if self._divided is not None and self._divided[0] is self.best else None
            if self.problem.current is not None:
                keep_slots(self.problem.current.slots, slots)
                known = None if known is None else reordered(known, self.best, slots)
            self._shown, self._shown_split = Layout(slots, self.problem.experts), known
        return Progress(self._shown, self.bound, self.ended, self._shown_split)

    @property
    def ended(self) -> Termination:
        """Why the search is over, if it is."""
        if self.late:
            return Termination.DEADLINE
        return Termination.WORK_LIMIT if self.work >= self.parameters.candidates else Termination.NOTHING_LEFT

    def take(self, slots: Int32, quota: Int64 | None = None) -> bool:
        """Keep a layout if it is better; the quota of an optimal split, if known, saves finding one to judge it."""
        if quota is None:
            start = time.perf_counter()
            score, divided = judged(self.problem, slots, end_of(self.deadline))
            took = time.perf_counter() - start
            # Layouts that are nearly balanced take longer than the first ones, and with little memory some far longer.
            self.judging = max(self.judging, took) if _memory_limited(self.problem) else took
        else:
            # Not the plan's own split, which whoever has the layout can find again.
            score, divided = scores.score(self.problem, quota), None
        self.before = min(self.before, score) if self.best is None else self.before
        if score >= self.score:
            return False
        self.best, self.score, self._shown = slots, score, None
        self._divided = None if divided is None else (slots, divided)
        return True

    def run(self) -> Iterator[Progress]:
        """Constructions, then the search, for rules that it knows."""
        yield from self.construct()
        if self.best is None or not self.over:
            yield from self._in_rooms()
        if self.best is None:  # what is only preferred was not found
            return
        yield from self.in_blocks()
        if rule_of(self.problem) in SEARCHED:  # constructions are judged by any
            yield from self.search()

    def construct(self) -> Iterator[Progress]:
        problem = self.problem
        if not self.limits.simple or _lost(problem) or _crowded(problem):
            yield from self._within_limits()
            return
        for slots in chain(current_layouts(problem), self._constructions(problem, self._construct_by)):
            for within in self._within_moves(slots):
                if self.take(within):
                    yield self.progress()
                if self.late:
                    break
            if self._tried_enough:
                break

    def _constructions(self, problem: Problem, deadline: float | None) -> Iterator[Int32]:
        """`constructions` of the problem, or of one like it."""
        for slots in constructions(problem, self.parameters, deadline):
            self.constructed = True
            yield slots

    @property
    def _tried_enough(self) -> bool:
        """True if no further construction is worth its time; where none fits, the search for one needs some of it."""
        part = TO_CONSTRUCT**2 if self.preferring else TO_CONSTRUCT
        if self.best is None and rule_of(self.problem) in SEARCHED and self._spent >= part:
            return True
        return self.score <= self.target or self.late

    @property
    def _may_divide(self) -> bool:
        """True if blocks of devices may be planned apart."""
        anywhere = self.limits.simple and not self.limits.moves_limited and rule_of(self.problem) is SplitRule.OPTIMAL
        return anywhere and divisible(self.problem)

    def _after(self, part: float) -> float | None:
        """When that part of the time will be over, on `time.perf_counter`."""
        if self.deadline is None or self.parameters.deadline_s is None:
            return None
        return self.deadline - (1 - part) * self.parameters.deadline_s

    @property
    def _construct_by(self) -> float | None:
        """The deadline, or earlier where blocks need the rest of the time, which are better than any construction."""
        return self._after(TO_CONSTRUCT) if self._may_divide else self.deadline

    def _balance_by(self, part: float = 1.0) -> float | None:
        """When balancing regions is to end, so that the layout is judged before that part of the time is over."""
        by = self._after(part)
        return None if by is None else by - self.judging

    def in_blocks(self) -> Iterator[Progress]:
        """Where there are many devices, plan blocks of a few apart, in turn, and take what they make together."""
        problem, parameters = self.problem, self.parameters
        if not self._may_divide or self.over:
            return
        work = min(IN_BLOCKS, parameters.candidates - self.work)
        effort = replace(parameters, work_limit=work, target_gap=max(parameters.target_gap, BLOCK_GAP))
        blocks = []
        for devices, experts in blocks_of(problem, self._end):
            part = _Search(of_block(problem, devices, experts), effort, self.deadline)
            for start in islice(constructions(part.problem, effort, self.deadline), BLOCK_STARTS):
                part.take(start)
            blocks.append((devices, experts, part))
            if self.late:
                return
        while blocks:
            slots = np.full((problem.devices, problem.cluster.max_slots), EMPTY, np.int32)
            for devices, experts, part in blocks:
                assert part.best is not None
                slots[devices, : part.best.shape[1]] = np.where(part.best == EMPTY, EMPTY, experts[part.best])
            for within in self._within_moves(slots):
                if self.take(within):
                    yield self.progress()
            searched = [part for _, _, part in blocks if not part.over]
            if not searched or self.over:
                break
            for part in searched:
                assert part.best is not None
                part._descend(part.best, min(_burst(part.problem), work - part.work))
                if self.late:
                    break
        self.work += max((part.work for _, _, part in blocks), default=0)

    def _within_moves(self, slots: Int32) -> Iterator[Int32]:
        """A layout, int32[devices, width], with its devices renamed for the fewest moves, cut to the limit of moves."""
        problem = self.problem
        if problem.current is None:
            yield slots
            return
        slots = relabel(problem.current, slots, problem.capacity, problem.cluster)
        if problem.max_moves is None or _arrivals(problem.current, slots) <= problem.max_moves:
            yield slots
            return
        for stay in (True, False):
            cut = repair(problem, self.limits, slots, stay=stay)
            if cut is not None:
                yield cut

    def _within_limits(self) -> Iterator[Progress]:
        """Every construction repaired until it respects the limits; where none fits the memory, a search for one."""
        problem = self.problem
        yield from self._in_regions()
        if self._tried_enough:
            return
        # Balancing each construction anew takes longer than searching, and is worth it where time does not matter.
        divided = self.best is not None and self.parameters.paced_by_clock
        current = [] if problem.current is None else [problem.current.slots]
        # Where none may fit the memory, the search for what does needs some of the time.
        part = TO_CONSTRUCT if _memory_limited(problem) else 1.0
        for slots, limits in (
            repaired
            for wanted in chain(current, self._constructions(problem, self.deadline))
            for repaired in repairs(problem, wanted, lambda: self._balance_by(part), near=divided)
        ):
            if self.take(slots):
                self.limits = limits
                yield self.progress()
            if self._tried_enough:
                break

    def _in_regions(self) -> Iterator[Progress]:
        """Where units keep to regions, divide them from scratch, and let each region make of its own what it can.

        Each division is searched a little before it is judged: a region with fewer slots to spare is worse until then.
        """
        problem = self.problem
        if self.limits.regions == 1 or self.limits.moves_limited or rule_of(problem) not in SEARCHED:
            return
        if _memory_limited(problem):  # which regions made without it would not fit
            return
        for region in divisions(problem, self._after(TO_DIVIDE)):
            limits = problem.limits.narrowed(region)
            wanted = of_regions(problem, region, self.parameters, self.deadline)
            slots = repair(problem, limits, wanted, stay=False)
            if slots is None:
                continue
            self._try(slots, self.scenarios, limits)
            if self.take(slots):
                self.limits = limits
                yield self.progress()
            if self._tried_enough:
                break

    def _try(self, slots: Int32, measure: Scenarios, limits: Limits) -> None:
        """A short search from a layout, which is changed in place, before it is judged."""
        if self.late:
            return
        left = self.parameters.candidates - self.work
        steps = min(_burst(self.problem), IN_ROOM, left // IN_ROOMS)
        self._improve(slots, measure, limits, self._effort(steps, 0.0))
        self.work += steps

    def _in_rooms(self) -> Iterator[Progress]:
        """Where memory is tight, layouts that leave slots empty; where nothing fits yet, a search for what does."""
        problem, end = self.problem, self._give_up
        ways = []
        for room in rooms(problem) if rule_of(problem) in SEARCHED else ():
            for slots, limits in self._starts_in(room):
                self._try(slots, room.fast, limits)
                if (not self.late or self._may_judge(end)) and self.take(slots):
                    self.scenarios, self.limits = room.fast, limits
                    yield self.progress()
                ways.append((room, slots, limits))
                if self.late:
                    break
            if self.late and ways:
                break
        # An exact model, which comes after them, may need more time to be written down than there is.
        few = self.deadline is None or self._time_for(building_s(problem.loads, problem.cluster.speed))
        for turn in range(len(ways) * MOST_FITTING) if few else count():
            if self.best is not None or not ways or not self._may_judge(end):
                break
            room, slots, limits = ways[turn % len(ways)]
            burst = Burst(_burst(problem), turn, 0.0, room.fits, end - self.judging)
            if self._improve(slots, room.full, limits, burst) <= room.fits and self.take(slots):
                self.scenarios, self.limits = room.fast, limits
        if self.best is None and self.preferring and not self._may_judge(end):
            return
        if self.best is None:
            self._take_late()
        yield self.progress()

    @property
    def _give_up(self) -> float:
        """The time on the clock of kernels until which any layout that fits is looked for: past the deadline a little.

        Where the limits are a preference, what has to be met without them needs a part of the time.
        """
        if self.preferring and self.deadline is not None:
            return end_of(self._after(TO_CONSTRUCT))
        return max(end_of(self.deadline) + LAST_RESORT_S, time_now() + LAST_RESORT_S / 2)

    def _may_judge(self, end: float) -> bool:
        """True if a layout can be judged until `end`, on the clock of kernels, or none has been."""
        return not self.judging or time_now() + self.judging < end

    def _take_late(self) -> None:
        """Take the first construction that fits, or else any valid layout: a little late rather than none."""
        problem = self.problem
        deadline = None if self.deadline is None else self.deadline + LAST_RESORT_S
        end = end_of(deadline)
        if not self.constructed or self._may_judge(end):
            for slots, limits in (
                repaired
                for wanted in self._constructions(problem, deadline)
                for repaired in repairs(problem, wanted, self._balance_by)
            ):
                if self.take(slots):
                    self.limits = limits
                    return
                if not self._may_judge(end):
                    break
        self._take_any(deadline)

    def _starts_in(self, room: Room) -> Iterator[tuple[Int32, Limits]]:
        """Layouts, int32[devices, width], that use no more slots, and the narrowed limits that they respect."""
        problem = self.problem
        if (problem.limits.must.sum(axis=1) > room.slots).any():
            return
        cluster = replace(problem.cluster, slots=room.slots, speed=room.fast.speed, memory_bytes=None)
        highest = Demand.of(problem.loads.max(axis=0), spread=0)  # every scenario has to fit
        apart = Problem(cluster, highest, split_rule=problem.split_rule)
        current = [] if problem.current is None else [problem.current.slots]
        for wanted in chain(current, islice(self._constructions(apart, self.deadline), 1)):
            for narrowed in narrowings(problem, placed_in(wanted, problem.experts), self._balance_by):
                limits = replace(narrowed, capacity=apart.capacity)
                slots = repair(apart, limits, wanted, stay=limits.moves_limited)
                if slots is not None:
                    yield widened(slots, problem), limits

    def _take_any(self, deadline: float | None) -> None:
        """Take any valid layout, which exists by the model's split even where ours does not fit the memory."""
        slots = any_layout(self.problem, self.parameters.solver, deadline)
        if not self.take(slots):
            self.best = slots
        self._narrow_to(placed_in(slots, self.problem.experts))

    def _narrow_to(self, placed: Bool) -> None:
        """Let the search go on in the regions of a layout, bool[devices, experts], that others found."""
        self.limits = next(narrowings(self.problem, placed), self.problem.limits)

    def search(self) -> Iterator[Progress]:
        """Local search; where it stalls, large neighbourhoods and proofs, in turn."""
        problem, parameters = self.problem, self.parameters
        rng = np.random.default_rng(parameters.seed)
        burst = _burst(problem)
        price = 0.0
        if problem.max_moves and np.isfinite(self.before):  # the layout in force may not fit the memory
            price = max(0.0, self.before - self.target) / problem.max_moves
        proofs: Iterator[Float64] | None = None
        idle = since = 0
        exact = _small(problem, parameters.solver)
        while not self.over:
            before = self.score
            price_now = price * max(0.0, 1 - self._spent / PRICED)
            assert self.best is not None
            start = self.best
            if price and not price_now and since >= TAKE_BACK_AFTER:
                start, since = self._some_taken_back(rng), 0
            elif self.walk is not None and (price_now or since):
                start = self.walk
            begun = self.work
            self._descend(start, burst, price_now)
            if self._may_recount and self.score >= before:
                self._recount()
            idle = 0 if self.score < before or (price_now and not exact) else idle + self.work - begun
            since = since + burst if price and not price_now and self.score >= before else 0
            due = idle >= STALL or self._spent >= SEARCHED_BEFORE
            if exact and due and not self.over and self._time_for(FOR_EXACT_S):
                if self._solve_whole():
                    yield self.progress()
                    return
                exact = False
            if idle >= STALL and not self.over:
                if (
                    rule_of(problem) is SplitRule.OPTIMAL and not price
                ):  # few moves are better spent by taking some back
                    self._neighbourhoods(rng)
                if parameters.prove or (proofs is None and self._time_for_proof):
                    proofs = proofs or stronger_bounds(self.required, self._reached(), self.deadline)
                    self.bounds = next(proofs, self.bounds)
            yield self.progress()
        if proofs is None and self.work >= STALL and self.score > self.target and self._time_for_proof:
            self.bounds = next(stronger_bounds(self.required, self._reached(), self.deadline), self.bounds)
            yield self.progress()

    def widen(self) -> None:
        """Where there is one load vector, take a layout that is as good on it and suits loads near it, if found."""
        problem, parameters = self.problem, self.parameters
        known = problem.demand.scenarios > 1 or not problem.demand.spread or problem.current is not None
        if known or problem.devices == 1 or rule_of(problem) is not SplitRule.OPTIMAL or self.late:
            return
        work = min(WIDENING, parameters.candidates)
        near = replace(problem, demand=drifted(problem.demand))
        wide = _Search(near, replace(parameters, work_limit=work), self.deadline)
        wide.limits = self.limits
        if self.best is None or not wide.take(self.best):  # loads near it do not fit the memory
            return
        if self.limits.simple:
            for _ in wide.construct():
                pass
        while not wide.over:
            assert wide.best is not None
            wide._descend(wide.best, min(WIDENING_BURST, work))
        assert wide.best is not None
        score = score_of(problem, wide.best)
        if score <= max(self.score, self.target):
            self.best, self.score, self._shown = wide.best, score, None

    def _some_taken_back(self, rng: np.random.Generator) -> Int32:
        """The best layout with what is in force back on some devices; as it is where that may not be."""
        problem = self.problem
        assert self.best is not None
        assert problem.current is not None
        held, placed = problem.current.placed, placed_in(self.best, problem.experts)
        changed = np.flatnonzero((placed & ~held).any(axis=1))
        for _ in range(TRIES):
            devices = rng.permutation(changed)[: rng.integers(1, TAKEN_BACK + 1)]
            back = placed.copy()
            back[devices] = held[devices]
            fits = back.any(axis=0).all() and (back.sum(axis=1) <= problem.capacity).all()
            if fits and broken(self.limits, back) is None:
                slots = self.best.copy()
                slots[devices] = table(problem, back)[devices]
                return slots
        return self.best

    def _descend(self, start: Int32, burst: int, price: float = 0.0) -> None:
        """A burst of local search from a layout."""
        problem, parameters = self.problem, self.parameters
        steps = min(burst, parameters.candidates - self.work)
        slots = start.copy()
        effort = self._effort(steps, price)
        of, splits = self._splits
        if rule_of(problem) is SplitRule.EVEN:
            reached = self._improve(slots, self.scenarios, self.limits, effort)
        else:
            if splits is None or of is not start:
                splits = optimal_splits(slots, self.scenarios)
            self._cuts = self._cuts or no_cuts(problem.devices, self.scenarios.tokens)
            reached = improve(slots, splits, self._cuts, self.scenarios, limit_arrays(self.limits), effort)
        if np.array_equal(slots, start):
            slots = start
        self.walk, self._splits = slots, (slots, splits)
        self.work += steps
        if slots is start:
            return
        if _memory_limited(problem):  # what it leaves, the search only guesses
            self.take(slots)
        elif reached < self.score:
            self.take(slots, None if splits is None else splits.quota.reshape(-1, *slots.shape))

    @property
    def _may_recount(self) -> bool:
        """True if packing replicas anew may help: only slots limit them, and one load vector is all that counts."""
        problem = self.problem
        one = problem.demand.scenarios == 1 and rule_of(problem) is SplitRule.EVEN
        return one and self.limits.none and not _memory_limited(problem)

    def _recount(self) -> None:
        """Short searches from layouts with other numbers of replicas than the best one."""
        problem, candidates = self.problem, self.parameters.candidates
        replicas = int(problem.capacity.sum())
        packing = max(1, replicas * replicas.bit_length() // EVEN_PER_CANDIDATE**2)  # candidates that take as long
        packings = max(1, PER_RECOUNT // packing)
        for _ in range(RECOUNTS):
            if self.over:
                return
            assert self.best is not None
            effort = self._effort(packings, 0.0)
            packed = recounted(self.best, problem.mean_load, problem.capacity, self.scenarios.speed, effort)
            self.work += packings * packing
            if self.late:
                return
            slots, steps = widened(packed, problem), min(PER_RECOUNT, max(1, candidates - self.work))
            if self._improve(slots, self.scenarios, self.limits, self._effort(steps, 0.0)) < self.score:
                for within in self._within_moves(slots):
                    self.take(within)
            self.work += steps

    def _effort(self, steps: int, price: float) -> Burst:
        """A burst of so many candidates."""
        return Burst(steps, self.parameters.seed * 1_000_003 + self.work, price, self.target, self._end)

    def _improve(self, slots: Int32, measure: Scenarios, limits: Limits, burst: Burst) -> float:
        """A burst of search from a layout that is changed in place, under any measure; what it reaches."""
        if rule_of(self.problem) is SplitRule.EVEN:
            cheap = burst._replace(steps=burst.steps * EVEN_PER_CANDIDATE)
            return improve_even(slots, measure, limit_arrays(limits), cheap)
        cuts = no_cuts(self.problem.devices, measure.tokens)
        return improve(slots, optimal_splits(slots, measure), cuts, measure, limit_arrays(limits), burst)

    def _neighbourhoods(self, rng: np.random.Generator) -> None:
        """A handful of neighbourhoods; plateaus are crossed where the freed devices end up no worse."""
        for _ in range(NEIGHBOURHOODS):
            if self.over or not self._time_for(SHORTEST_S):
                return
            self.work += WORK_PER_NEIGHBOURHOOD
            assert self.best is not None
            slots = neighbour(self.problem, self.limits, self.best, rng, self.parameters.solver, self.deadline)
            if slots is not None and not self.take(slots) and score_of(self.problem, slots) == self.score:
                self.best = slots

    def _solve_whole(self) -> bool:
        """Solve a small problem exactly; whether that is proven to be the best there is."""
        problem, parameters = self.problem, self.parameters
        work = max(1, parameters.candidates - self.work) / WORK_PER_SECOND
        answer = run(whole(problem, self.best), parameters.solver, Effort(self.deadline, work, gap=0.0))
        if answer.placed is not None and self.take(table(problem, answer.placed)):
            self._narrow_to(answer.placed)
        if self.preferring:
            return answer.status == "optimal"
        if rule_of(problem) is SplitRule.EVEN:  # the model's shares are rounded down
            self.proven = max(self.proven, min(self.score, proven_by(problem, answer)))
            return self.score <= self.target
        if answer.status != "optimal" or problem.tail < 1:  # the model rounds the mean of a tail
            return False
        self.proven = self.score
        return True

    def _reached(self) -> Float64:
        """float64[scenarios]: the largest load per speed of the best layout."""
        assert self.best is not None
        speed = self.problem.cluster.speed
        return scores.levels(self.problem, optimal_quota(self.best, self.problem.loads, speed)[0])


def _burst(problem: Problem) -> int:
    """Candidates between two looks at the clock."""
    visits = problem.demand.scenarios * int(problem.capacity.sum()) * 16
    longest = LONGEST_BURST // (EVEN_PER_CANDIDATE if rule_of(problem) is SplitRule.EVEN else 1)
    return min(max(8, WORK_PER_BURST // visits), longest)


def _with_groups(problem: Problem) -> Problem:
    """The problem with its expert groups kept on a node each, where nodes and the other limits leave room for that."""
    if problem.groups == 1 or problem.cluster.nodes == 1 or problem.constraints.groups_on_node:
        return problem
    try:
        kept = replace(problem, constraints=replace(problem.constraints, groups_on_node=True))
    except ProblemError:  # groups do not fit, or contradict a domain or a pin
        return problem
    start = problem.current or Layout.contiguous(problem.experts, problem.capacity)
    return problem if next(repairs(kept, start.slots, lambda: None), None) is None else kept


def _crowded(problem: Problem) -> bool:
    """True if a device holds more replicas than it has room for any more."""
    return problem.current is not None and bool((problem.current.placed.sum(axis=1) > problem.capacity).any())


def _lost(problem: Problem) -> bool:
    """True if an expert has no replica in force any more."""
    return problem.current is not None and not bool(problem.current.placed.any(axis=0).all())


def _perfect(problem: Problem) -> bool:
    """True if nothing but slots limits a layout, so that the theorem of the sliding window holds."""
    return problem.limits.free and not _memory_limited(problem) and rule_of(problem) is SplitRule.OPTIMAL


def _memory_limited(problem: Problem) -> bool:
    """True if the tokens that a device may compute depend on its replicas."""
    return memory_limited(problem.cluster, problem.expert)


def _small(problem: Problem, solver: str) -> bool:
    """True if there is an exact model of the whole problem for that solver, and it is small enough to be solved."""
    variables = problem.demand.scenarios * problem.devices * problem.experts
    small = problem.devices <= SMALL_DEVICES and variables <= SMALL_VARIABLES
    return small and (
        rule_of(problem) is SplitRule.OPTIMAL or (rule_of(problem) is SplitRule.EVEN and solver == "cpsat")
    )


def _arrivals(current: Layout, slots: Int32) -> int:
    return int((placed_in(slots, current.experts) & ~current.placed).sum())
