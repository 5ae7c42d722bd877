"""slime: routes that the rollout engine recorded, as counts that a step can be planned from.

With ``--use-rollout-routing-replay`` every sample has ``rollout_routed_experts``, int32[tokens - 1, layers, k], of all
decoder layers, dense ones included; the last token has no route. As slime 624b824 has it, in
``observability/rollout_data_utils.py`` and ``backends/megatron_utils/cp_utils.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moeplan.solvers import count_choices
from moeplan.solvers.problem.arrays import Int32

__all__ = ["sample_counts"]


def sample_counts(routed_experts: Sequence[npt.ArrayLike], experts: int, moe_layers: Sequence[int]) -> Int32:
    """int32[samples, MoE layers, experts], tokens of each sample that go to each expert.

    Args:
        routed_experts: ``train_data["rollout_routed_experts"]``: int[tokens - 1, layers, k] of each sample.
        experts: Experts of a layer.
        moe_layers: Numbers from 0 of the layers that are MoE layers.

    Raises:
        ProblemError: samples differ in layers or k, or an expert does not exist.
    """
    return count_choices([np.asarray(sample)[:, list(moe_layers)] for sample in routed_experts], experts)
