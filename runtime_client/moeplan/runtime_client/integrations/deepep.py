"""DeepEP 2.5 and UltraEP: a spill plan as the table by which their buffers prefetch replicas, and back.

``EPBuffer.lb_prefetch_weights`` and ``lb_reduce_grads`` take ``redundancy_mapping``, int32[ranks of an NVLink domain,
slots]: the expert of every redundant slot, -1 where it is empty, the same on all ranks; the home of an expert is rank
``expert // (experts / ranks)``. As ``deep_ep_v25/buffers/ep.py`` of sgl-deep-ep-v25 0.1.0rc0 has it.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers import SpillOptions, SpillPlan
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import EMPTY, Layout

__all__ = ["layout_of", "physical_choices", "redundancy_mapping", "sent_by"]


def redundancy_mapping(plan: SpillPlan, options: SpillOptions) -> Int32:
    """The transient replicas of a plan, int32[ranks, slots], ascending on each rank, then -1.

    Args:
        plan: Of one micro-batch, on the ranks of one NVLink domain.
        options: What it was planned with: ``max(options.spare)`` is the number of slots.

    Raises:
        ProblemError: homes are not contiguous and of one size, or the ranks are several domains.
    """
    _require_contiguous(options.home, len(options.spare))
    if len(np.unique(options.domain)) > 1:
        raise ProblemError("spill.domain", options.domain.tolist(), "a mapping is of one NVLink domain; plan for each")
    mapping = np.full((len(options.spare), int(options.spare.max())), EMPTY, np.int32)
    for rank in range(len(mapping)):
        experts = np.sort(plan.expert[plan.device == rank])
        mapping[rank, : len(experts)] = experts
    return mapping


def layout_of(mapping: Int32, experts: int) -> Layout:
    """Homes and redundant slots of a mapping together, as a layout of ``experts / ranks + slots`` slots.

    Args:
        mapping: int32[ranks, slots], as of `redundancy_mapping`.
        experts: Number of experts.

    Raises:
        ProblemError: ranks do not divide the experts, a rank holds an expert twice or again beside its home, or an id
            is out of range.
    """
    ranks = len(mapping)
    if experts % ranks:
        raise ProblemError("mapping", f"{ranks} ranks", f"must divide the number of experts ({experts})")
    home = np.arange(experts, dtype=np.int32).reshape(ranks, -1)
    return Layout(np.concatenate([home, mapping], axis=1), experts)


def sent_by(rank: int, plan: SpillPlan, layout: Layout) -> Int64:
    """int64[ranks, width]: tokens that a rank sends to each slot, as the plan says.

    Args:
        rank: The rank that sends.
        plan: The plan.
        layout: As of `layout_of`, from the plan's mapping.
    """
    sent = np.zeros(layout.slots.shape, np.int64)
    owned = layout.experts // layout.devices
    sent[:, :owned] = plan.kept[rank].reshape(-1, owned)
    for expert, device, tokens in zip(plan.expert, plan.device, plan.sent[rank], strict=True):
        sent[device, owned + int(np.flatnonzero(layout.slots[device, owned:] == expert)[0])] = tokens
    return sent


def physical_choices(index: Int64, sent: Int64, layout: Layout) -> Int64:
    """The choices of a rank's tokens as physical experts: ``rank * width + slot`` of the replica that computes each.

    Args:
        index: int64[tokens, k], experts of this rank's tokens.
        sent: int64[ranks, width], this rank's tokens for each slot of the layout; see `sent_by`.
        layout: As of `layout_of`.

    Returns:
        int64[tokens, k]; of each expert the first tokens go to its first replica, in the order of ranks and slots.

    Raises:
        ProblemError: `sent` does not add up to the tokens of an expert.
    """
    slots = layout.slots.ravel()
    order = np.argsort(slots, kind="stable")
    order = order[slots[order] != EMPTY]
    flat = index.ravel()
    chosen, planned = np.bincount(flat, minlength=layout.experts), np.zeros(layout.experts, np.int64)
    np.add.at(planned, slots[order], sent.ravel()[order])
    if (chosen != planned).any():
        expert = int(np.flatnonzero(chosen != planned)[0])
        raise ProblemError("sent", f"{planned[expert]} tokens of expert {expert}", f"must be {chosen[expert]}")
    physical = np.empty_like(flat)
    physical[np.argsort(flat, kind="stable")] = np.repeat(order, sent.ravel()[order])
    return physical.reshape(index.shape)


def _require_contiguous(home: Int32, ranks: int) -> None:
    experts = len(home)
    if experts % ranks or (home != np.arange(experts) // (experts // ranks)).any():
        raise ProblemError(
            "spill.home",
            home.tolist(),
            f"must be expert // {max(1, experts // ranks)}: the transport has no other homes",
        )
