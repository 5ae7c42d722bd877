"""SGLang's expert balancing (`--enable-eplb`), planned by moeplan: entry point ``sglang.srt.plugins``.

``eplb_algorithms.rebalance_experts`` is replaced; it is asked on every rank with counts that all ranks have summed, and
does not tell the layout in force. With `--eplb-algorithm elasticity_aware` SGLang plans around ranks that are gone,
which it does not tell, so its own planner answers then. Source: SGLang 0.5.23, srt/eplb/eplb_algorithms and
srt/plugins/hook_registry.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime_client.integrations.serving_policy import chosen, plan_slots

__all__ = ["rebalance_experts", "register"]

Maps = tuple[Tensor, Tensor, Tensor]
TARGET = "sglang.srt.eplb.eplb_algorithms.rebalance_experts"


def register() -> None:
    """Put our planner in the place of SGLang's, if MOEPLAN_EPLB=1."""
    if not chosen():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, _instead, HookType.AROUND)


def _instead(theirs: Callable[..., Maps], *arguments: Any, **named: Any) -> Maps:
    """Our maps, but where ranks may be gone."""
    algorithm = named.get("algorithm", arguments[-1] if arguments else None)
    if "elasticity" in str(algorithm):
        return theirs(*arguments, **named)
    return rebalance_experts(*arguments, **named)


def rebalance_experts(
    tokens_per_expert: Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: object = None,
) -> Maps:
    """Physical to logical [layers, slots], logical to physical [layers, experts, most replicas], replicas per expert.

    Args:
        tokens_per_expert: [steps, layers, experts], or [layers, experts].
        num_physical_experts: Slots of all ranks.
        num_local_physical_experts: Slots of a rank.
        num_groups: Groups of experts; None for none.
        num_nodes: Nodes.
        algorithm: SGLang's choice among its own planners, which is not ours.
    """
    counts = tokens_per_expert.detach().cpu().round().to(torch.int64).numpy()
    loads = counts[None] if counts.ndim == 2 else counts
    slots = plan_slots(
        loads[loads.any(axis=(1, 2))] if loads.any() else loads[:1],
        num_physical_experts,
        num_physical_experts // num_local_physical_experts,
        groups=num_groups or 1,
        nodes=num_nodes,
    )
    layers, experts = loads.shape[1:]
    replicas = np.stack([np.bincount(row, minlength=experts) for row in slots])
    places = np.full((layers, experts, int(replicas.max())), -1, np.int64)
    for layer, row in enumerate(slots):
        for expert in range(experts):
            found = np.flatnonzero(row == expert)
            places[layer, expert, : len(found)] = found
    return torch.from_numpy(slots), torch.from_numpy(places), torch.from_numpy(replicas)
