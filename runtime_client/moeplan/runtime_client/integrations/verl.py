"""verl: routes that the rollout engine recorded, as counts that a step can be planned from.

With ``router_replay.mode=R3`` a batch has ``routed_experts``, int16[samples, tokens, layers, k], beside
``attention_mask``: prompts padded on the left, responses on the right. Tokens that the engine did not run, the last of
a sample and those after the last generation of several turns, are zeros. Batches without padding are nested tensors.
As verl 1dda039 has it, in ``experimental/agent_loop/agent_loop.py`` and ``trainer/ppo/metric_utils.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moeplan.runtime_client.integrations.route_tensors import count_samples, host_array
from moeplan.solvers import ProblemError
from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.scalars import instance

__all__ = ["sample_counts"]


def sample_counts(
    routed_experts: Tensor, experts: int, attention_mask: Tensor | None = None, moe_layers: Sequence[int] | None = None
) -> Int32:
    """int32[samples, MoE layers, experts], tokens of each sample that go to each expert.

    The last token of a sample is not counted. Nor are other tokens without a route, where k is above 1; where it is 1
    they cannot be told from tokens of the first expert.

    Args:
        routed_experts: ``batch["routed_experts"]``, padded or nested.
        experts: Experts of a layer.
        attention_mask: bool[samples, tokens], or ones and zeros, of a padded batch; a nested one needs none.
        moe_layers: Numbers from 0 of those of its layers that are MoE layers; None for all.

    Raises:
        ProblemError: a padded batch has no mask, a tensor has another shape or type, a layer is not among those
            recorded, or an expert does not exist.
    """
    instance("routed_experts", routed_experts, Tensor, 'batch["routed_experts"]')
    if routed_experts.is_nested:
        dimensions = ("tokens", "layers", "k")
        nested = enumerate(routed_experts.unbind())
        samples = [host_array(f"routed_experts[{i}]", sample, dimensions) for i, sample in nested]
    elif attention_mask is None:
        raise ProblemError("attention_mask", None, "a padded batch has zeros that are no routes; give the batch's own")
    else:
        routes = host_array("routed_experts", routed_experts, ("samples", "tokens", "layers", "k"))
        mask = host_array("attention_mask", attention_mask, ("samples", "tokens"))
        if mask.shape != routes.shape[:2]:
            wanted = f"must be {list(routes.shape[:2])}, samples and tokens of routed_experts"
            raise ProblemError("attention_mask", f"array of shape {mask.shape}", wanted)
        if mask.min(initial=0) < 0 or mask.max(initial=0) > 1:
            raise ProblemError("attention_mask", f"{mask.min()} to {mask.max()}", "must be ones and zeros")
        samples = [sample[kept] for sample, kept in zip(routes, mask.astype(bool), strict=True)]
    return count_samples([sample[:-1] for sample in samples], experts, moe_layers)
