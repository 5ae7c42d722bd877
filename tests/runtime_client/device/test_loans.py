"""Experts on loan on CPUs, of any plan: how they reach their borrowers, and how gradients return."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.runtime_client.device.shared_memory import shared_memory
from tests.runtime_client.device.small_passes import CPU, fill_unused_memory
from tests.support.expert_groups import make_group

from moeplan.runtime_client.device.exchange import DeviceExchange, Route
from moeplan.runtime_client.device.routes import Owners, write_answer
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.solvers import QuotaPlanner, SpillOptions

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux only")

HOME, RANKS, SPARE = [0, 2, 0, 1, 0, 2, 0], 3, 3
SHAPE = ExpertShape(16, 176)  # moved in three pieces, the last of them short
OPTIONS = SpillOptions.uniform(len(HOME), RANKS, SPARE, home=HOME)
SCALE = 0.5


def draw_loans(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Experts and their borrowers, in any order; a rank may borrow none."""
    loans = []
    for borrower in range(RANKS):
        others = np.flatnonzero(np.array(HOME) != borrower)
        borrowed = rng.choice(others, int(rng.integers(min(SPARE, len(others)) + 1)), replace=False)
        loans += [(int(expert), borrower) for expert in borrowed]
    return [loans[place] for place in rng.permutation(len(loans))]


def route_of(exchange: DeviceExchange, loans: list[tuple[int, int]]) -> Route:
    """A plan of these loans that has no tokens."""
    owners, shape, experts = Owners.of(OPTIONS), exchange.mailbox.shape, len(HOME)
    expert, device = np.array([*loans, (0, 0)], np.int64)[: len(loans)].T
    answer = np.full(shape.words, -7, np.int32)
    write_answer(
        answer, shape.places(), exchange.mailbox.planning.numbering, len(loans), expert.copy(), device.copy(),
        np.zeros(experts, np.int64), np.zeros((len(loans), RANKS), np.int64), np.zeros((RANKS, experts), np.int64),
        owners.home, owners.row, owners.order, owners.first, np.zeros((4, experts), np.int64),
        np.zeros((3, shape.slots), np.int64),
    )  # fmt: skip
    return Route(torch.from_numpy(answer), *[torch.empty(0, dtype=torch.int32)] * 3)


def weights(expert: int, turn: int) -> torch.Tensor:
    return torch.arange(SHAPE.elements, dtype=torch.float64) % 101 + 200 * expert + 2000 * turn


def found_by(expert: int, borrower: int, turn: int) -> torch.Tensor:
    return torch.arange(SHAPE.elements, dtype=torch.float32) % 103 * (expert + 1) + 1000 * borrower + turn


def lend_and_return(folder: Path) -> list[int]:
    """In how many plans owners lent several experts (for each owner), and slots of an expert's borrowers differed."""
    fill_unused_memory()
    group, rank = make_group(), dist.get_rank()
    exchange = DeviceExchange(
        group, QuotaPlanner(OPTIONS, RANKS), SHAPE, max_tokens=8, choices=2, device=CPU, dtype=torch.float32,
        weights=torch.float64, memory=shared_memory(folder),
    )  # fmt: skip
    mine = np.flatnonzero(np.array(HOME) == rank).tolist()
    none = torch.empty(0, SHAPE.hidden)
    rng, launches, turn = np.random.default_rng(3), exchange._launches, 0

    def late(launch: Callable[..., None]) -> Callable[..., None]:
        """The launch, later on one rank than on another."""

        def wait(*arguments: Any) -> None:
            time.sleep(0.02 * ((turn + rank) % RANKS))
            launch(*arguments)

        return wait

    launches.offer, launches.fetch = late(launches.offer), late(launches.fetch)
    places = slots = 0
    for turn in range(16):
        loans = draw_loans(rng)
        borrowed = [
            sorted((HOME[expert], expert) for expert, borrower in loans if borrower == each) for each in range(RANKS)
        ]
        offered = [sorted({expert for expert, _ in loans if HOME[expert] == owner}) for owner in range(RANKS)]
        places += sum(len(each) > 1 for each in offered)
        slots += any(
            len({each.index((HOME[e], e)) for each in borrowed if (HOME[e], e) in each}) > 1 for e in range(len(HOME))
        )
        route = route_of(exchange, loans)
        exchange.meet()  # that of the plan
        own = torch.stack([weights(expert, turn) for expert in mine])
        if turn % 2:
            exchange.offer(route, own)
        exchange.hand_out(route, none)
        if turn % 2 == 0:
            exchange.offer(route, own)
        lent = torch.empty(SPARE, SHAPE.elements)
        exchange.fetch(route, lent, None)
        for slot, (_, expert) in enumerate(borrowed[rank]):
            assert torch.equal(lent[slot], weights(expert, turn).float()), (turn, slot, expert)
        exchange.meet()

        for slot, (_, expert) in enumerate(borrowed[rank]):
            exchange.lent[slot] = found_by(expert, rank, turn)
        gradient = torch.ones(len(mine), SHAPE.elements)
        exchange.take_back(route, gradient, SCALE, exchange.leave(exchange.lent))
        exchange.end_loans()
        for row, expert in enumerate(mine):
            found = [found_by(expert, borrower, turn) for e, borrower in sorted(loans) if e == expert]
            before = torch.ones(SHAPE.elements)
            assert torch.equal(gradient[row], sum(found, before) * SCALE if found else before), (turn, expert)
        exchange.meet()
    exchange.check()
    exchange.mailbox.close()
    return [places, slots]


def test_borrowers_get_the_experts_of_any_plan_and_owners_their_gradients(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for places, slots in ranks(RANKS, lend_and_return, tmp_path, timeout_s=200):
        assert places > 2
        assert slots > 2
