"""Route tensors of RL frameworks, as their sources make them: only what is replayed is counted."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.support.repository import ROOT

from moeplan.runtime_client.integrations import nemo_rl, slime, verl
from moeplan.solvers import KnownRoutes, SpillOptions, plan_known
from moeplan.solvers.problem.arrays import Int64

EXPERTS, LAYERS, K, LENGTHS = 8, 3, 2, (5, 9, 2, 7)
DENSE = 1
"""Dense layers before the MoE layers, where a framework counts them."""


def recorded() -> list[Int64]:
    """Routes of every token but the last of each sample, int64[tokens - 1, MoE layers, k], as engines return them."""
    rng = np.random.default_rng(5)
    return [rng.random((length - 1, LAYERS, EXPERTS)).argsort(axis=2)[..., :K] for length in LENGTHS]


def counted(routes: list[Int64]) -> Int64:
    """int64[samples, MoE layers, experts]."""
    counts = np.zeros((len(routes), LAYERS, EXPERTS), np.int64)
    for sample, found in zip(routes, counts, strict=True):
        np.add.at(found, (np.arange(LAYERS)[:, None], sample), 1)
    return counts


def test_slime_lists_every_decoder_layer() -> None:
    routes = recorded()
    dense = [torch.zeros(len(sample), DENSE, K, dtype=torch.int32) for sample in routes]
    given = [torch.cat([zeros, torch.from_numpy(sample).int()], 1) for zeros, sample in zip(dense, routes, strict=True)]
    assert np.array_equal(slime.sample_counts(given, EXPERTS, range(DENSE, DENSE + LAYERS)), counted(routes))


def padded_on_both_sides(routes: list[Int64], prompt: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """As verl pads: a prompt of two tokens ends, and the response begins, at `prompt`; what is not recorded is zero."""
    tokens = prompt + max(LENGTHS) - 2
    batch = torch.zeros(len(routes), tokens, LAYERS, K, dtype=torch.int16)
    mask = torch.zeros(len(routes), tokens, dtype=torch.long)
    for i, (sample, length) in enumerate(zip(routes, LENGTHS, strict=True)):
        batch[i, prompt - 2 : prompt - 2 + len(sample)] = torch.from_numpy(sample)
        mask[i, prompt - 2 : prompt - 2 + length] = 1
    return batch, mask


def test_verl_pads_on_both_sides_or_nests() -> None:
    routes = recorded()
    batch, mask = padded_on_both_sides(routes)
    assert np.array_equal(verl.sample_counts(batch, EXPERTS, mask), counted(routes))
    assert np.array_equal(verl.sample_counts(batch, EXPERTS, mask, [0, 2]), counted(routes)[:, [0, 2]])
    nested = torch.nested.as_nested_tensor([b[m.bool()] for b, m in zip(batch, mask, strict=True)], layout=torch.jagged)
    assert np.array_equal(verl.sample_counts(nested, EXPERTS), counted(routes))
    with pytest.raises(ValueError, match="attention_mask is missing"):
        verl.sample_counts(batch, EXPERTS)


def test_tokens_that_verl_did_not_run_are_not_tokens_of_the_first_expert() -> None:
    batch, mask = padded_on_both_sides(recorded())
    batch[1, 6:] = 0  # several turns: nothing is recorded after the last generation
    assert verl.sample_counts(batch, EXPERTS, mask)[1].sum() == (6 - 1) * LAYERS * K


def test_nemo_rl_replays_what_it_made_up_and_not_what_it_lacks() -> None:
    routes = recorded()
    batch = torch.zeros(len(routes), max(LENGTHS), LAYERS, K, dtype=torch.int8)
    for i, sample in enumerate(routes):
        batch[i, : len(sample)] = torch.from_numpy(sample)
        batch[i, len(sample)] = torch.arange(K)  # the last token's
    batch[1, 2] = -1
    wanted = counted([np.delete(sample, 2, axis=0) if i == 1 else sample for i, sample in enumerate(routes)])
    wanted[:, :, :K] += 1
    assert np.array_equal(nemo_rl.sample_counts(batch, EXPERTS, torch.tensor(LENGTHS)), wanted)


def test_a_batch_is_planned_and_reordered() -> None:
    batch, mask = padded_on_both_sides(recorded())
    routes = KnownRoutes.by_rank(verl.sample_counts(batch, EXPERTS, mask), ranks=2, size=1)
    plan = plan_known(routes, SpillOptions.uniform(EXPERTS, 2, 0), max_moves=0)
    reordered = batch[torch.as_tensor(plan.order)], mask[torch.as_tensor(plan.order)]
    again = KnownRoutes.by_rank(verl.sample_counts(reordered[0], EXPERTS, reordered[1]), ranks=2, size=1)
    untouched = plan_known(again, SpillOptions.uniform(EXPERTS, 2, 0), max_moves=0, reordered=False)
    assert untouched.before == plan.after <= plan.before


def test_the_example_shows_what_each_part_gains() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "examples/known_routes.py"], capture_output=True, text=True, check=True
    )
    alone, order, homes, both = (float(figure) for figure in re.findall(r" (1\.\d{4}) ", run.stdout))
    assert both < 1.02 < min(order, homes) < max(order, homes) < alone
