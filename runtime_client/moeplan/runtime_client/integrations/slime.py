"""slime: routes that the rollout engine recorded, as counts that a step can be planned from.

With ``--use-rollout-routing-replay`` every sample has ``rollout_routed_experts``, int32[tokens - 1, layers, k], of all
decoder layers, dense ones included; the last token has no route. As slime 624b824 has it, in
``observability/rollout_data_utils.py`` and ``backends/megatron_utils/cp_utils.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt
from torch import Tensor

from moeplan.runtime_client.integrations.route_tensors import count_samples, host_array
from moeplan.solvers import ProblemError
from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.scalars import short

__all__ = ["sample_counts"]


def sample_counts(routed_experts: Sequence[Tensor | npt.ArrayLike], experts: int, moe_layers: Sequence[int]) -> Int32:
    """int32[samples, MoE layers, experts], tokens of each sample that go to each expert.

    Args:
        routed_experts: ``train_data["rollout_routed_experts"]``: int[tokens - 1, layers, k] of each sample.
        experts: Experts of a layer.
        moe_layers: Numbers from 0 of the layers that are MoE layers.

    Raises:
        ProblemError: samples are no such arrays or differ in layers or k, a layer is not among theirs, or an expert
            does not exist.
    """
    if not isinstance(routed_experts, Sequence):
        raise ProblemError("routed_experts", short(routed_experts), "must be a list with the routes of each sample")
    if moe_layers is None:  # which count_samples takes for all
        raise ProblemError("moe_layers", None, "dense layers are recorded, too; give the numbers of the MoE layers")
    dimensions = ("tokens - 1", "layers", "k")
    samples = [host_array(f"routed_experts[{i}]", sample, dimensions) for i, sample in enumerate(routed_experts)]
    return count_samples(samples, experts, moe_layers)
