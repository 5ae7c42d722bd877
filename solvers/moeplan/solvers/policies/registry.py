"""The registry of policies.

A policy is a function that makes a layout from a problem. It lives in one file of `moeplan.solvers.policies` and
registers itself there with the `policy` decorator; every module of that package is found by name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache

from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.constraints import Constraints
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import Problem

__all__ = ["ALL_LIMITS", "Anytime", "Make", "Policy", "Progress", "available_policies", "find", "policy"]


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """Where a search stands.

    Attributes:
        layout: The best layout so far.
        bound: No layout has a smaller scenario-averaged imbalance.
    """

    layout: Layout
    bound: float


ALL_LIMITS = ("max_moves", *(field.name for field in fields(Constraints)))
"""What a policy honours that respects every limit of a problem."""

Make = Callable[[Problem, SolveParameters], Layout]

Anytime = Callable[[Problem, SolveParameters], Iterator[Progress]]


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to make a layout.

    Attributes:
        name: Name in the registry.
        source: The system or paper that it comes from.
        split: The split rule that its system uses; see `splits.RULES`.
        honours: Optional constraints of `Problem` that it respects; problems that set others are refused.
        make: The algorithm.
        anytime: The same, reporting every few milliseconds, never worse than before; None without a search.
    """

    name: str
    source: str
    split: str
    honours: frozenset[str]
    make: Make
    anytime: Anytime | None = None

    @property
    def summary(self) -> str:
        """First line of the algorithm's docstring."""
        return (inspect.getdoc(self.make) or "").split("\n", 1)[0]


_registry: dict[str, Policy] = {}


def policy(
    name: str, *, source: str, split: str, honours: tuple[str, ...] = (), anytime: Anytime | None = None
) -> Callable[[Make], Make]:
    """Register a function as the policy `name`; see `Policy` for the arguments."""

    def register(make: Make) -> Make:
        _registry[name] = Policy(name, source, split, frozenset(honours), make, anytime)
        return make

    return register


@cache
def available_policies() -> dict[str, Policy]:
    """All policies by name, in alphabetical order."""
    package = importlib.import_module("moeplan.solvers.policies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_registry.items()))


def find(name: str) -> Policy:
    """The policy called `name`.

    Raises:
        ProblemError: there is none.
    """
    known = available_policies()
    if name not in known:
        raise ProblemError("policy", repr(name), f"must be one of {', '.join(known)}")
    return known[name]
