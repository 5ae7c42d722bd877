"""What the kernels of one rank read of a layout's plan, against the division that hosts make."""

from __future__ import annotations

import numpy as np
import pytest
from tests.runtime_client.device.small_passes import CPU, draw_plan

from moeplan.runtime_client.device.desk import ANSWERED, NOTED, REQUEST, STOP, TOLD, WORDS, Desk
from moeplan.runtime_client.device.layout_plans import LayoutPlans
from moeplan.runtime_client.device.routes import BORROWED, FAULT, FULLEST, LENT, MOST, Numbering
from moeplan.runtime_client.layers.dividing import Division
from moeplan.solvers import Layout
from moeplan.solvers.problem.arrays import Int32, Int64

ROWS = 9000


def drawn(seed: int) -> tuple[Layout, Division, Int64]:
    rng = np.random.default_rng(seed)
    devices = int(rng.integers(2, 7))
    experts = devices + int(rng.integers(0, 9))
    counts = rng.integers(0, 40, (devices, experts)) * (rng.random(experts) < 0.7)
    counts[:, rng.integers(experts)] += 200
    return *draw_plan(rng, devices, experts), counts


def served(plans: LayoutPlans, key: int, counts: Int64) -> tuple[Int32, Int64]:
    """The answer to one request, and the words of the desk."""
    devices, experts = counts.shape
    words, table = np.zeros(WORDS, np.int64), np.zeros((devices, experts + 6 + TOLD), np.int32)
    table[:, :experts] = counts
    table[:, -3:-1] = np.frombuffer(np.int64(key).tobytes(), np.int32)
    answer = np.full(plans.shape.words, -7, np.int32)
    words[[REQUEST, STOP]] = 1
    plans.serve(Desk(words, table, answer, np.zeros(5, np.int64), np.zeros((devices, 5), np.int64), 0, 1))
    assert words[ANSWERED] == 1
    return answer, words


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("seed", range(24))
def test_every_pair_goes_to_a_row_of_its_own_as_hosts_divide_them(seed: int, tile: int) -> None:
    layout, division, counts = drawn(seed)
    experts, devices = layout.experts, layout.devices
    width = int((layout.slots >= 0).sum(axis=1).max())
    hosts = layout.hosts
    expected = division.sent(layout, counts)
    found: dict[tuple[int, int], tuple[int, int]] = {}  # (device, row) -> (source, replica)
    computed: list[list[int]] = []  # rows of each device
    for source in range(devices):
        plans = LayoutPlans(experts, devices, width, Numbering(source, ROWS, -1, tile), CPU)
        key = int(plans.key(layout, division.cluster.speed, division.rule, 7**20 + seed)[-1])
        answer, words = served(plans, key, counts)
        shape = plans.shape
        assert answer[FAULT] == 0 == words[NOTED]
        assert answer[MOST] == layout.replicas.max()
        assert answer[LENT] == answer[BORROWED] == 0
        tiled = np.bincount(hosts.device, -(-expected.sum(axis=0) // tile) * tile)
        assert answer[FULLEST] == tiled.max()
        assert answer[shape.first : shape.begin].tolist() == hosts.start.tolist()
        for expert in range(experts):
            replicas = range(hosts.start[expert], hosts.start[expert + 1])
            begins = [*answer[shape.begin : shape.begin + len(hosts.device)][list(replicas)], counts[source, expert]]
            for replica, begin, end in zip(replicas, begins, begins[1:], strict=False):
                assert end - begin == expected[source, replica]
                for pair in range(begin, end):
                    place = divmod(int(answer[shape.target + replica]) + pair - int(begin), ROWS)
                    assert place not in found
                    assert place[0] == hosts.device[replica]
                    found[place] = source, replica
        ends = answer[shape.home_ends : shape.shared]
        held = layout.slots[source][layout.slots[source] >= 0]
        loads = [
            sum(
                expected[:, r].sum()
                for r in np.flatnonzero(hosts.device == source)
                if hosts.start[e] <= r < hosts.start[e + 1]
            )
            for e in held
        ]
        sizes = [-(-load // tile) * tile for load in loads]
        assert ends.tolist() == [*np.cumsum(sizes), *[sum(sizes)] * (width - len(held))]
        zeros = [size - load for size, load in zip(sizes, loads, strict=True)]
        fills = answer[shape.fills : shape.words]
        assert (ends - fills).tolist() == [*zeros, *[0] * (width - len(held))]
        begins = [0, *ends[:-1].tolist()]
        computed.append([row for begin, fill in zip(begins, fills, strict=True) for row in range(begin, fill)])
    assert len(found) == counts.sum()
    for device in range(devices):
        places = sorted(place for place in found if place[0] == device)
        assert [row for _, row in places] == computed[device]
        rows = [found[place] for place in places]
        slots = [(hosts.slot[replica], source) for source, replica in rows]
        assert slots == sorted(slots)


def test_what_a_thread_cannot_divide_by_is_told() -> None:
    layout, division, counts = drawn(3)
    width = int((layout.slots >= 0).sum(axis=1).max())
    plans = LayoutPlans(layout.experts, layout.devices, width, Numbering(0, int(counts.sum()) // 100, -1, 1), CPU)
    key = int(plans.key(layout, division.cluster.speed, division.rule, 5)[-1])
    for asked in (key, key + 1):  # more rows than there is room for; a layout that nobody has named
        answer, words = served(plans, asked, counts)
        assert answer[FAULT] == 1 == words[NOTED]


def test_layouts_that_passes_had_make_room_for_others() -> None:
    layout, division, counts = drawn(2)
    width = int((layout.slots >= 0).sum(axis=1).max())
    plans = LayoutPlans(layout.experts, layout.devices, width, Numbering(0, ROWS, -1, 1), CPU)
    for number in range(1, 2100):
        told = plans.key(layout, division.cluster.speed, division.rule, number)
    assert served(plans, int(told[-1]), counts)[0][FAULT] == 0
    assert served(plans, 1, counts)[0][FAULT] == 1


def test_a_rank_without_an_expert_is_refused() -> None:
    plans = LayoutPlans(3, 2, 3, Numbering(0, ROWS, -1, 1), CPU)
    with pytest.raises(ValueError, match="no expert on rank 1"):
        plans.require(Layout(np.array([[0, 1, 2], [-1, -1, -1]]), 3))
