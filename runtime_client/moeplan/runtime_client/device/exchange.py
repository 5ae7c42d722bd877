"""The share of all layers of a model in passes without the host: memory, planner, and launches of kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime_client.device.desk import ABORTED, ANSWERED, LAYER, REQUEST, TOLD
from moeplan.runtime_client.device.expert import Expert, matrix_sizes
from moeplan.runtime_client.device.launches import Launch, blocks_beside, is_captured, lanes, power_of_2, processors
from moeplan.runtime_client.device.layout_plans import LayoutPlans
from moeplan.runtime_client.device.mailbox import Mailbox, Planning, Turn
from moeplan.runtime_client.device.memory import SymmetricMemory, places, symmetric_memory
from moeplan.runtime_client.device.products import Products, Rows, tile_rows
from moeplan.runtime_client.device.quota_plans import QuotaPlans
from moeplan.runtime_client.device.routes import BORROWED, FULLEST, LENT, MOST, Numbering
from moeplan.runtime_client.group import ExpertGroup, beside, join, mark
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.arrays import Int32

__all__ = ["DeviceExchange", "Route", "SlotsOfLayouts"]

_LENDERS = 128
"""Blocks that move lent experts and their gradients: as many as it takes to fill a link with reads from another GPU."""

_CHUNK = 128
"""Choices whose order a block finds by comparing all with all."""

_ELEMENTS = 8192
"""Elements of tokens that a block moves at a time."""

_NEVER = 2**31 - 1
"""More replicas than any expert has."""

_MOVED = 4096
"""Elements of experts that a block moves at a time: few, so that it fits on a processor beside a product's."""


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A plan as the kernels of one pass and of its backward read it; all of it stays on the device.

    Attributes:
        answer: int32, see `AnswerShape`; its first word is not zero where there is no plan.
        target: int32[pairs], the row of the group that each pair goes to.
        ends: int32[replicas], see `AnswerShape`: end of each expert's rows, those at home first.
        fills: int32[replicas], see `AnswerShape`: where zeros behind them begin.
    """

    answer: Tensor
    target: Tensor
    ends: Tensor
    fills: Tensor


@dataclass(frozen=True, slots=True)
class SlotsOfLayouts:
    """In place of a planner: experts are sharded, and layers divide tokens by their layouts.

    Attributes:
        experts: Number of experts.
        slots: Most slots of a rank in any layout; the same on all ranks.
    """

    experts: int
    slots: int


class DeviceExchange:
    """Lets layers run their passes on GPUs without the host: counts, plan, dispatch, products, combine.

    One for all layers of the same dimensions that run one after another on one stream; pass it to each of them. The
    ranks must reach each other's memory (one NVLink domain). A thread plans and takes a core of its own; see `Mailbox`.
    `ResidentExperts` need one with a planner, and `FullyShardedExperts` one for `SlotsOfLayouts`.

    All shapes are static: a pass has room for `max_tokens` of this rank, and for `capacity` rows of its experts at a
    time. What exceeds these waits for the next of `rounds`, which the host launches in any case: kernels find on the
    device that nothing is left, and return. The planner keeps every rank within all rounds.

    What goes wrong in a pass (a router's fault, no feasible plan, more than `max_tokens`, a rank that does not come in
    time) makes its output and gradients not numbers on all ranks, and those of every later pass; the error is raised by
    the next pass that sees it, and by `check`. Nothing works after that.

    Memory of a rank, in bytes, with b bytes per element, N ranks, T = max_tokens, K spare slots and C = capacity and
    128 rows for each of its experts, or twice as many where lent experts have rows of their own: in symmetric memory
    ``b * (hidden * T * (N + choices) + (K + L) * elements)`` and a little more, where L is the most that a rank lends,
    ``K * (N - 1)`` or its experts if they are fewer; and for each pass whose backward is to come
    ``b * C * (hidden + rows of the first matrix)`` and lent experts, or converted ones where the weights have another
    type. Later rounds keep no more than the tokens of this rank and the weights of their rows: their backward sends
    tokens again, for which it takes ``b * C * hidden`` a round, and computes again what the first round keeps.
    With more than one round a backward holds gradients of weights in bfloat16 in float32, 4 bytes for each element of
    the rank's experts, and with more than two those of lent experts, too.

    Args:
        group: The ranks.
        planner: Whose options count; a thread plans with a planner of its own, and a `token_cap` of at most
            ``rounds * capacity``. Or what layouts have at most.
        shape: Dimensions of an expert.
        max_tokens: Most tokens of a rank in one pass; the same on all ranks.
        choices: Experts per token.
        dtype: What tokens travel and experts compute in.
        weights: Type of the layers' parameter, where experts are at home. If it is another, a pass converts them all
            anyway, and lent experts join the copy: one product does both. If it is the same, lent experts are computed
            apart, with rows of their own.
        device: This rank's GPU.
        capacity: Rows that a rank has room for at a time; by default all of the group, so that no plan exceeds it.
        rounds: How many times, so that a rank computes up to ``rounds * capacity`` rows of a pass.
        time_limit: How long a pass waits for another rank; by default as long as the group does.

    Raises:
        ValueError: the layer cannot run this way; the message says why.
        RuntimeError: as `symmetric_memory`.
    """

    def __init__(
        self,
        group: ExpertGroup,
        planner: QuotaPlanner | SlotsOfLayouts,
        shape: Expert,
        *,
        max_tokens: int,
        choices: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        weights: torch.dtype = torch.float32,
        capacity: int | None = None,
        rounds: int = 1,
        time_limit: timedelta | None = None,
        memory: Callable[[dist.ProcessGroup, int, torch.device], SymmetricMemory] = symmetric_memory,
    ) -> None:
        if group.tokens is None:
            raise ValueError("group of one rank: there is nothing to exchange; leave `exchange` out")
        self.spare = self._offers = 0
        if isinstance(planner, SlotsOfLayouts):
            _require_slots(planner, group.size)
            weights = dtype  # they are gathered so
        elif isinstance(planner, QuotaPlanner):
            _require_homes(planner.options, group.size)
            self.spare = min(int(planner.options.spare[0]), planner.options.experts)
            self._offers = min(_most_owned(planner.options), self.spare * (group.size - 1))
        else:
            raise ValueError(f"planner = {type(planner).__name__}: without the host only QuotaPlanner plans")
        for name, value in (("max_tokens", max_tokens), ("choices", choices), ("rounds", rounds)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if device.type == "cuda" and dtype != torch.bfloat16:
            raise ValueError(f"dtype = {dtype}: must be torch.bfloat16; leave `exchange` out for others")
        if not shape.plain:
            raise ValueError(f"{shape}: the kernels know no form but act(gate) * up or act(up); leave `exchange` out")
        for name in ("hidden", "width"):
            if getattr(shape, name) % 8:
                raise ValueError(f"expert.{name} = {getattr(shape, name)}: must be a multiple of 8")
        pairs = max_tokens * choices
        self.capacity = group.size * pairs if capacity is None else capacity
        if not pairs <= rounds * self.capacity or not self.capacity <= group.size * pairs:
            least, most = -(-pairs // rounds), group.size * pairs
            raise ValueError(f"capacity = {capacity}: must be {least} to {most} rows with {rounds} rounds")
        tile = tile_rows(device)
        self.capacity, self.rounds = -(-self.capacity // tile) * tile, rounds
        self.joined = self.spare == 0 or weights != dtype
        self.span = self.capacity + tile * self._most_experts(planner)
        self.room = self.span * (1 if self.joined else 2)
        self.rows = self.room * rounds
        if group.size * self.rows >= 2**31:
            raise ValueError(f"capacity = {self.capacity}: {group.size} ranks have room for 2**31 rows together")
        self.group_tokens = group.size * max_tokens
        if self.group_tokens * choices >= 2**31:
            raise ValueError(f"max_tokens = {max_tokens}: {group.size} ranks have 2**31 choices together")
        self.group, self.shape, self.choices, self.device = group, shape, choices, device
        self.dtype, self.weights = dtype, weights
        self.max_tokens, self.pairs = max_tokens, pairs
        self.limit_ns = int((time_limit or group.timeout).total_seconds() * 1e9)
        self._turns: dict[int, Turn] = {}
        self._is_captured = False
        self._nothing_told = torch.zeros(TOLD // 2, dtype=torch.int64, device=device)
        self.planner, self._price = planner, 0

        self.mailbox = self._open_mailbox()
        item, hidden = dtype.itemsize, shape.hidden
        sizes = {
            "flags": 8 * group.size,
            "flags_beside": 8 * group.size,
            "abort": 8,
            "table": 4 * self.mailbox.table.numel(),
            "arrived": item * self.group_tokens * hidden,
            "where": 4 * self.group_tokens * choices,
            "share": 4 * self.group_tokens * choices,
            "returned": item * pairs * hidden,
            "returned_weight": 4 * pairs,
            "lent": item * self.spare * shape.elements,
            "offered": item * self._offers * shape.elements,
        }
        begins, size = places(sizes)
        self.memory = memory(group.tokens, size, device)
        self.peers = self.memory.peers
        view = self.memory.view
        self.flags, self.flags_beside = (
            view(begins[name], (group.size,), torch.int64) for name in ("flags", "flags_beside")
        )
        self.abort = view(begins["abort"], (1,), torch.int64)
        self.table = view(begins["table"], tuple(self.mailbox.table.shape), torch.int32)
        self.arrived = view(begins["arrived"], (self.group_tokens, hidden), dtype)
        self.where = view(begins["where"], (self.group_tokens, choices), torch.int32)
        self.share = view(begins["share"], (self.group_tokens, choices), torch.float32)
        self.returned = view(begins["returned"], (pairs, hidden), dtype)
        self.returned_weight = view(begins["returned_weight"], (pairs,), torch.float32)
        self.lent = view(begins["lent"], (self.spare, shape.elements), dtype)
        self.offered = view(begins["offered"], (self._offers, shape.elements), dtype)
        self.state, self.state_beside = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        told = self.abort, self.peers, group.rank, self.limit_ns
        self._signals = self.state, self.flags, *told
        self._signals_beside = self.state_beside, self.flags_beside, *told
        self._lenders = _LENDERS if device.type == "cuda" else 1
        self._blocks, self._few = processors(device), blocks_beside(device)
        self._wide, self._narrow = _tile(hidden, _ELEMENTS), _tile(hidden, _ELEMENTS // 2)
        self._inner = _tile(shape.width, _ELEMENTS // 4)  # of several tensors at once
        self._piece = min(_MOVED, power_of_2(shape.elements))
        self._launches = self._make_launches()
        self.products = Products(self.mailbox.shape, device, self.span)

    def __deepcopy__(self, memo: dict[int, object]) -> DeviceExchange:
        """Itself: copies of layers share it, as layers do."""
        return self

    def require_homes(self, shape: Expert, home: Int32, weights: torch.dtype) -> None:
        """Raise unless a layer of experts at home, of such experts, can use this exchange.

        Raises:
            ValueError: it was made for other experts, homes or another type.
        """
        if isinstance(self.planner, SlotsOfLayouts):
            raise ValueError("the exchange was made for layouts of sharded experts; make one with a QuotaPlanner")
        self._require(shape=shape, home=home.tolist(), weights=weights)

    def layouts(self, shape: Expert, experts: int) -> LayoutPlans:
        """What divides the tokens of a layer of sharded experts.

        Raises:
            ValueError: the exchange was made for other experts, or for experts at home.
        """
        plans = self.mailbox.planning
        if not isinstance(plans, LayoutPlans):
            raise ValueError(
                f"the exchange was made for experts at home; write DeviceExchange(group, SlotsOfLayouts({experts}, "
                "slots), ...) for sharded ones"
            )
        self._require(shape=shape, experts=experts)
        return plans

    def _require(self, **asked: object) -> None:
        planner = self.planner
        own = {"shape": self.shape, "weights": self.weights, "experts": self.mailbox.planning.experts}
        if isinstance(planner, QuotaPlanner):
            own["home"] = planner.options.home.tolist()
        for name, other in asked.items():
            if own[name] != other:
                raise ValueError(f"{name} = {other}: the exchange was made for {own[name]}")

    @property
    def options(self) -> SpillOptions:
        """What the thread lends by.

        Raises:
            ValueError: the exchange was made for layouts, and lends nothing.
        """
        own, room = self._lender().options, self.rounds * self.capacity
        return replace(own, token_cap=own.token_cap.clip(max=room), min_tokens=max(own.min_tokens, self._price))

    def _lender(self) -> QuotaPlanner:
        if isinstance(self.planner, SlotsOfLayouts):
            raise ValueError("the exchange was made for layouts of sharded experts: it lends nothing")
        return self.planner

    def charge(self, tokens: float) -> None:
        """Lend from now on only what relieves a rank of so many tokens, the same on all ranks; see `measure_transfer`.

        The price is the `min_tokens` of a loan, not its `transfer_tokens`: all ranks wait until loans have arrived, so
        a rank that borrows should compute no less for it.

        Args:
            tokens: Time of a loan, in tokens that a rank computes meanwhile.

        Raises:
            ValueError: the exchange is one for layouts, which lends nothing, or a CUDA graph holds passes of it.
            RouterError, MissedPassError, RanksDifferError, InfeasibleError, PassError: an earlier pass has failed; see
                `check`.
        """
        if self._is_captured:
            raise ValueError(
                f"charge({tokens}): a CUDA graph holds passes of this exchange, and asks its planner as it is; call it "
                "before steps are captured, or make another exchange"
            )
        self._lender()  # or there is no price
        self._price = math.ceil(tokens)
        self.mailbox.close()
        self.check()  # what failed is noted in the mailbox that goes
        self.mailbox = self._open_mailbox()

    def _most_experts(self, planner: QuotaPlanner | SlotsOfLayouts) -> int:
        """Experts that any rank has rows of, each of which may need zeros to fill its last tile."""
        if isinstance(planner, SlotsOfLayouts):
            return planner.slots
        owned = _most_owned(planner.options)
        return owned + self.spare if self.joined else max(owned, self.spare)

    def _planning(self) -> Planning:
        planner, numbering = self.planner, self._numbering()
        if isinstance(planner, SlotsOfLayouts):
            return LayoutPlans(planner.experts, self.group.size, planner.slots, numbering, self.device)
        return QuotaPlans(self.options, numbering)

    def _numbering(self) -> Numbering:
        away = -1 if self.joined else self.rounds * self.span
        return Numbering(self.group.rank, self.rows, away, tile_rows(self.device))

    def _open_mailbox(self) -> Mailbox:
        return Mailbox(self._planning(), self.device)

    def check(self) -> None:
        """Raise what has gone wrong in passes that are over; call it where the host waits for the device anyway.

        Raises:
            RouterError: a choice was out of range or a weight not finite, on any rank.
            MissedPassError: the ranks were not in the same pass, or one did not come in time.
            LayoutMismatchError: ranks had different layouts.
            RanksDifferError: ranks held the same part of the experts, or the block's other weights differed.
            InfeasibleError: no plan kept every rank within its token cap.
            PassError: a rank had more tokens than there is room for, or its layout gave it more.
        """
        self.mailbox.check(self._turns)

    def meet(self) -> None:
        """All ranks: what their kernels wrote before, all kernels see after."""
        self._launches.meet((1, 1, 1), *self._signals)

    def plan(self, index: Tensor, weight: Tensor, excess: int, replicas: int, turn: Turn) -> Route:
        """Count, agree, plan.

        Args:
            index: int64[tokens, choices].
            weight: [tokens, choices].
            excess: Tokens of this rank for which there is no room.
            replicas: Of this rank, those at home and spare slots.
            turn: Which pass it is.
        """
        launch, mailbox, shape = self._launches, self.mailbox, self.mailbox.shape
        self._is_captured |= is_captured(index)
        pairs = index.numel()
        chunks, columns = -(-pairs // _CHUNK), shape.experts + 2
        self._turns[turn.layer] = turn
        told = self._nothing_told if turn.layout is None else turn.layout
        if turn.checks:
            told = torch.stack([*turn.checks, told[-1]])
        order = torch.empty(pairs, dtype=torch.int32, device=self.device)
        tallies = torch.empty(chunks, columns, dtype=torch.int32, device=self.device)
        answer = torch.empty(shape.words, dtype=torch.int32, device=self.device)
        target = torch.empty(pairs, dtype=torch.int32, device=self.device)
        if pairs:
            launch.count((chunks, 1, 1), index, weight, order, tallies, pairs)
        launch.total(
            (-(-columns // 16), 1, 1), tallies, self.table, self.peers, self.group.rank, chunks, excess, turn.layer,
            turn.number, told.view(torch.int32), turn.gathered & 0x7FFFFFFF,
        )  # fmt: skip
        launch.plan(
            (1, 1, 1), *self._signals, self.table, answer, mailbox.words, mailbox.table, mailbox.answer, turn.layer
        )
        launch.place(
            (-(-self.pairs // 512), 1, 1), index, weight, order, tallies, answer, target, self.where, self.share,
            self.peers, pairs, self.group.rank,
        )  # fmt: skip
        ends, fills = (answer[begin : begin + replicas] for begin in (shape.home_ends, shape.fills))
        return Route(answer, target, ends, fills)

    def regions(self, route: Route, nth: int) -> list[Rows]:
        """Rows that a product of a round computes: of all experts, or of those at home and of lent ones."""
        ends, fills = route.ends, route.fills
        if self.rounds > 1:
            ends, fills = ((part - nth * self.span).clamp_(0, self.span) for part in (ends, fills))
        if self.joined:
            return [Rows(route.answer, slice(0, self.room), ends, fills)]
        owned = self.mailbox.shape.owned
        return [
            Rows(route.answer, slice(0, self.span), ends[:owned], fills[:owned]),
            Rows(route.answer, slice(self.span, self.room), ends[owned:], fills[owned:]),
        ]

    def convert(self, experts: Tensor, out: Tensor) -> None:
        """Begin to convert the first matrices of experts at home, `beside` what follows, until `join`.

        Args:
            experts: [owned, elements].
            out: [owned, elements].
        """
        with beside(self.device):
            self._launches.convert((self._few, 1, 1), experts, out)

    def convert_rest(self, experts: Tensor, out: Tensor, after: torch.cuda.Event | None) -> None:
        """Begin to convert their second matrices, until `join`.

        Args:
            experts: As in `convert`; so is `out`.
            out: Where to.
            after: As in `step_aside`.
        """
        with beside(self.device, after):
            self._launches.convert_rest((self._lenders, 1, 1), experts, out)

    def hand_out(self, route: Route, source: Tensor, *, again: bool = False) -> None:
        """Send tokens or their gradients to the ranks that compute them.

        Args:
            route: Of the pass.
            source: [tokens, hidden].
            again: Only if a rank has rows in later rounds.
        """
        launch = self._launches.hand_again if again else self._launches.hand_out
        if len(source):
            launch(
                (-(-len(source) // self._wide["BLOCK"]), 1, 1), source, route.target, self.arrived, self.peers,
                route.answer, len(source), self.group.rank,
            )  # fmt: skip
        self.meet()

    def step_aside(self, route: Route, after: torch.cuda.Event | None) -> None:
        """Let a product begin that has been launched, before what will run beside it.

        Blocks of others find room on processors on which a product runs already, while a product waits for processors
        that they began on. So they begin after one block that does nothing.

        Args:
            route: Of the pass.
            after: A `mark` before the product.
        """
        with beside(self.device, after):
            self._launches.pause((1, 1, 1), *self._signals_beside, route.answer)

    def offer(self, route: Route, experts: Tensor, after: torch.cuda.Event | None = None) -> None:
        """Begin to offer lent experts, converted on the way, to the ranks that borrow them.

        Args:
            route: Of the pass.
            experts: [owned, elements].
            after: As in `step_aside`; by default behind all that has been launched.
        """
        if not self.spare:
            return
        with beside(self.device, after):
            self._launches.offer((self._lenders, 1, 1), experts, self.offered, route.answer)
            self._launches.meet_for_loans((1, 1, 1), *self._signals_beside, route.answer)

    def fetch(self, route: Route, lent: Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Begin to fetch borrowed experts, which their owners have begun to offer.

        Parts of experts with several borrowers come from these, once all ranks have fetched theirs.

        Args:
            route: Of the pass.
            lent: [spare, elements], out.
            after: As in `step_aside`.

        Returns:
            When they are there, for `join`.
        """
        if not self.spare:
            return None
        launch, blocks = self._launches, (self._lenders, 1, 1)
        way = self.offered, self.lent, lent, route.answer, self.peers, self.group.rank
        with beside(self.device, after):
            launch.fetch(blocks, *way)
            if self.group.size > 2:  # or no expert has several borrowers
                launch.meet_borrowers((1, 1, 1), *self._signals_beside, route.answer)
                launch.fetch_others(blocks, *way)
            return mark(self.device)

    def arrange(self, route: Route, nth: int, where: Tensor) -> tuple[Tensor, Tensor]:
        """What has arrived for a round of the forward pass; what backward needs of it.

        Args:
            route: Of the pass.
            nth: The round, from 0.
            where: int32[tokens of the group, choices], out: the row of each pair, -1 if it is computed elsewhere.

        Returns:
            Tokens [rows, hidden] ordered by expert, and float32[rows], their weights.
        """
        rows = torch.empty(self.room, self.shape.hidden, dtype=self.dtype, device=self.device)
        scale = torch.empty(self.room, dtype=torch.float32, device=self.device)
        self._launches.arrange(
            (self._blocks, 1, 1), self.arrived, self.where, self.share, rows, scale, where, route.answer,
            nth * self.span,
        )  # fmt: skip
        return rows, scale

    def arrange_again(self, route: Route, nth: int, where: Tensor) -> Tensor:
        """What has arrived in the backward pass for a round, [rows, hidden]; `where` is as in `arrange`."""
        rows = torch.empty(self.room, self.shape.hidden, dtype=self.dtype, device=self.device)
        self._launches.arrange_again(
            (self._blocks, 1, 1), self.arrived, where, self.share, rows, self.share, where, route.answer,
            nth * self.span,
        )  # fmt: skip
        return rows

    def leave(self, borrowed: Tensor) -> torch.cuda.Event | None:
        """Leave the gradients of borrowed experts to their owners, [spare, elements]; when that is done."""
        if not self.spare:
            return None
        if borrowed is not self.lent:
            self.lent.copy_(borrowed)
        return mark(self.device)

    def take_back(self, route: Route, gradient: Tensor, scale: float, left: torch.cuda.Event | None) -> None:
        """Begin to add what borrowers have left, beside what has been launched since, as `fetch` does, until
        `end_loans`.

        Args:
            route: Of the pass.
            gradient: [owned, elements], changed in place.
            scale: What gradients of experts that were lent are multiplied by.
            left: What `leave` returned.
        """
        if self.spare:
            with beside(self.device, left):
                self._launches.meet_for_loans((1, 1, 1), *self._signals_beside, route.answer)
                self._launches.take_back((self._lenders, 1, 1), gradient, self.lent, route.answer, self.peers, scale)

    def end_loans(self) -> None:
        """Go on when `take_back` is over."""
        if self.spare:
            join(self.device)

    def give_back(
        self,
        nth: int,
        where: Tensor,
        results: Sequence[Tensor],
        to_weight: Tensor | None = None,
    ) -> None:
        """Results of a round to their sources; in the backward pass also the gradients of weights.

        Args:
            nth: The round, from 0.
            where: As in `arrange`.
            results: Those of experts at home [rows, hidden], and of lent ones where they are apart.
            to_weight: In the backward pass: float32[rows], gradients of the weights.
        """
        launch = self._launches.give_back if to_weight is None else self._launches.give_gradients
        launch(
            (self._blocks, 1, 1), results[0], results[-1], where, self.share,
            self.share if to_weight is None else to_weight, self.returned, self.returned_weight, self.peers,
            nth * self.span,
        )  # fmt: skip

    def collect(self, route: Route, out: Tensor, gradients: Tensor | None = None) -> None:
        """Fill `out` with the sum of what the ranks gave back; if the pass has failed, with what is not a number.

        Args:
            route: Of the pass.
            out: [tokens, hidden], out.
            gradients: In the backward pass: [replicas, elements], of experts' weights, which then are not either.
        """
        rows = max(-(-len(out) // self._narrow["BLOCK"]), 1)
        spoiled, replicas = (out, 0) if gradients is None else (gradients, len(gradients))
        self._launches.collect(
            (rows, -(-self.shape.hidden // self._narrow["COLUMNS"]), 1), self.returned, route.target, out, spoiled,
            route.answer, self.abort, self.mailbox.words, len(out), replicas, spoiled.stride(0),
        )  # fmt: skip

    def activate(self, first: Tensor, end: Tensor) -> Tensor:
        """The activations [rows, width] of the first product."""
        out = first.new_empty(len(first), self.shape.width)
        self._launches.activate((self._blocks, 1, 1), first, out, end)
        return out

    def activate_backward(
        self, gradient: Tensor, first: Tensor, scale: Tensor, to_weight: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the first product; weighted activations; and those of the weights, into float32[rows]."""
        to_first, scaled = torch.empty_like(first), torch.empty_like(gradient)
        self._launches.activate_backward((self._blocks, 1, 1), gradient, first, scale, to_first, scaled, to_weight, end)
        return to_first, scaled

    def _make_launches(self) -> SimpleNamespace:
        """Every kernel with its constants."""
        # They need Triton, which is not everywhere.
        from moeplan.runtime_client.device import loan_kernels, plan_kernels, signal_kernels, token_kernels
        from moeplan.runtime_client.device.activation_kernels import activate, activate_backward

        shape, answer, size, item = self.shape, self.mailbox.shape, self.group.size, self.dtype.itemsize
        ranks = {"RANKS": size, "LANES": lanes(size)}
        experts, columns = answer.experts, answer.experts + 2
        table = self.mailbox.table.numel()
        way = {"WIDTH": shape.hidden, "EACH": 16 // item}
        network = {"WIDTH": shape.width, "GATED": shape.gated, "NAME": shape.activation, **self._inner}
        owned, inner = {"OWNED": answer.owned, "ELEMENTS": shape.elements}, matrix_sizes(shape)[0]
        moved = {"EACH": way["EACH"], "ELEMENTS": shape.elements}
        loans = {"LENT": LENT, "LOANS": answer.loans}
        piece = {"PIECE": self._piece}
        rounds = {"AWAY": self.rounds * self.span, "SPAN": self.span}

        def meet_for_loans(replicas: int) -> Launch:
            return Launch(signal_kernels.meet_for_loans, 1, **ranks, MOST=MOST, REPLICAS=replicas)

        def hand_out(again: bool) -> Launch:
            return Launch(
                token_kernels.hand_out, 8, CHOICES=self.choices, TOKENS=self.max_tokens, **way, ROWS=self.rows,
                SPAN=self.span, AGAIN=again, FULLEST=FULLEST, **self._wide,
            )  # fmt: skip

        def fetch(others: bool) -> Launch:
            return Launch(
                loan_kernels.fetch, 4, **moved, BORROWED=BORROWED, SHARED=answer.shared, SHARERS=answer.sharers,
                OWNERS=answer.owners, OTHERS=others, **piece,
            )  # fmt: skip

        def arrange(backward: bool) -> Launch:
            return Launch(
                token_kernels.arrange, 8, CHOICES=self.choices, GROUP_TOKENS=self.group_tokens, JOINED=self.joined,
                **rounds, WIDTH=shape.hidden, BACKWARD=backward, **self._wide, ENDS=answer.home_ends,
                FILLS=answer.fills, OWNED=answer.owned, REPLICAS=answer.owned + answer.spare,
            )  # fmt: skip

        def give_back(backward: bool) -> Launch:
            return Launch(
                token_kernels.give_back, 8, CHOICES=self.choices, TOKENS=self.max_tokens,
                GROUP_TOKENS=self.group_tokens, JOINED=self.joined, **rounds, **way, BACKWARD=backward, **self._wide,
            )  # fmt: skip

        return SimpleNamespace(
            meet=Launch(signal_kernels.meet, 1, **ranks),
            pause=meet_for_loans(_NEVER),
            meet_for_loans=meet_for_loans(1),
            meet_borrowers=meet_for_loans(2),
            count=Launch(plan_kernels.count, 4, EXPERTS=experts, COLUMNS=columns, CHUNK=_CHUNK, BLOCK=32),
            total=Launch(
                plan_kernels.total, 4, RANKS=size, COLUMNS=columns, ROW=self.mailbox.columns, TOLD=TOLD, BLOCK=16,
                CHUNKS=256,
            ),
            plan=Launch(
                plan_kernels.plan, 1, **ranks, TABLE=table, ANSWER=answer.words, REQUEST=REQUEST, LAYER=LAYER,
                ANSWERED=ANSWERED, ABORTED=ABORTED, BLOCK=4096,
            ),
            place=Launch(
                plan_kernels.place, 4, RANKS=size, PAIRS=self.pairs, ROWS=self.rows, EXPERTS=experts, COLUMNS=columns,
                CHUNK=_CHUNK, FIRST=answer.first, BEGIN=answer.begin, TARGET=answer.target, BLOCK=512,
            ),
            convert=Launch(loan_kernels.convert, 8, **owned, BEGIN=0, END=inner, PIECE=_MOVED),
            convert_rest=Launch(loan_kernels.convert, 4, **owned, BEGIN=inner, END=shape.elements, PIECE=_MOVED),
            hand_out=hand_out(again=False),
            hand_again=hand_out(again=True),
            offer=Launch(loan_kernels.offer, 4, ELEMENTS=shape.elements, **loans, **piece),
            fetch=fetch(others=False),
            fetch_others=fetch(others=True),
            arrange=arrange(backward=False),
            arrange_again=arrange(backward=True),
            take_back=Launch(loan_kernels.take_back, 4, **moved, **loans, **piece),
            give_back=give_back(backward=False),
            give_gradients=give_back(backward=True),
            collect=Launch(
                token_kernels.collect, 8, CHOICES=self.choices, ROWS=self.rows, **rounds, WIDTH=shape.hidden,
                ABORTED=ABORTED, **self._narrow,
            ),
            activate=Launch(activate, 4, **network),
            activate_backward=Launch(activate_backward, 4, **network),
        )  # fmt: skip


def _require_homes(options: SpillOptions, ranks: int) -> None:
    if len(set(options.home.tolist())) < ranks:
        raise ValueError("options.home: every rank must own an expert")
    if len(set(options.spare.tolist())) > 1:
        raise ValueError("options.spare: every rank must have as many spare slots")
    if options.domain.any():
        raise ValueError("options.domain: all ranks must be of one link domain; leave `exchange` out")


def _most_owned(options: SpillOptions) -> int:
    """Most experts that a rank owns."""
    return int(np.bincount(options.home).max())


def _require_slots(layouts: SlotsOfLayouts, ranks: int) -> None:
    if layouts.experts < 1:
        raise ValueError(f"experts = {layouts.experts}: must be at least 1")
    if not 1 <= layouts.slots <= layouts.experts or layouts.slots * ranks < layouts.experts:
        least, most = -(-layouts.experts // ranks), layouts.experts
        raise ValueError(f"slots = {layouts.slots}: must be {least} to {most} for {most} experts on {ranks} ranks")


def _tile(width: int, elements: int) -> dict[str, int]:
    """Rows and columns that a block moves at a time."""
    columns = min(power_of_2(width), 1024)
    return {"BLOCK": max(elements // columns, 1), "COLUMNS": columns}
