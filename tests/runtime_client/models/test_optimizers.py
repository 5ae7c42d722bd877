"""Optimizers that are given experts later than others, or that would spread their states over ranks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.support.expert_groups import make_group, make_ours
from tests.support.fused_model import fused_model, words_of
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.models.gradients import ExpertGradients, expert_parameters
from moeplan.runtime_client.models.replacing import replace_experts

Launch = Callable[..., list[Any]]
KINDS = ["sharded", "resident"]


def test_experts_that_an_optimizer_is_given_later_are_looked_at_too() -> None:
    """As where they are frozen at first."""
    model = fused_model()
    (layer, *_) = replace_experts(model, partial(ResidentExperts, group=ExpertGroup())).values()
    for wrong in (False, True):
        kind = torch.optim.Adafactor if wrong else torch.optim.SGD
        optimizer: torch.optim.Optimizer = kind([model.get_parameter("head.weight")], lr=0.1)
        model(words_of(0, 0, 1)).backward()
        optimizer.step()
        optimizer.add_param_group({"params": list(expert_parameters(model).values())})
        with pytest.raises(RuntimeError, match="AdamW or SGD") if wrong else contextlib.nullcontext():
            optimizer.step()
    assert layer.steps == 1


class GaLoreAdamW(torch.optim.SGD):
    """Called as one that projects the gradients of a matrix."""


class StableAdamW(torch.optim.SGD):
    """Called as one that clips by a norm of each tensor."""


@pytest.mark.parametrize("kind", [GaLoreAdamW, StableAdamW])
def test_optimizers_that_treat_a_matrix_as_a_whole_are_known_by_name(kind: type[torch.optim.SGD]) -> None:
    model = fused_model()
    replace_experts(model, partial(ResidentExperts, group=ExpertGroup()))
    model(words_of(0, 0, 1)).backward()
    with pytest.raises(RuntimeError, match=f"{kind.__name__}: takes the weights of"):
        kind(model.parameters(), lr=0.1).step()


def spread_states(kind: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, as it is imported
        from torch.distributed.optim import ZeroRedundancyOptimizer

    group = make_group()
    model = make_ours(kind, group)
    ExpertGradients(model)
    wrapped = DistributedDataParallel(model)
    experts = set(expert_parameters(model).values())
    others = [parameter for parameter in model.parameters() if parameter not in experts]
    wrapped(words_of(0, group.rank, group.size)).backward()
    ZeroRedundancyOptimizer(others, torch.optim.AdamW, lr=0.01).step()
    with pytest.raises(RuntimeError) as refused:
        ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, lr=0.01).step()
    wrapped(words_of(1, group.rank, group.size))
    return str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_experts_are_not_spread_over_other_ranks(ranks: Launch, kind: str) -> None:
    for told in ranks(3, spread_states, kind):
        assert "would have one rank train blocks.0.experts" in told
        assert "ZeroRedundancyOptimizer([p for p in model.parameters() if p not in experts], ...)" in told
