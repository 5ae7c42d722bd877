"""Limits of a solve: time, work, and the gap at which to stop."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.scalars import integer, number

__all__ = ["DEFAULT_WORK", "UNLIMITED_WORK", "SolveParameters"]

DEFAULT_WORK = 10_000
"""Candidates where neither work nor time is limited."""

UNLIMITED_WORK = 2**62
"""More candidates than there can be."""


@dataclass(frozen=True, slots=True)
class SolveParameters:
    """Limits of one solve, shared by all policies; a policy without a search ignores them.

    A search stops at whichever limit comes first. Only `deadline_s` depends on the clock: without one, and with a
    `work_limit` while the deadline is not reached, the same problem, `seed` and limits give the same plan, bit for bit,
    in every process. With a deadline and no work limit the clock alone ends the search, and paces it.

    Attributes:
        deadline_s: Wall-clock seconds from the start of the solve; None for no limit.
        work_limit: Candidate layouts that a local search may score; a solver counts as many for its own work. None for
            10,000, or for no limit where there is a deadline.
        target_gap: Stop when the objective is within this fraction of the proven bound.
        traffic_tolerance: How much larger than the best found for load alone the policy `traffic` may make the largest
            load, as a fraction.
        seed: Seed of every random choice.
        solver: What exact models are given to: `cpsat`, `highs`, `cbc`, or the name of another solver that PuLP finds.
        threads: Threads of that solver.
        prove: Also spend time on a stronger bound, where the quick ones leave a gap; see `configurations`. One step of
            it is made in any case after a search of 4,000 candidates, if half a second is left.
    """

    deadline_s: float | None = None
    work_limit: int | None = None
    target_gap: float = 1e-4
    traffic_tolerance: float = 0.01
    seed: int = 0
    solver: str = "cpsat"
    threads: int = 1
    prove: bool = False

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not number("parameters.deadline_s", self.deadline_s) > 0:
            raise ProblemError("parameters.deadline_s", self.deadline_s, "must be above 0, or None")
        if self.work_limit is not None:
            integer("parameters.work_limit", self.work_limit, 0)
        if not 0 <= number("parameters.target_gap", self.target_gap) < float("inf"):
            raise ProblemError("parameters.target_gap", self.target_gap, "must be finite and at least 0")
        if not 0 <= number("parameters.traffic_tolerance", self.traffic_tolerance) < float("inf"):
            raise ProblemError("parameters.traffic_tolerance", self.traffic_tolerance, "must be finite and at least 0")
        integer("parameters.seed", self.seed, 0, 2**32 - 1)
        if not self.solver or not isinstance(self.solver, str):
            raise ProblemError(
                "parameters.solver", repr(self.solver), "must be cpsat, highs, cbc, or a solver of PuLP's"
            )
        integer("parameters.threads", self.threads, 1, 1024)

    @property
    def candidates(self) -> int:
        """`work_limit`, with what None stands for."""
        if self.work_limit is not None:
            return self.work_limit
        return DEFAULT_WORK if self.deadline_s is None else UNLIMITED_WORK

    @property
    def paced_by_clock(self) -> bool:
        """True if the clock alone ends a search."""
        return self.work_limit is None and self.deadline_s is not None

    def within(self, seconds: float) -> SolveParameters:
        """The same with a deadline of `seconds` at most, by which a caller protects itself.

        It changes no plan that is made before: where no limit was given, the work limit stays what None stood for.
        """
        if self.deadline_s is None:
            return replace(self, deadline_s=seconds, work_limit=self.candidates)
        return replace(self, deadline_s=min(self.deadline_s, seconds))
