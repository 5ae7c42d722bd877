"""How hard to try."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.solvers.problem.errors import ProblemError

__all__ = ["SolveParameters"]


@dataclass(frozen=True, slots=True)
class SolveParameters:
    """Limits of one solve, shared by all policies; a policy without a search ignores them.

    A search stops at whichever limit comes first. Only `deadline_s` depends on the clock: while it is not reached, the
    same problem, `seed` and `work_limit` give the same plan, bit for bit, in every process.

    Attributes:
        deadline_s: Wall-clock seconds from the start of the solve; None for no limit.
        work_limit: Candidate layouts that a local search may score; a solver counts as many for its own work.
        target_gap: Stop when the objective is within this fraction of the proven bound.
        traffic_tolerance: How much larger than the best found for load alone the policy `traffic` may make the largest
            load, as a fraction.
        seed: Seed of every random choice.
        solver: What exact models are given to: `cpsat`, `highs`, `cbc`, or the name of another solver that PuLP finds.
        threads: Threads of that solver.
        prove: Also spend time on a stronger bound, where the quick ones leave a gap; see `configurations`.
    """

    deadline_s: float | None = None
    work_limit: int = 10_000
    target_gap: float = 1e-4
    traffic_tolerance: float = 0.01
    seed: int = 0
    solver: str = "cpsat"
    threads: int = 1
    prove: bool = False

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ProblemError("parameters.deadline_s", self.deadline_s, "must be above 0, or None")
        if self.work_limit < 0:
            raise ProblemError("parameters.work_limit", self.work_limit, "must be at least 0")
        if not 0 <= self.target_gap < float("inf"):
            raise ProblemError("parameters.target_gap", self.target_gap, "must be finite and at least 0")
        if not 0 <= self.traffic_tolerance < float("inf"):
            raise ProblemError("parameters.traffic_tolerance", self.traffic_tolerance, "must be finite and at least 0")
        if not 0 <= self.seed < 2**32:
            raise ProblemError("parameters.seed", self.seed, "must be 0 to 2**32 - 1")
        if not self.solver:
            raise ProblemError(
                "parameters.solver", repr(self.solver), "must be cpsat, highs, cbc, or a solver of PuLP's"
            )
        if not 1 <= self.threads <= 1024:
            raise ProblemError("parameters.threads", self.threads, "must be 1 to 1024")
