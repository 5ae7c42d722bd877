"""transformers: ``DistributedConfig(ep_implementation="moeplan")``, experts in the model's own sharding."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import AutoEP, EPImplementation, EPImplementationInterface

from moeplan.runtime_client.integrations.balancing import Balancer, Mode
from moeplan.runtime_client.integrations.versions import require_version
from moeplan.runtime_client.models.recognition import Recognised, recognise

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SUPPORTED", "balance"]

SUPPORTED = ("5.23", "5.24")
"""Releases that this was run with; 5.24 with `spill` only."""

NAME = "moeplan"


def balance(
    mode: Mode | str,
    *,
    spare: int = 2,
    planner: str = "127.0.0.1:7433",
    job: str = "training",
    trace: Path | str | None = None,
) -> Balancer:
    """Make ``ep_implementation="moeplan"`` stand for this; models loaded from now on use it.

        balance("spill", spare=2)
        config = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="moeplan")
        model = AutoModelForCausalLM.from_pretrained(name, distributed_config=config)

    The model's sharding, its checkpoints, optimizers and ``Trainer`` stay as they are. Call it once for each model.

    Args:
        mode: ``record``, ``spill`` or ``planned``.
        spare: See `Balancer`; so are the following.
        planner: Address of the daemon.
        job: Id of the job.
        trace: File for counts.

    Returns:
        What knows the counts and the imbalance of the model.

    Raises:
        UnsupportedVersionError: transformers is in another release.
        ValueError: `mode` is none of the three words.
    """
    require_version("transformers", SUPPORTED)
    balancer = Balancer(mode, spare=spare, planner=planner, job=job, trace=trace)
    EPImplementationInterface.register(NAME, partial(_BalancedEP, balancer))
    return balancer


class _BalancedEP(EPImplementation):
    """The experts of one module; `transformers` makes one for each."""

    def __init__(self, balancer: Balancer, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        title = f"experts of MoE layer {len(balancer.layers)} ({type(experts).__name__})"
        records = balancer.mode is Mode.RECORD
        if tp_mesh.size() > 1 and not records:
            raise ValueError(
                f"{title}: tp_size = {tp_mesh.size()}; with {balancer.mode} every rank has a batch of its own. Write "
                f"DistributedConfig(fsdp_size={ep_mesh.size()}, ep_size={ep_mesh.size()}, ...), or balance('record')"
            )
        known = None if records else recognise(title, _whole(experts))
        if known is not None and known != Recognised(known.shape, known.experts):
            raise ValueError(
                f"{title}: has experts that are the identity, or a norm of results, and transformers does not divide "
                "these among ranks; write replace_experts(model, ...) instead"
            )
        shape = known and known.shape
        self.module = experts
        self.names = [] if shape is None else list(shape.parts)
        count = int(cast(int, self.num_local_experts)) * ep_mesh.size()
        self.layer = balancer.layer(title, count, ep_mesh.get_group(), shape)
        self.own = AutoEP(experts, ep_mesh, tp_mesh) if records else None

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.layer.observe(top_k_index, self.module.training)
        if self.own is not None:
            output: Tensor = self.own(hidden_states, top_k_index, top_k_weights)
            return output
        weights = [self.module._parameters[name] for name in self.names]
        return self.layer.run([part for part in weights if part is not None], hidden_states, top_k_index, top_k_weights)


def _whole(experts: nn.Module) -> nn.Module:
    """The module as it was before expert parallelism, for what it computes."""
    twin: Any = copy.copy(experts)
    twin.num_experts = len(experts.get_parameter("down_proj"))
    twin._is_expert_parallel = False
    whole: nn.Module = twin
    return whole
