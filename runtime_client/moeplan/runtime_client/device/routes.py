"""From a plan to what the kernels of one rank read: where its rows go, and which experts it lends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan.solvers import SpillOptions
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = ["LOAN", "AnswerShape", "Numbering", "Owners", "Places", "lend_one", "rounded_up", "write_answer"]

FAULT, MOST, LENT, BORROWED, FULLEST = range(5)
"""First words of an answer: why there is no plan, or 0; most replicas of an expert; experts lent, and borrowed; most
rows that a rank has at home, or, where lent experts have rows of their own, in either region, zeros included."""

LOAN = 4
"""Words of a loan."""


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """Places in the int32 array that tells the kernels of one rank what the plan is.

    Attributes:
        experts: Number of experts.
        slots: Spare slots of all ranks together.
        owned: Experts of this rank.
        spare: Its spare slots.
        first: Place of int32[experts + 1]: each expert's first replica in the following two.
        begin: Place of int32[experts + slots]: pairs of this rank, of the same expert, before those of the replica.
        target: Place of int32[experts + slots]: the row of the group that the first of them goes to.
        home_ends: Place of int32[owned]: end of each expert's rows among those of experts at home, a multiple of
            `Numbering.tile`.
        lent_ends: Place of int32[spare], right behind: end of each spare slot's rows, counted from their first, or
            from the first of experts at home if they follow those.
        shared: Place of int32[spare + 1]: the first borrower, in `sharers`, of the expert in each spare slot of this
            rank.
        loans: Place of int32[slots, LOAN], what this rank lends: its own row of the expert, the borrower, the slot
            there, and which of the expert's borrowers it is; by row, then borrower.
        sharers: Place of int32[slots, 2]: device and slot of each borrower of an expert that this rank borrows, in the
            order in which its owner counts them.
        owners: Place of int32[spare, 2]: of the expert in each spare slot of this rank, its owner, and how many other
            experts with lower rows that one lends.
        fills: Place of int32[owned + spare]: where rows of zeros begin that fill each expert's up to its end.
        words: Length.
    """

    experts: int
    slots: int
    owned: int
    spare: int

    @property
    def first(self) -> int:
        return 5

    @property
    def begin(self) -> int:
        return self.first + self.experts + 1

    @property
    def target(self) -> int:
        return self.begin + self.experts + self.slots

    @property
    def home_ends(self) -> int:
        return self.target + self.experts + self.slots

    @property
    def lent_ends(self) -> int:
        return self.home_ends + self.owned

    @property
    def shared(self) -> int:
        return self.lent_ends + self.spare

    @property
    def loans(self) -> int:
        return self.shared + self.spare + 1

    @property
    def sharers(self) -> int:
        return self.loans + LOAN * self.slots

    @property
    def owners(self) -> int:
        return self.sharers + 2 * self.slots

    @property
    def fills(self) -> int:
        return self.owners + 2 * self.spare

    @property
    def words(self) -> int:
        return self.fills + self.owned + self.spare

    def places(self) -> Places:
        """What kernels of the planning thread read of this."""
        return Places(*(getattr(self, name) for name in Places._fields))


class Places(NamedTuple):
    """Places in an answer, by the names of `AnswerShape`."""

    experts: int
    first: int
    begin: int
    target: int
    home_ends: int
    lent_ends: int
    shared: int
    loans: int
    sharers: int
    owners: int
    fills: int


class Numbering(NamedTuple):
    """How rows are numbered in an answer.

    Attributes:
        rank: Whose answer.
        rows: Rows of each rank: the row ``r`` of rank ``d`` is ``d * rows + r``.
        away: First row of lent experts; -1 for the row behind those of experts at home.
        tile: The rows of an expert begin at a multiple of so many.
    """

    rank: int
    rows: int
    away: int
    tile: int


@dataclass(frozen=True, slots=True, eq=False)
class Owners:
    """Who owns which expert.

    Attributes:
        home: int64[experts], the owner.
        row: int64[experts], place among the experts of its owner.
        order: int64[experts], experts by owner and row.
        first: int64[devices + 1], of each owner in `order`.
    """

    home: Int64
    row: Int64
    order: Int64
    first: Int64

    @classmethod
    def of(cls, options: SpillOptions) -> Owners:
        """The owners of the experts of `options`."""
        home = options.home.astype(np.int64)
        order = np.argsort(home, kind="stable")
        first = np.searchsorted(home[order], np.arange(options.devices + 1))
        row = np.empty_like(home)
        row[order] = np.arange(len(home)) - first[home[order]]
        return cls(home, row, order, first)


def lend_one(shape: AnswerShape, rank: int, ranks: int) -> Int32:
    """int32[words], the answer of a plan that has no tokens, and in which each rank lends its first expert to the next.

    Args:
        shape: Places in it.
        rank: Whose answer.
        ranks: How many there are.
    """
    answer = np.zeros(shape.words, np.int32)
    answer[[MOST, LENT, BORROWED]] = 2, 1, 1
    answer[shape.loans + 1] = (rank + 1) % ranks
    answer[shape.shared + 1 : shape.loans] = 1
    answer[shape.sharers] = rank
    answer[shape.owners] = (rank - 1) % ranks
    return answer


@kernel
def rounded_up(count: int, tile: int) -> int:
    """The smallest multiple of a tile that is at least `count`."""
    return (count + tile - 1) // tile * tile


@kernel
def write_answer(
    answer: Int32,
    at: Places,
    numbering: Numbering,
    replicas: int,
    expert: Int64,
    device: Int64,
    at_home: Int64,
    sent: npt.NDArray[Any],
    kept: npt.NDArray[Any],
    home: Int64,
    row: Int64,
    order: Int64,
    first: Int64,
    sums: Int64,
    ranked: Int64,
) -> None:
    """Fill `answer` from a plan, for one rank.

    A rank's rows are ordered by slot and then by source: experts at home from row 0, lent ones from row `away` or
    behind them, in the order of their owners and experts. Those of an expert begin at a multiple of a tile, and zeros
    fill the last one.

    Args:
        answer: int32[words], out; see `AnswerShape`.
        at: Its `places`.
        numbering: Whose answer, and its rows.
        replicas: Number of transient replicas.
        expert: int64[slots], their experts.
        device: int64[slots], who holds them.
        at_home: int64[experts], tokens of all sources to the experts at home.
        sent: int[slots, sources], tokens of each source to each.
        kept: int[sources, experts], tokens to the experts at home.
        home: As in `Owners`; so are `row`, `order` and `first`.
        sums: Scratch int64[4, experts or devices, whichever are more].
        ranked: Scratch int64[3, slots].
    """
    rank, rows, away, tile = numbering
    experts, lent_fills = at.experts, at.fills + at.lent_ends - at.home_ends
    earlier, fill, begun, held = sums[0], sums[1], sums[2], sums[3]
    by_device, slot, goal = ranked[0], ranked[1], ranked[2]
    borrowed = 0
    sources, devices = len(kept), len(first) - 1
    for e in range(experts):
        earlier[e] = 0
        fill[e] = 1
    for s in range(rank):
        for e in range(experts):
            earlier[e] += kept[s, e]

    # Replicas by borrower, owner and expert.
    for d in range(devices):
        held[d] = 0
    for r in range(replicas):
        held[device[r]] += 1
    end = 0
    for d in range(devices):
        end += held[d]
        held[d] = end - held[d]
        begun[d] = held[d]
    for r in range(replicas):
        position = begun[device[r]]
        begun[device[r]] += 1
        while position > held[device[r]]:
            other = by_device[position - 1]
            if (home[expert[other]], expert[other]) < (home[expert[r]], expert[r]):
                break
            by_device[position] = other
            position -= 1
        by_device[position] = r
        fill[expert[r]] += 1
    most = 1
    answer[at.first] = 0
    for e in range(experts):
        most = max(most, fill[e])
        answer[at.first + e + 1] = answer[at.first + e] + fill[e]
        fill[e] = answer[at.first + e]
        begun[e] = 0

    fullest = 0
    for d in range(devices):
        held[d] = 0
        for i in range(first[d], first[d + 1]):
            held[d] += rounded_up(at_home[order[i]], tile)
        fullest = max(fullest, held[d])

    # Lent rows of each device follow one another in that order.
    used, end = 0, 0
    for position in range(replicas):
        r = by_device[position]
        if position == 0 or device[r] != device[by_device[position - 1]]:
            used, end = 0, held[device[r]] if away < 0 else away
        before = 0
        for s in range(sources):
            if s == rank:
                before = end
            end += sent[r, s]
        goal[r] = device[r] * rows + before
        fills = end - max(away, 0)
        end = rounded_up(end, tile)
        fullest = max(fullest, end - max(away, 0))
        if device[r] == rank:
            answer[at.lent_ends + used] = end - max(away, 0)
            answer[lent_fills + used] = fills
            borrowed = used + 1
        slot[r] = used
        used += 1
    for spare in range(borrowed, at.shared - at.lent_ends):
        answer[at.lent_ends + spare] = (
            answer[at.lent_ends + borrowed - 1] if borrowed else (held[rank] if away < 0 else 0)
        )
        answer[lent_fills + spare] = answer[at.lent_ends + spare]

    # An expert's pairs go to its replicas in the order of their devices: to some before its home, home, to the others.
    lent = 0
    for behind in range(2):
        for position in range(replicas):
            r = by_device[position]
            e = expert[r]
            if (device[r] > home[e]) == (behind == 1):
                answer[at.begin + fill[e]] = begun[e]
                answer[at.target + fill[e]] = goal[r]
                begun[e] += sent[r, rank]
                fill[e] += 1
        if behind == 0:
            for d in range(devices):
                end = 0
                for i in range(first[d], first[d + 1]):
                    e = order[i]
                    answer[at.begin + fill[e]] = begun[e]
                    answer[at.target + fill[e]] = d * rows + end + earlier[e]
                    begun[e] += kept[rank, e]
                    fill[e] += 1
                    if d == rank:
                        answer[at.fills + row[e]] = end + at_home[e]
                    end += rounded_up(at_home[e], tile)
                    if d == rank:
                        answer[at.home_ends + row[e]] = end
    for i in range(first[rank], first[rank + 1]):
        begin = lent
        for position in range(replicas):
            r = by_device[position]
            if expert[r] == order[i]:
                loan = at.loans + LOAN * lent
                answer[loan], answer[loan + 1], answer[loan + 2] = row[order[i]], device[r], slot[r]
                answer[loan + 3] = lent - begin
                lent += 1
    used, end = 0, 0
    answer[at.shared] = 0
    for position in range(replicas):
        if device[by_device[position]] != rank:
            continue
        e = expert[by_device[position]]
        for other in range(replicas):
            r = by_device[other]
            if expert[r] == e:
                answer[at.sharers + 2 * end], answer[at.sharers + 2 * end + 1] = device[r], slot[r]
                end += 1
        lower, i = 0, first[home[e]]
        while order[i] != e:
            lower += answer[at.first + order[i] + 1] > answer[at.first + order[i]] + 1
            i += 1
        answer[at.owners + 2 * used], answer[at.owners + 2 * used + 1] = home[e], lower
        used += 1
        answer[at.shared + used] = end
    answer[FAULT], answer[MOST], answer[LENT], answer[BORROWED], answer[FULLEST] = 0, most, lent, borrowed, fullest
