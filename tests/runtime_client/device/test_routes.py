"""What the kernels of one rank read of a plan, against the plan."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.runtime_client.device.routes import (
    BORROWED,
    FAULT,
    LENT,
    LOAN,
    MOST,
    AnswerShape,
    Numbering,
    Owners,
    lend_one,
    write_answer,
)
from moeplan.solvers import QuotaPlanner, SpillOptions, SpillPlan
from moeplan.solvers.problem.arrays import Int32, Int64


def answer_of(plan: SpillPlan, options: SpillOptions, numbering: Numbering) -> tuple[Int32, AnswerShape]:
    owners, rank = Owners.of(options), numbering.rank
    owned = int((options.home == rank).sum())
    shape = AnswerShape(options.experts, int(options.spare.sum()), owned, int(options.spare[rank]))
    answer = np.full(shape.words, -7, np.int32)
    write_answer(
        answer, shape.places(), numbering, plan.replicas, plan.expert, plan.device,
        plan.home_quota, np.ascontiguousarray(plan.sent.T), plan.kept,
        owners.home, owners.row, owners.order, owners.first,
        np.zeros((4, max(options.experts, options.devices)), np.int64), np.zeros((3, shape.slots), np.int64),
    )  # fmt: skip
    return answer, shape


def slots_of(plan: SpillPlan, options: SpillOptions, device: int) -> list[int]:
    """Experts of a device's slots: those at home, then lent ones by owner and expert."""
    lent = sorted((int(options.home[e]), int(e)) for e, d in zip(plan.expert, plan.device, strict=True) if d == device)
    return [*np.flatnonzero(options.home == device).tolist(), *(e for _, e in lent)]


@pytest.mark.parametrize(("away", "tile"), [(-1, 1), (4000, 1), (-1, 16), (4096, 16)])
@pytest.mark.parametrize("seed", range(12))
def test_every_pair_goes_to_a_row_of_its_own_in_the_order_of_slots_and_sources(seed: int, away: int, tile: int) -> None:
    rng = np.random.default_rng(seed)
    devices, spare = int(rng.integers(2, 7)), int(rng.integers(0, 4))
    home = rng.permutation(np.append(np.arange(devices), rng.integers(0, devices, 9)))
    options = SpillOptions.uniform(devices + 9, devices, spare, home=home)
    counts = rng.integers(0, 40, (devices, devices + 9)) * (rng.random(devices + 9) < 0.6)
    counts[:, rng.integers(devices + 9)] += 200
    plan = QuotaPlanner(options, devices).plan(counts)
    rows = 9000

    found: dict[tuple[int, int], tuple[int, int]] = {}  # (device, row) -> (source, expert)
    for source in range(devices):
        answer, shape = answer_of(plan, options, Numbering(source, rows, away, tile))
        first = answer[shape.first : shape.begin]
        assert answer[FAULT] == 0
        assert answer[MOST] == np.diff(first).max()
        for expert in range(options.experts):
            begins = [*answer[shape.begin + first[expert] : shape.begin + first[expert + 1]], counts[source, expert]]
            targets = answer[shape.target + first[expert] : shape.target + first[expert + 1]]
            for begin, end, target in zip(begins, begins[1:], targets, strict=False):
                for pair in range(begin, end):
                    place = divmod(int(target) + pair - int(begin), rows)
                    assert place not in found
                    found[place] = source, expert
    assert len(found) == counts.sum()

    for device in range(devices):
        answer, shape = answer_of(plan, options, Numbering(device, rows, away, tile))
        here = {row: pair for (d, row), pair in found.items() if d == device}
        slots, owned = slots_of(plan, options, device), shape.owned
        ends: Int64 = answer[shape.home_ends : shape.shared].astype(np.int64)
        fills: Int64 = answer[shape.fills : shape.words].astype(np.int64)
        if away >= 0:
            ends[owned:] += away
            fills[owned:] += away
        starts = np.append(0, ends[:-1])
        if away >= 0 and spare:
            starts[owned] = away
        assert (ends % tile == 0).all()
        assert (ends - fills < tile).all()
        for slot, (begin, end) in enumerate(zip(starts, fills, strict=True)):
            pairs = [here.pop(row) for row in range(begin, end)]
            assert pairs == sorted(pairs)
            assert {expert for _, expert in pairs} <= ({slots[slot]} if slot < len(slots) else set())
        assert not here
        assert answer[BORROWED] == len(slots) - owned

        loans = answer[shape.loans : shape.sharers].reshape(-1, LOAN)[: answer[LENT]].tolist()
        mine = np.flatnonzero(options.home == device).tolist()
        expected = sorted(
            (mine.index(e), int(d)) for e, d in zip(plan.expert, plan.device, strict=True) if options.home[e] == device
        )
        assert [(row, d) for row, d, *_ in loans] == expected
        for row, borrower, slot, nth in loans:
            width = int((options.home == borrower).sum())
            assert slots_of(plan, options, borrower)[width + slot] == mine[row]
            theirs = [loan[1:3] for loan in loans if loan[0] == row]
            assert theirs[nth] == [borrower, slot]
            known, there = answer_of(plan, options, Numbering(borrower, rows, away, tile))
            begin, end = known[there.shared + slot : there.shared + slot + 2]
            assert known[there.sharers : there.owners].reshape(-1, 2)[begin:end].tolist() == theirs
            offered = sorted({loan[0] for loan in loans})
            owner = known[there.owners : there.fills].reshape(-1, 2)[slot].tolist()
            assert owner == [device, offered.index(row)]


def test_lending_one_expert_is_what_a_plan_with_one_loan_says() -> None:
    options = SpillOptions.uniform(6, 3, 2)
    counts = np.zeros((3, 6), np.int64)
    counts[0, 0], counts[2, 4] = 12, 6
    plan = QuotaPlanner(options, 3).plan(counts)
    owner, shape = answer_of(plan, options, Numbering(0, 100, -1, 1))
    borrower, _ = answer_of(plan, options, Numbering(1, 100, -1, 1))
    places_of_borrowed = [first + word for first in (shape.sharers, shape.owners) for word in (0, 1)]
    for rank, answer, words, places in (
        (0, owner, [FAULT, MOST, LENT], slice(shape.loans, shape.loans + LOAN)),
        (1, borrower, [FAULT, MOST, BORROWED], [shape.shared, shape.shared + 1, *places_of_borrowed]),
    ):
        one = lend_one(shape, rank, 3)
        assert one[words].tolist() == answer[words].tolist() == [0, 2, 1]
        assert one[places].tolist() == answer[places].tolist()
