"""The registry of policies.

A policy is a function that makes a layout from a problem, or, if it searches, a generator that yields its `Progress`.
It lives in one file of `moeplan.solvers.policies` and registers itself there with the `policy` decorator; every module
of that package is found by name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar

from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.plan.termination import Termination
from moeplan.solvers.problem.constraints import Constraints
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule

if TYPE_CHECKING:  # the compiler loads slowly
    from moeplan.solvers.split.rules import Split

__all__ = ["ALL_LIMITS", "ALL_RULES", "Make", "Policy", "Progress", "Search", "available_policies", "find", "policy"]


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """Where a search stands.

    Attributes:
        layout: The best layout so far.
        bound: No layout has a smaller objective.
        termination: Why the search ends with this; of the last progress only.
        split: How the layout divides the problem's tokens by the rule asked for, if the search knows.
    """

    layout: Layout
    bound: float
    termination: Termination = Termination.NOTHING_LEFT
    split: Split | None = None


ALL_LIMITS = ("max_moves", *(field.name for field in fields(Constraints)))
"""Limits that a policy honours which respects every one of a problem."""

ALL_RULES = frozenset(SplitRule)
"""Rules for a policy whose layouts are judged, or simply made, under whichever is asked for."""

Make = Callable[[Problem, SolveParameters], Layout]

Search = Callable[[Problem, SolveParameters], Iterator[Progress]]

F = TypeVar("F", Make, Search)


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to make a layout.

    Attributes:
        name: Name in the registry.
        source: The system or paper that it comes from.
        split: The split rule that its system uses: a problem's, where it asks for none.
        rules: Split rules that it plans for; problems that ask for others are refused.
        honours: Optional constraints of `Problem` that it respects; problems that set others are refused.
        search: The algorithm. It reports every few milliseconds, never worse than before; at least once.
        summary: What it does, in a line.
    """

    name: str
    source: str
    split: SplitRule
    rules: frozenset[SplitRule]
    honours: frozenset[str]
    search: Search
    summary: str


_registry: dict[str, Policy] = {}


def policy(
    name: str,
    *,
    source: str,
    split: SplitRule,
    rules: frozenset[SplitRule] = ALL_RULES,
    honours: tuple[str, ...] = (),
) -> Callable[[F], F]:
    """Register a function as the policy `name`; see `Policy` for the arguments. `summary` is its docstring."""

    def register(function: F) -> F:
        summary = (inspect.getdoc(function) or "").split("\n", 1)[0]
        given: Any = function
        search: Search = given if inspect.isgeneratorfunction(function) else _in_one_step(given)
        _registry[name] = Policy(name, source, split, rules, frozenset(honours), search, summary)
        return function

    return register


def _in_one_step(make: Make) -> Search:
    """A policy without a search as one that reports once; it proves nothing."""

    @wraps(make)
    def search(problem: Problem, parameters: SolveParameters) -> Iterator[Progress]:
        yield Progress(make(problem, parameters), 0.0)

    return search


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
        close = difflib.get_close_matches(str(name), known, n=1)
        meant = f"did you mean {close[0]}? It " if close else ""
        raise ProblemError("policy", repr(name), f"{meant}must be one of {', '.join(known)}")
    return known[name]
