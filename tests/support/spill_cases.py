"""Counts and checks that the spill tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moeplan.solvers import SpillOptions, SpillPlan

Counts = npt.NDArray[Any]


def skewed(seed: int, sources: int, experts: int, tokens: int, skew: float = 1.0) -> Counts:
    """int64[sources, experts]: `tokens` per source, popularity 1 / rank**skew in random order."""
    rng = np.random.default_rng(seed)
    popularity = rng.permutation(np.arange(1, experts + 1) ** -skew)
    return rng.multinomial(tokens, popularity / popularity.sum(), size=sources)


def check(plan: SpillPlan, counts: Counts, options: SpillOptions, *, slots: bool = True) -> None:
    """Assert everything that holds for each plan, whatever its quality."""
    experts, devices = options.experts, options.devices
    tokens = counts.sum(axis=0)
    placed = plan.home_quota.copy()
    np.add.at(placed, plan.expert, plan.quota)
    np.testing.assert_array_equal(placed, tokens)
    assert (plan.home_quota >= 0).all()

    pairs = list(zip(plan.expert.tolist(), plan.device.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert (plan.device != options.home[plan.expert]).all()
    assert (plan.sent >= 0).all()
    assert (plan.kept >= 0).all()
    np.testing.assert_array_equal(plan.sent.sum(axis=0), plan.quota)
    np.testing.assert_array_equal(plan.kept.sum(axis=0), plan.home_quota)
    by_expert = plan.kept.T.astype(np.int64)
    np.add.at(by_expert, plan.expert, plan.sent.T)
    np.testing.assert_array_equal(by_expert.T, counts)

    load = np.zeros(devices, np.int64)
    np.add.at(load, options.home, plan.home_quota)
    np.add.at(load, plan.device, plan.quota)
    np.testing.assert_array_equal(load, plan.load)
    if not slots:
        return

    received = np.bincount(plan.device, minlength=devices)
    assert (received <= options.spare).all()
    assert (plan.quota >= options.min_tokens).all()
    assert (options.domain[plan.device] == options.domain[options.home[plan.expert]]).all()
    tile = options.tile_rows
    at_home = tile * np.bincount(options.home, weights=-(-tokens // tile), minlength=devices).astype(np.int64)
    rows = tile * np.bincount(options.home, weights=-(-plan.home_quota // tile), minlength=devices).astype(np.int64)
    np.add.at(rows, plan.device, tile * -(-plan.quota // tile))
    assert rows.sum() == at_home.sum()
    memory, cap = tile * -(-options.replica_tokens // tile), options.token_cap - options.token_cap % tile
    np.testing.assert_array_equal(np.maximum(rows + memory * received - cap, 0), plan.shortfall)
    time = rows / options.speed + options.transfer_tokens * received
    assert plan.makespan == (max(time) if tile == 1 else pytest.approx(max(time)))
    if not plan.shortfall.any():
        assert plan.bound <= plan.makespan * (1 + 1e-12)
    if not np.maximum(at_home - options.token_cap, 0).any():
        assert plan.makespan <= (at_home / options.speed).max()
    assert experts == len(plan.home_quota)
