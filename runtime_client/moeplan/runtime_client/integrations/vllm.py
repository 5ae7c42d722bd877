"""vLLM's expert balancing (`--enable-eplb`), planned by moeplan: entry point ``vllm.general_plugins``.

``EPLB_POLICIES["default"]`` is replaced in every worker, which asks it with loads that all ranks have summed. vLLM
gives the layout in force, so moves can be limited. Source: vLLM 0.33, vllm/distributed/eplb/policy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeplan.runtime_client.integrations.serving_policy import chosen, plan_slots

__all__ = ["rebalance_experts", "register"]


def register() -> None:
    """Put our policy in the place of the default one, if MOEPLAN_EPLB=1."""
    if not chosen():
        return
    from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy

    class MoeplanPolicy(AbstractEplbPolicy):  # type: ignore[misc]
        """Plans under the even split, by work and not by time."""

        @classmethod
        def rebalance_experts(cls, *arguments: Any, **named: Any) -> Tensor:
            """See `rebalance_experts` of the module."""
            return rebalance_experts(*arguments, **named)

    EPLB_POLICIES["default"] = MoeplanPolicy


def rebalance_experts(
    weight: Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_ranks: int,
    old_global_expert_indices: Tensor | None = None,
) -> Tensor:
    """Expert of each physical slot, [layers, num_replicas], on the CPU; the arguments are vLLM's.

    Args:
        weight: [layers, experts] loads.
        num_replicas: Physical slots.
        num_groups: Groups of experts.
        num_nodes: Nodes.
        num_ranks: Ranks.
        old_global_expert_indices: [layers, num_replicas] in force.
    """
    old = old_global_expert_indices
    slots = plan_slots(
        weight.detach().cpu().round().to(torch.int64).numpy()[None],
        num_replicas,
        num_ranks,
        groups=num_groups,
        nodes=num_nodes,
        old=None if old is None else old.cpu().to(torch.int64).numpy(),
    )
    return torch.from_numpy(slots).to(torch.int64 if old is None else old.dtype)
