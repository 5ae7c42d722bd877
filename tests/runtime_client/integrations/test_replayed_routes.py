"""Route tensors of RL frameworks, as their sources make them: only what is replayed is counted."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.support.repository import ROOT

from moeplan.runtime_client.integrations import nemo_rl, slime, verl
from moeplan.solvers import KnownRoutes, ProblemError, SpillOptions, plan_known
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


ROUTES = torch.zeros(2, 4, LAYERS, K, dtype=torch.int16)
"""Two samples of four tokens."""
MASK = torch.ones(2, 4, dtype=torch.long)
NESTED = torch.nested.as_nested_tensor(list(ROUTES), layout=torch.jagged)

WRONG = [
    pytest.param(lambda: slime.sample_counts([], EXPERTS, [1]), "routed_experts = no samples", id="no samples"),
    pytest.param(
        lambda: slime.sample_counts(ROUTES, EXPERTS, [1]),  # type: ignore[arg-type]
        "routed_experts = tensor.*must be a list with the routes of each sample",
        id="one tensor for a list",
    ),
    pytest.param(
        lambda: slime.sample_counts([ROUTES[0, 0]], EXPERTS, [1]),
        r"routed_experts\[0\] = array of shape \(3, 2\): must be whole numbers \[tokens - 1, layers, k\]",
        id="a dimension missing",
    ),
    pytest.param(
        lambda: slime.sample_counts([ROUTES[0], ROUTES[1, :, :2]], EXPERTS, [1]),
        r"routed_experts\[1\] = array of shape \(4, 2, 2\): must be \[tokens, 3, 2\] as the first",
        id="samples that differ",
    ),
    pytest.param(
        lambda: slime.sample_counts([ROUTES[0].bfloat16()], EXPERTS, [1]),
        r"routed_experts\[0\] = tensor of torch.bfloat16: must be whole numbers",
        id="scores",
    ),
    pytest.param(
        lambda: slime.sample_counts([ROUTES[0].numpy() + 0.5], EXPERTS, [1]),
        r"routed_experts\[0\] = array of float64: must be whole numbers",
        id="fractions",
    ),
    pytest.param(
        lambda: slime.sample_counts([None], EXPERTS, [1]),  # type: ignore[list-item]
        r"routed_experts\[0\] = None: must hold numbers",
        id="a sample without routes",
    ),
    pytest.param(
        lambda: slime.sample_counts([ROUTES[0]], EXPERTS, [LAYERS]),
        r"moe_layers\[0\] = 3: must be at most 2",
        id="a layer that is not there",
    ),
    pytest.param(
        lambda: slime.sample_counts([ROUTES[0]], EXPERTS, [1, 1]),
        r"moe_layers = \[1, 1\]: names a layer twice",
        id="a layer twice",
    ),
    pytest.param(
        lambda: slime.sample_counts([ROUTES[0]], EXPERTS, None),  # type: ignore[arg-type]
        "moe_layers = None: dense layers are recorded, too",
        id="no layers",
    ),
    pytest.param(
        lambda: slime.sample_counts([ROUTES[0] + EXPERTS], EXPERTS, [1]),
        r"routed_experts\[0\] = expert 8: must be at most 7",
        id="an expert beyond",
    ),
    pytest.param(
        lambda: slime.sample_counts([ROUTES[0] - 100], EXPERTS, [1]),
        r"routed_experts\[0\] = expert -100: must be at least -1.*a type that is too small",
        id="an expert below -1",
    ),
    pytest.param(
        lambda: slime.sample_counts([ROUTES[0]], 1, [1]),
        r"routed_experts\[0\] = array of shape \(4, 3, 2\): k is above experts \(1\)",
        id="more choices than experts",
    ),
    pytest.param(lambda: slime.sample_counts([ROUTES[0]], 0, [1]), "experts = 0: must be", id="no experts"),
    pytest.param(
        lambda: verl.sample_counts({"routed_experts": ROUTES}, EXPERTS),  # type: ignore[arg-type]
        r'routed_experts = .*: must be Tensor; write batch\["routed_experts"\]',
        id="the batch for its tensor",
    ),
    pytest.param(
        lambda: verl.sample_counts(ROUTES, EXPERTS),
        "attention_mask = None: a padded batch has zeros that are no routes",
        id="no mask",
    ),
    pytest.param(
        lambda: verl.sample_counts(ROUTES, EXPERTS, MASK[:, 1:]),
        r"attention_mask = array of shape \(2, 3\): must be \[2, 4\], samples and tokens of routed_experts",
        id="a mask of other tokens",
    ),
    pytest.param(
        lambda: verl.sample_counts(ROUTES, EXPERTS, MASK * 2), "attention_mask = 2 to 2: must be ones", id="no mask's"
    ),
    pytest.param(
        lambda: verl.sample_counts(ROUTES, EXPERTS, MASK.float()),
        "attention_mask = tensor of torch.float32: must be whole numbers",
        id="a mask of fractions",
    ),
    pytest.param(
        lambda: verl.sample_counts(ROUTES, EXPERTS, NESTED),
        r"attention_mask = nested tensor: must be whole numbers \[samples, tokens\]",
        id="a nested mask of a padded batch",
    ),
    pytest.param(
        lambda: verl.sample_counts(ROUTES.to("meta"), EXPERTS, MASK),
        "routed_experts = meta tensor",
        id="a tensor without values",
    ),
    pytest.param(
        lambda: verl.sample_counts(ROUTES.to_sparse(), EXPERTS, MASK),
        "routed_experts = sparse tensor",
        id="a sparse tensor",
    ),
    pytest.param(
        lambda: nemo_rl.sample_counts(ROUTES, EXPERTS, torch.tensor([4, 5])),
        r"input_lengths\[1\] = 5: must be at most 4",
        id="a length beyond the tokens",
    ),
    pytest.param(
        lambda: nemo_rl.sample_counts(ROUTES, EXPERTS, torch.tensor([4])),
        r"input_lengths = 1 values: must have one per sample \(2\)",
        id="lengths of fewer samples",
    ),
    pytest.param(
        lambda: nemo_rl.sample_counts(NESTED, EXPERTS, torch.tensor([4, 4])),
        r"routed_experts = nested tensor: must be whole numbers \[samples, tokens, layers, k\]",
        id="a nested batch",
    ),
]


@pytest.mark.parametrize(("read", "answer"), WRONG)
def test_what_is_no_record_of_routes_is_answered_by_one_line(read: Callable[[], object], answer: str) -> None:
    with pytest.raises(ProblemError, match=answer) as caught:
        read()
    assert "\n" not in str(caught.value)


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
