"""torchtitan: overrides, named on the command line, that put our dispatch in the place of ``RoutedExperts``'s.

    --override.imports 'moeplan.runtime_client.integrations.torchtitan.spill={"spare": 2}'

Parameters stay those of torchtitan's ``GroupedExperts``, under their names and in their sharding, so initialisation,
parallel plans, optimizers and checkpoints are as without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts

from moeplan.runtime_client.integrations.balancing import Balancer, Mode
from moeplan.runtime_client.integrations.versions import require_version
from moeplan.runtime_client.layers.feed_forward import ExpertShape

__all__ = ["SUPPORTED", "BalancedRoutedExperts", "balancer", "planned", "record", "spill"]

SUPPORTED = ("0.3",)
"""Releases that this was run with."""

require_version("torchtitan", SUPPORTED)


@cache
def balancer(mode: Mode, spare: int, planner: str, job: str, trace: str | None) -> Balancer:
    """The one of this process, for the layers of its model."""
    return Balancer(mode, spare=spare, planner=planner, job=job, trace=trace)


class BalancedRoutedExperts(RoutedExperts):
    """Routed experts whose tokens are counted, and, unless only recorded, dispatched by us.

    Attributes:
        balancer: What knows the counts and the imbalance of all layers.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        """With what `Balancer` needs."""

        mode: str = Mode.SPILL
        spare: int = 2
        planner: str = ""
        job: str = ""
        trace: str | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        experts = config.inner_experts
        self._shape = ExpertShape(experts.dim, experts.hidden_dim)
        self.balancer = balancer(Mode(config.mode), config.spare, config.planner, config.job, config.trace)
        self._layer: Any = None

    def parallelize(self, parallel_dims: Any) -> None:
        super().parallelize(parallel_dims)
        mesh = parallel_dims.get_optional_mesh("ep")
        if mesh is not None:
            name = f"MoE layer {len(self.balancer.layers)}"
            self._layer = self.balancer.layer(name, self.inner_experts.num_experts, mesh.get_group(), self._shape)

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """As ``RoutedExperts.forward``, whose sharding knows its parameters by these names."""
        if self._layer is not None:
            self._layer.observe(topk_expert_ids_BLK, self.training)
        if self._layer is None or self.balancer.mode is Mode.RECORD:
            return super().forward(x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E)
        inner = self.inner_experts
        gate, up, down = (_local(part).bfloat16() for part in (inner.w1_EFD, inner.w3_EFD, inner.w2_EDF))
        output: Tensor = self._layer.run([gate, up, down], x_BLD, topk_expert_ids_BLK, topk_scores_BLK)
        return output


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _balanced(config: RoutedExperts.Config, mode: Mode, **options: Any) -> BalancedRoutedExperts.Config:
    if type(config.inner_experts) is not GroupedExperts.Config and mode is not Mode.RECORD:
        raise ValueError(
            f"{type(config.inner_experts).__qualname__}: computes experts in another form than GroupedExperts, which "
            f"{mode} takes over; leave its override out, or name moeplan's record"
        )
    return derive(config, BalancedRoutedExperts.Config, mode=mode, **options)


@override(target=RoutedExperts.Config, exact=True, description="moeplan: count the tokens of every expert")
def record(config: RoutedExperts.Config, *, trace: str | None = None) -> BalancedRoutedExperts.Config:
    """Count tokens; nothing else changes. `trace` is a file for the counts."""
    return _balanced(config, Mode.RECORD, trace=trace)


@override(target=RoutedExperts.Config, exact=True, description="moeplan: lend replicas for single micro-batches")
def spill(config: RoutedExperts.Config, *, spare: int = 2, trace: str | None = None) -> BalancedRoutedExperts.Config:
    """Balance every micro-batch with up to `spare` transient replicas on each rank."""
    return _balanced(config, Mode.SPILL, spare=spare, trace=trace)


@override(target=RoutedExperts.Config, exact=True, description="moeplan: hold the replicas of planned layouts")
def planned(
    config: RoutedExperts.Config,
    *,
    spare: int = 2,
    planner: str = "127.0.0.1:7433",
    job: str = "training",
    trace: str | None = None,
) -> BalancedRoutedExperts.Config:
    """Hold the replicas that the layouts of the daemon at `planner` say."""
    return _balanced(config, Mode.PLANNED, spare=spare, planner=planner, job=job, trace=trace)
