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
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moeplan.runtime_client.integrations.balancing import Balancer, Mode
from moeplan.runtime_client.integrations.framework_experts import FrameworkShards
from moeplan.runtime_client.integrations.versions import require_version
from moeplan.runtime_client.layers.feed_forward import ExpertShape, activation_name, join_weights, split_weights

__all__ = ["SUPPORTED", "BalancedMoELayer", "ShardedExperts", "balance"]

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
    kind: str = "resident",
) -> Any:
    """A spec with `BalancedMoELayer` in the place of every ``MoELayer``; the one given stays as it is.

    Args:
        spec: A layer's ``ModuleSpec``, or ``TransformerBlockSubmodules`` of several.
        mode: ``record``, ``spill`` or ``planned``.
        spare: See `Balancer`; so are the following.
        planner: Address of the daemon.
        job: Id of the job.
        trace: File for counts.
        kind: ``resident``, where weights stay at home and are lent, or ``sharded``, where every expert-parallel rank
            owns an equal part of each expert and gathers those that it computes; to ``record``, both are Megatron's.

    Raises:
        UnsupportedVersionError: megatron-core is in another release.
        ValueError: `mode` is none of the three words, `kind` neither of the two, experts are of the legacy
            ``GroupedMLP`` (unless only recorded), or the spec has no ``MoELayer`` and is not of a pipeline's stage.
    """
    require_version("megatron-core", SUPPORTED)
    if kind not in ("resident", "sharded"):
        raise ValueError(f"kind = {kind!r}: must be resident or sharded")
    balancer = Balancer(mode, spare=spare, planner=planner, job=job, trace=trace)
    layers = spec.layer_specs if hasattr(spec, "layer_specs") else [spec]
    balanced = [_with_ours(layer, balancer, kind) for layer in layers]
    if all(new is old for new, old in zip(balanced, layers, strict=True)):
        balancer.abandon()
        if hasattr(spec, "layer_specs") and _pipelined():  # a stage may have dense layers alone
            return spec
        raise ValueError(f"{type(spec).__name__}: none of its layers has the module MoELayer; give it num_experts")
    return replace(spec, layer_specs=balanced) if hasattr(spec, "layer_specs") else balanced[0]


def _pipelined() -> bool:
    ready: bool = parallel_state.model_parallel_is_initialized()
    return ready and parallel_state.get_pipeline_model_parallel_world_size() > 1


def _with_ours(layer: ModuleSpec, balancer: Balancer, kind: str) -> ModuleSpec:
    mlp = layer.submodules.mlp
    if getattr(mlp, "module", None) is not MoELayer:
        return layer
    if balancer.mode is not Mode.RECORD and getattr(mlp.submodules.experts, "module", None) is GroupedMLP:
        balancer.abandon()
        raise ValueError(
            "moe_grouped_gemm = True: with the local spec it names the legacy GroupedMLP, whose weights are all in "
            "one; write get_gpt_layer_with_transformer_engine_spec(...), or leave it out: products are grouped by us"
        )
    ours = replace(mlp, module=BalancedMoELayer, params=mlp.params | {"balancer": balancer, "kind": kind})
    return replace(layer, submodules=replace(layer.submodules, mlp=ours))


class BalancedMoELayer(MoELayer):
    """An MoE layer whose tokens are counted, and, unless only recorded, dispatched by us.

    Router, auxiliary losses, expert bias, shared experts, parameters and ``sharded_state_dict`` are Megatron's own; but
    for experts that are sharded, which are parameters of another shape, and in checkpoints Megatron's all the same.

    Attributes:
        balancer: What knows the counts and the imbalance of all layers.

    Raises:
        ValueError: the configuration has something that our dispatch does not do.
    """

    experts: Any

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        *,
        balancer: Balancer,
        kind: str = "resident",
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection)
        self.balancer = balancer
        self._records = balancer.mode is Mode.RECORD
        title, shape, shard = _title(layer_number), None, None
        if not self._records:
            _require_known(title, config, self.experts, self.attn_tp_group.size())
            shape = _shape(title, config)
        if shape is not None and kind == "sharded":
            shard = join_weights(*_weights(self.experts)).detach()
        self._balanced = balancer.layer(title, config.num_moe_experts, self.ep_group, shape, shard)
        if isinstance(self._balanced.experts, FrameworkShards):
            self.experts = ShardedExperts(self._balanced.experts, self.experts)

    def set_layer_number(self, layer_number: int) -> None:
        """Take the number, which Megatron tells once the layer is made, into the layer's name in errors."""
        super().set_layer_number(layer_number)
        if self._balanced.experts is not None:
            self._balanced.experts.name = _title(layer_number)

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
        if isinstance(self.experts, ShardedExperts):
            return self.experts(hidden_states, *probs), None
        _wait_for_weights(self.experts)
        return self._balanced.run(_weights(self.experts), hidden_states, *probs), None

    def combine(self, output: Tensor) -> Tensor:
        combined: Tensor = super().combine(output) if self._records else output
        return combined

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        if self._records:
            recorded: Tensor = super().postprocess(output, shared_expert_output)
            return recorded
        return output if shared_expert_output is None else output + shared_expert_output


