"""Megatron-core: a layer spec whose MoE layers dispatch through us, with Megatron's router, experts and checkpoints.

spec = balance(get_gpt_layer_with_transformer_engine_spec(num_experts=64, moe_grouped_gemm=True), "spill")
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moeplan.runtime_client.integrations.balancing import Balancer, Mode
from moeplan.runtime_client.integrations.versions import require_version
from moeplan.runtime_client.layers.feed_forward import ExpertShape, activation_name

__all__ = ["SUPPORTED", "BalancedMoELayer", "balance"]

SUPPORTED = ("0.16",)
"""Releases that this was run with."""


def balance(
    spec: Any,
    mode: Mode | str,
    *,
    spare: int = 2,
    planner: str = "127.0.0.1:7433",
    job: str = "training",
    trace: Path | str | None = None,
) -> Any:
    """A spec with `BalancedMoELayer` in the place of every ``MoELayer``; the one given stays as it is.

    Args:
        spec: A layer's ``ModuleSpec``, or ``TransformerBlockSubmodules`` of several.
        mode: ``record``, ``spill`` or ``planned``.
        spare: See `Balancer`; so are the following.
        planner: Address of the daemon.
        job: Id of the job.
        trace: File for counts.

    Raises:
        UnsupportedVersionError: megatron-core is in another release.
        ValueError: `mode` is none of the three words, or the spec has no ``MoELayer`` and is not of a pipeline's stage.
    """
    require_version("megatron-core", SUPPORTED)
    balancer = Balancer(mode, spare=spare, planner=planner, job=job, trace=trace)
    layers = spec.layer_specs if hasattr(spec, "layer_specs") else [spec]
    balanced = [_with_ours(layer, balancer) for layer in layers]
    if all(new is old for new, old in zip(balanced, layers, strict=True)):
        balancer.abandon()
        if hasattr(spec, "layer_specs") and _pipelined():  # a stage may have dense layers alone
            return spec
        raise ValueError(f"{type(spec).__name__}: none of its layers has the module MoELayer; give it num_experts")
    return replace(spec, layer_specs=balanced) if hasattr(spec, "layer_specs") else balanced[0]


def _pipelined() -> bool:
    ready: bool = parallel_state.model_parallel_is_initialized()
    return ready and parallel_state.get_pipeline_model_parallel_world_size() > 1


def _with_ours(layer: ModuleSpec, balancer: Balancer) -> ModuleSpec:
    mlp = layer.submodules.mlp
    if getattr(mlp, "module", None) is not MoELayer:
        return layer
    ours = replace(mlp, module=BalancedMoELayer, params=mlp.params | {"balancer": balancer})
    return replace(layer, submodules=replace(layer.submodules, mlp=ours))


class BalancedMoELayer(MoELayer):
    """An MoE layer whose tokens are counted, and, unless only recorded, dispatched by us.

    Router, auxiliary losses, expert bias, shared experts, parameters and ``sharded_state_dict`` are Megatron's own.

    Attributes:
        balancer: What knows the counts and the imbalance of all layers.

    Raises:
        ValueError: the configuration has something that our dispatch does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        *,
        balancer: Balancer,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection)
        self.balancer = balancer
        self._records = balancer.mode is Mode.RECORD
        title = f"MoE layer {layer_number}"
        if not self._records:
            _require_known(title, config, self.experts, self.attn_tp_group.size())
        shape = None if self._records else _shape(title, config)
        self._balanced = balancer.layer(title, config.num_moe_experts, self.ep_group, shape)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Any:
        """Choices instead of the permutation by expert; `routed_experts_compute` does all that follows."""
        chosen = routing_map.to(torch.uint8).topk(self.config.moe_router_topk, dim=-1).indices
        self._balanced.observe(chosen, self.training)
        if self._records:
            return super().preprocess(hidden_states, probs, routing_map)
        return hidden_states, (chosen, probs.gather(-1, chosen))

    def dispatch(self, hidden_states: Tensor, probs: Any) -> Any:
        return super().dispatch(hidden_states, probs) if self._records else (hidden_states, probs)

    def routed_experts_compute(self, hidden_states: Tensor, probs: Any) -> Any:
        if self._records:
            return super().routed_experts_compute(hidden_states, probs)
        return self._balanced.run(_weights(self.experts), hidden_states, *probs), None

    def combine(self, output: Tensor) -> Tensor:
        combined: Tensor = super().combine(output) if self._records else output
        return combined

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        if self._records:
            recorded: Tensor = super().postprocess(output, shared_expert_output)
            return recorded
        return output if shared_expert_output is None else output + shared_expert_output


def _weights(experts: Any) -> list[Tensor]:
    """[owned, ...], first and second matrices of this rank's experts."""
    if isinstance(experts, SequentialMLP):
        each = experts.local_experts
        return [
            torch.stack([expert.linear_fc1.weight for expert in each]),
            torch.stack([e.linear_fc2.weight for e in each]),
        ]
    numbers = range(experts.num_local_experts)
    return [
        torch.stack([getattr(linear, f"weight{number}") for number in numbers])
        for linear in (experts.linear_fc1, experts.linear_fc2)
    ]


def _require_known(title: str, config: TransformerConfig, experts: Any, tensor_parallel: int) -> None:
    unknown = {
        "experts as the legacy GroupedMLP": not isinstance(experts, SequentialMLP | TEGroupedMLP),
        "add_bias_linear": config.add_bias_linear,
        "expert_tensor_parallel_size above 1": (config.expert_tensor_parallel_size or 1) > 1,
        "tensor parallelism without sequence_parallel": tensor_parallel > 1 and not config.sequence_parallel,
        "fp8 or fp4": bool(config.fp8 or config.fp4),
        "moe_apply_probs_on_input": config.moe_apply_probs_on_input,
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
        "moe_latent_size": bool(config.moe_latent_size),
        "moe_shared_expert_overlap": config.moe_shared_expert_overlap,
        "cuda_graph_impl": config.cuda_graph_impl != "none",
    }
    found = [name for name, is_so in unknown.items() if is_so]
    if found:
        raise ValueError(f"{title}: {', '.join(found)}: not supported by spill and planned; leave it out, or record")


def _shape(title: str, config: TransformerConfig) -> ExpertShape:
    activation = activation_name(config.activation_func)
    if activation is None:
        raise ValueError(
            f"{title}: activation_func = {config.activation_func}: must be SiLU, GELU, ReLU or squared ReLU"
        )
    gated = bool(config.gated_linear_unit)
    make = partial(ExpertShape, config.hidden_size, config.moe_ffn_hidden_size, gated=gated, activation=activation)
    return make(limit=config.activation_func_clamp_value, shift=config.glu_linear_offset) if gated else make()
