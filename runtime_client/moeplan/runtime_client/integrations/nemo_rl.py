"""NeMo-RL: routes that the rollout engine recorded, as counts that a step can be planned from.

With ``policy.router_replay.enabled=true`` a batch has ``routed_experts``, int8 to int32[samples, tokens, layers, k],
padded on the right, beside ``input_lengths``. Layers are the MoE layers, or all decoder layers. A token whose route is
not known is -1 and routed anew; tokens of tools and the last one of a sample have a route made up, experts 0 to k - 1,
which is replayed like any other. As NeMo-RL 7ea279a has it, in ``models/megatron/router_replay.py`` and
``models/generation/vllm/utils.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moeplan.runtime_client.integrations.route_tensors import count_samples, host_array
from moeplan.solvers import ProblemError
from moeplan.solvers.problem.arrays import Int32, integers

__all__ = ["sample_counts"]


def sample_counts(
    routed_experts: Tensor, experts: int, input_lengths: Tensor, moe_layers: Sequence[int] | None = None
) -> Int32:
    """int32[samples, MoE layers, experts], tokens of each sample that go to each expert as they are replayed.

    Args:
        routed_experts: ``train_data["routed_experts"]``.
        experts: Experts of a layer.
        input_lengths: int[samples], ``train_data["input_lengths"]``.
        moe_layers: Numbers from 0 of those of its layers that are MoE layers; None for all.

    Raises:
        ProblemError: a tensor has another shape or type, a length is not within the tokens, a layer is not among those
            recorded, or an expert does not exist.
    """
    routes = host_array("routed_experts", routed_experts, ("samples", "tokens", "layers", "k"))
    given = host_array("input_lengths", input_lengths, ("samples",))
    lengths = integers("input_lengths", given, ndim=1, low=0, high=routes.shape[1])
    if len(lengths) != len(routes):
        raise ProblemError("input_lengths", f"{len(lengths)} values", f"must have one per sample ({len(routes)})")
    samples = [sample[:length] for sample, length in zip(routes, lengths, strict=True)]
    return count_samples(samples, experts, moe_layers)
