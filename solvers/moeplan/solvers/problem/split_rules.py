"""Names of the rules that divide an expert's tokens among its replicas; `split.rules` holds the rules themselves."""

from __future__ import annotations

from enum import StrEnum

from moeplan.solvers.problem.errors import ProblemError

__all__ = ["RANK_RULES", "SplitRule", "split_rule"]


class SplitRule(StrEnum):
    """A rule by which the system that runs a layout divides tokens."""

    EVEN = "even"
    """Every replica takes the same share: vLLM, SGLang and TensorRT-LLM."""
    LITE = "lite"
    """Evenly over the replicas on the source's node, over all replicas where it has none: LAER-MoE."""
    OPTIMAL = "optimal"
    """For the least largest load per speed: ours."""
    HOME = "home"
    """Tokens stay on a node that holds their expert, as far as the largest load stays near the optimum."""
    LOCAL = "local"
    """The least traffic with every load near the optimum: a min-cost flow, for planning only."""

    @property
    def needs_sources(self) -> bool:
        """True if it cannot be worked out without knowing where tokens come from."""
        return self in (SplitRule.HOME, SplitRule.LOCAL)


RANK_RULES = frozenset(SplitRule) - {SplitRule.LOCAL}
"""Rules that ranks can execute: each takes microseconds and gives the same answer on every rank."""


def split_rule(field: str, name: str, among: frozenset[SplitRule] = frozenset(SplitRule)) -> SplitRule:
    """The rule called `name`.

    Raises:
        ProblemError: there is none `among` these; the error names `field`.
    """
    try:
        rule = SplitRule(name)
    except ValueError:
        raise ProblemError(field, repr(str(name)[:64]), f"must be one of {_listed(among)}") from None
    if rule not in among:
        reason = f"takes too long for ranks, which divide every micro-batch; use {_listed(among)}"
        raise ProblemError(field, rule, reason)
    return rule


def _listed(rules: frozenset[SplitRule]) -> str:
    return ", ".join(rule for rule in SplitRule if rule in rules)