class ShardedExperts(nn.Module):
    """The experts of one layer as `FrameworkShards`, in checkpoints under Megatron's names and in its form.

    To save or load, the ranks bring the experts of a layer home, which takes the memory of one more copy.

    Args:
        shards: The experts.
        own: Megatron's own experts, whose weights they are made of; their memory is given up.
    """

    def __init__(self, shards: FrameworkShards, own: Any) -> None:
        super().__init__()
        self.shards = shards
        for name in ("allreduce", "tensor_model_parallel"):  # by which Megatron reduces gradients and adds up norms
            setattr(shards.shard, name, getattr(own.get_parameter(_names(own)[0][0]), name))
        self._own = [own.to("meta")]  # in a list, as it is no part of the model any more
        self.register_load_state_dict_post_hook(_without_extra_states)  # type: ignore[no-untyped-call]

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = self.shards(hidden, index, weight)
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A factory of what Megatron's own experts save, for the shard and for an optimizer's states of it."""
        (own,), names = self._own, _names(self._own[0])
        key = f"{prefix}experts"

        def states(flat: Tensor) -> dict[str, Any]:
            parts = zip(names, split_weights(self.shards.shape, flat), strict=True)
            own.load_state_dict(
                {name: weight for each, part in parts for name, weight in zip(each, part, strict=True)},
                strict=False,
                assign=True,
            )
            made: dict[str, Any] = own.sharded_state_dict(prefix, sharded_offsets, metadata)
            own.to("meta")
            return made

        factories: dict[str, ShardedTensorFactory] = {}

        def build(named: str, shard: Tensor, _: Any, flattened: slice | None) -> dict[str, Any]:
            if flattened is not None:
                raise ValueError(
                    f"{prefix}: its optimizer's state is cut up, and sharded experts are saved whole; write "
                    "dp_reshardable or fully_reshardable for the distributed optimizer's format"
                )
            made = {}
            for name, state in states(self.shards.homes_of(shard)).items():
                if isinstance(state, ShardedObject):
                    continue
                state.key = named + state.key.removeprefix(key)
                if isinstance(state, ShardedTensorFactory):
                    factories[name] = state
                    state = state.build()
                made[name] = state
            return made

        def merge(loaded: dict[str, Any]) -> Tensor:
            whole = {
                name: factories[name].merge_fn(state) if name in factories else state for name, state in loaded.items()
            }
            return self.shards.shards_of(
                join_weights(*(torch.stack([whole[prefix + name] for name in each]) for each in names))
            )

        empty = own.sharded_state_dict(prefix, sharded_offsets, metadata)
        kept = {name: state for name, state in empty.items() if isinstance(state, ShardedObject)}
        return kept | {f"{prefix}shards.shard": ShardedTensorFactory(key, self.shards.shard, build, merge)}


def _without_extra_states(_: nn.Module, keys: Any) -> None:
    """Those of Transformer Engine's modules, which are saved for the likes of them, are of none here."""
    keys.unexpected_keys[:] = [key for key in keys.unexpected_keys if not key.endswith("_extra_state")]


def _names(experts: Any) -> list[list[str]]:
    """Names of the first and of the second matrices of this rank's experts."""
    form = "local_experts.{number}.{matrix}.weight" if isinstance(experts, SequentialMLP) else "{matrix}.weight{number}"
    numbers = range(experts.num_local_experts)
    return [[form.format(matrix=matrix, number=n) for n in numbers] for matrix in ("linear_fc1", "linear_fc2")]


def _weights(experts: Any) -> list[Tensor]:
    """[owned, ...], first and second matrices of this rank's experts."""
    return [torch.stack([experts.get_parameter(name) for name in each]) for each in _names(experts)]


def _wait_for_weights(experts: Any) -> None:
    """Run the hooks of the modules that hold weights, as they are not called: Megatron's DDP waits there for them."""
    for name in sorted({name.rpartition(".")[0] for each in _names(experts) for name in each}):
        module = experts.get_submodule(name)
        for hook in module._forward_pre_hooks.values():
            hook(module, ())


def _title(layer_number: int | None) -> str:
    return "an MoE layer" if layer_number is None else f"MoE layer {layer_number}"


def _require_known(title: str, config: TransformerConfig, experts: Any, tensor_parallel: int) -> None:
    unknown = {
        f"experts as {type(experts).__name__}": not isinstance(experts, SequentialMLP | TEGroupedMLP),
        "add_bias_linear": config.add_bias_linear,
        "expert_tensor_parallel_size above 1": (config.expert_tensor_parallel_size or 1) > 1,
        "tensor parallelism without sequence_parallel": tensor_parallel > 1 and not config.sequence_parallel,
        "fp8 or fp4": bool(config.fp8 or config.fp4),
        "moe_apply_probs_on_input": config.moe_apply_probs_on_input,
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
        "moe_latent_size": bool(config.moe_latent_size),
        "moe_shared_expert_overlap": config.moe_shared_expert_overlap,
        "overlap_moe_expert_parallel_comm": config.overlap_moe_expert_parallel_comm,
        "delay_wgrad_compute": config.delay_wgrad_compute,
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
