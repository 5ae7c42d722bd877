"""Limits on where replicas may be, beyond slots and memory."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np

from moeplan.solvers.problem.arrays import Int32, any_array, integers
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.scalars import integer

__all__ = ["Constraints"]


def _no_pairs() -> Int32:
    return np.empty((0, 2), np.int32)


@dataclass(frozen=True, eq=False)
class Constraints:
    """Hard limits on a layout; every one is off by default.

    Attributes:
        forbidden: int32[pairs, 2], (expert, device) pairs that no layout may use.
        pinned: int32[pairs, 2], (expert, device) pairs that every layout must use.
        domain: int32[devices], link domain of each device: all replicas of an expert stay within one domain. None for
            no such limit.
        groups_on_node: Whether all replicas of all experts of a group (`Problem.groups`) stay on one node, so that
            group-limited routing sends a token to few nodes.
        min_tokens: Mean load that every replica should have: an expert gets at most its mean load over this many
            replicas, and always one, because small batches waste a device. 0 for no such limit.
        device_move_bytes: Most bytes of weights that one device receives in a re-plan; None for no limit.
        node_move_bytes: Most bytes of weights that one node receives from other nodes in a re-plan: arrivals of
            experts that none of its devices holds now. None for no limit.

    Raises:
        ProblemError: a field is out of range.
    """

    forbidden: Int32 = field(default_factory=_no_pairs)
    pinned: Int32 = field(default_factory=_no_pairs)
    domain: Int32 | None = None
    groups_on_node: bool = False
    min_tokens: int = 0
    device_move_bytes: int | None = None
    node_move_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("forbidden", "pinned"):
            pairs = any_array(f"constraints.{name}", getattr(self, name))
            pairs = _no_pairs() if pairs.size == 0 else integers(f"constraints.{name}", pairs, ndim=2, dtype=np.int32)
            if pairs.shape[1] != 2:
                raise ProblemError(
                    f"constraints.{name}", f"array of shape {pairs.shape}", "must hold (expert, device) pairs"
                )
            object.__setattr__(self, name, pairs)
        if self.domain is not None:
            domain = integers("constraints.domain", self.domain, ndim=1, dtype=np.int32, low=0)
            object.__setattr__(self, "domain", domain)
        for name in ("min_tokens", "device_move_bytes", "node_move_bytes"):
            value = getattr(self, name)
            if value is not None or name == "min_tokens":
                object.__setattr__(self, name, integer(f"constraints.{name}", value, 0, 2**53))
        if not isinstance(self.groups_on_node, bool | np.bool_):
            raise ProblemError("constraints.groups_on_node", repr(self.groups_on_node), "must be True or False")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The limits that are set."""
        off: list[object] = [None, False, 0]
        return tuple(
            limit.name
            for limit in fields(self)
            if (len(value) > 0 if isinstance(value := getattr(self, limit.name), np.ndarray) else value not in off)
            or (limit.name.endswith("_bytes") and value is not None)
        )
