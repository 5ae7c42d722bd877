"""Groups of ranks, and models with their experts replaced, as tests of several ranks make them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from tests.support.fused_model import EXPERTS, FusedModel, fused_model

from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.expert_layer import ExpertLayer
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts
from moeplan.runtime_client.models.replacing import replace_experts
from moeplan.solvers import QuotaPlanner, SpillOptions


def make_group(size: int | None = None, *, timeout: timedelta = timedelta(seconds=30)) -> ExpertGroup:
    """This rank's group of so many consecutive ranks; of all by default."""
    world = dist.get_world_size()
    size = size or world
    groups = [list(range(first, first + size)) for first in range(0, world, size)]
    created = [ExpertGroup.create(members, timeout=timeout) for members in groups]
    (mine,) = [group for group in created if group is not None]
    return mine


def make_ours(kind: str, group: ExpertGroup, model: FusedModel | None = None) -> FusedModel:
    """The model (a new one by default) with its experts replaced by sharded or resident ones."""
    model = model or fused_model()
    if kind == "sharded":
        replace_experts(model, partial(FullyShardedExperts, group=group))
    else:
        planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, 2), group.size)
        replace_experts(model, partial(ResidentExperts, group=group, planner=planner))
    return model


def load_alike(layers: Sequence[ExpertLayer]) -> None:
    """The same experts for layers of the same number."""
    for number, layer in enumerate(layers):
        random = torch.Generator().manual_seed(number)
        flat = torch.randn(layer.experts, layer.shape.elements, generator=random, dtype=torch.float64)
        layer.load_experts(0, flat / 4)
