"""verl: routes that the rollout engine recorded, as counts that a step can be planned from.

With ``router_replay.mode=R3`` a batch has ``routed_experts``, int16[samples, tokens, layers, k], beside
``attention_mask``: prompts padded on the left, responses on the right. Tokens that the engine did not run, the last of
a sample and those after the last generation of several turns, are zeros. Batches without padding are nested tensors.
As verl 1dda039 has it, in ``experimental/agent_loop/agent_loop.py`` and ``trainer/ppo/metric_utils.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from moeplan.solvers import count_choices
from moeplan.solvers.problem.arrays import Int32

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
        attention_mask: bool or int[samples, tokens], of a padded batch.
        moe_layers: Numbers from 0 of those of its layers that are MoE layers; None for all.

    Raises:
        ValueError: a padded batch has no mask.
        ProblemError: an expert does not exist.
    """
    if routed_experts.is_nested:
        samples = [sample.cpu().numpy() for sample in routed_experts.unbind()]
    elif attention_mask is None:
        raise ValueError("attention_mask is missing: a padded batch has zeros that are no routes; give the batch's own")
    else:
        routes, masks = routed_experts.cpu().numpy(), attention_mask.cpu().numpy().astype(bool)
        samples = [sample[mask] for sample, mask in zip(routes, masks, strict=True)]
    kept = slice(None) if moe_layers is None else np.asarray(moe_layers)
    return count_choices([sample[:-1, kept] for sample in samples], experts)
