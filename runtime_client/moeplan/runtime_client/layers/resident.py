"""Resident experts: weights stay at home, and overloaded ranks lend them out for single micro-batches."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeplan.runtime_client.derivatives import once_differentiable
from moeplan.runtime_client.device.exchange import DeviceExchange
from moeplan.runtime_client.device.passes import run_pass
from moeplan.runtime_client.group import ExpertGroup, Traffic, Transfer, beside, join
from moeplan.runtime_client.layers.expert_layer import ExpertLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape, feed_forward
from moeplan.runtime_client.layers.lending import Homes, Loan, LoanBuffer, add_loan
from moeplan.runtime_client.layers.repeating import MadePasses
from moeplan.runtime_client.layers.routing import combine, dispatch, find_route, infers_shapes
from moeplan.runtime_client.layers.spilling import (
    MovableSpillPlanner,
    SpillPlanner,
    planner_fingerprint,
    require_movable,
    require_passes,
)
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.layout import Layout

__all__ = ["ResidentExperts"]


class ResidentExperts(ExpertLayer):
    """The experts of one MoE layer, each at home on one rank; it takes the place of a model's experts module.

    For every micro-batch the ranks plan from the known counts, each for itself and all alike, which tokens to spill to
    transient replicas. Their weights travel beside the tokens, and their gradients return home (least-loaded expert
    parallelism: LLEP, arXiv 2601.17111). Without spare slots this is plain expert parallelism.

    Args:
        shape: Dimensions of an expert.
        experts: Number of experts.
        group: The ranks.
        planner: Plans the spill, and says who owns which expert; by default no spare slots and contiguous homes.
        buffer: Memory for transient replicas; share one between layers that run one after another.
        exchange: Runs passes on GPUs without the host, with its own planner of the same homes instead of `planner` and
            its own memory instead of `buffer`; share one between layers that run one after another. Without it, passes
            use the collectives of the group.
        compute_dtype: Type that weights travel and compute in; by default that of autocast, or else of the parameter.
        dtype: Type of the parameter.
        device: Device of the parameter.

    Attributes:
        flat: Parameter [owned, elements], the flat experts of this rank, by row of `homes`.
        traffic: Bytes sent to other ranks since the counter was last cleared; passes of an `exchange` are not counted.
    """

    own: ClassVar[str] = "flat"

    def __init__(
        self,
        shape: ExpertShape,
        experts: int,
        group: ExpertGroup,
        *,
        planner: SpillPlanner | None = None,
        buffer: LoanBuffer | None = None,
        exchange: DeviceExchange | None = None,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, experts, group, compute_dtype)
        planner = planner or QuotaPlanner(SpillOptions.uniform(experts, group.size, 0), group.size)
        if planner.options.experts != experts:
            raise ValueError(f"planner.options.experts = {planner.options.experts}: the layer has {experts}")
        require_passes(planner, group.size)
        self.homes = Homes(planner.options.home, group)
        self.planner = planner
        self.buffer = buffer or LoanBuffer()
        self.exchange = exchange
        self._made: MadePasses[tuple[Homes, Loan]] = MadePasses()
        self._copies: weakref.WeakSet[ResidentExperts] = weakref.WeakSet()
        self._left: int | None = None
        if exchange is not None:
            exchange.require_homes(shape, planner.options.home, dtype or torch.get_default_dtype())
        self.flat = nn.Parameter(torch.zeros(len(self.homes.owned), shape.elements, dtype=dtype, device=device))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("layout", "plan", "split_rule"):  # as of sharded experts; torch would keep it, and nothing read it
            raise AttributeError(
                f"{self.title}: {name} = ...: resident experts stay at their homes, whatever a plan says. Write\n"
                "    moves = HomeMoves(layers, optimizer)\n"
                "    PlannerSession(address, job_id, moves.layouts, moves.take, slots=..., spill_slots=...)\n"
                "or make FullyShardedExperts"
            )
        super().__setattr__(name, value)

    @property
    def planner(self) -> SpillPlanner:
        """What lends in the passes that start from now on; not in those of an `exchange`."""
        return self._planner

    @planner.setter
    def planner(self, planner: SpillPlanner) -> None:
        require_passes(planner, self.group.size)
        if not np.array_equal(planner.options.home, self.homes.device):
            raise ValueError(
                f"{self.title}: planner.options.home differs from the homes that the experts have; write "
                "layer.planner = planner.with_home(layer.planner.options.home)"
            )
        self._planner = planner

    @property
    def _replays(self) -> bool:
        return self.exchange is not None

    @property
    def home_layout(self) -> Layout:
        """The homes as a layout of one replica per expert, in the order of the rows."""
        return Layout(self.homes.slots, self.experts)

    def rehome(self, homes: Homes) -> None:
        """Take other homes for the passes to come, once the weights are there: `HomeMoves` calls it on every rank.

        Raises:
            ValueError: passes run by a `DeviceExchange`, whose tables hold the homes of the start.
            TypeError: the planner is none whose homes move.
        """
        if self.exchange is not None:
            raise ValueError(
                f"{self.title}: its passes run by a DeviceExchange, which knows the homes of the start only; make the "
                "layer without exchange= to move homes"
            )
        require_movable(self.planner)
        self._planner = cast(MovableSpillPlanner, self.planner).with_home(homes.device.astype(np.int32))
        self.homes = homes
        self._left = None
        for copied in self._copies:
            left = not np.array_equal(copied.homes.device, homes.device)
            copied._left = copied.flat._version if left else None

    def require_copies(self) -> None:
        """Refuse copies that were changed since experts of this layer moved away from theirs, on every rank alike.

        Raises:
            RuntimeError: one was, as an average of weights is.
        """
        for copied in self._copies:
            copied._require_own_rows()

    def _require_own_rows(self) -> None:
        if self._left not in (None, self.flat._version):
            raise RuntimeError(
                f"{self.title}: a copy of it, as an average of weights, was changed after its experts had moved to "
                "other homes, so each of its rows has become a mixture of experts. Move both alike, and whole:\n"
                "    for each in (HomeMoves(layers, optimizer), HomeMoves(copied_layers)): each.take(plan); "
                "each.finish()"
            )

    def _take(self, first: int, flat: Tensor) -> list[int]:
        taken = {row: expert for row, expert in enumerate(self.homes.owned) if first <= expert < first + len(flat)}
        for row, expert in taken.items():
            self.flat[row] = flat[expert - first]
        self._left = None
        return list(taken)

    def read_experts(self, read: Callable[[int], Tensor]) -> None:
        for expert in self.homes.owned:
            self.load_experts(expert, read(expert))

    @torch.no_grad()
    def gather_experts(self, rank: int) -> Tensor | None:
        group, homes = self.group, self.homes
        here = group.rank == rank
        send = [len(homes.owned) * (other == rank) for other in range(group.size)]
        counts = np.bincount(homes.device, minlength=group.size)
        receive = [here * int(count) for count in counts]
        flat = self.flat.full_tensor() if isinstance(self.flat, DTensor) else self.flat
        got = group.exchange(flat.detach(), send, receive, weights=True, traffic=Traffic(), purpose="gathered").wait()
        return got[torch.from_numpy((np.cumsum(counts) - counts)[homes.device] + homes.row)] if here else None

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self._left = None

    def _run(self, rows: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if self._trains():
            self._left = None  # a model of its own from now on
        self._require_own_rows()
        if self.exchange is not None:
            if infers_shapes():
                weight = torch.zeros_like(weight)  # they were never written
            turn = self._turn(scale=self.scale)
            return run_pass(self.exchange, turn, [self._weights_of_pass(scaled=True)], rows, index, weight, dtype)
        group = self.group
        homes = self.homes
        means = homes.fingerprint ^ planner_fingerprint(self.planner)
        counts = self._gather_counts(index, weight, means)
        made = self._made.repeated(self.title, counts)
        if made is None:
            loan = Loan.of(self.planner.plan(counts).require_feasible(), homes, group.rank)
        else:
            at, loan = made
            self._require_at_home(at)
        lending = _Lending(self, loan, dtype) if loan.total else None
        home = self._weights_of_pass(scaled=False)
        if lending is not None:
            lending.start(self.flat, "weights.forward")
            home = _Land.apply(home, lending)  # type: ignore[no-untyped-call]
        route = find_route(loan.slots, loan.sent, loan.received, index)
        owned, width = len(homes.owned), homes.slots.shape[1]
        at_home, away = route.rows[:owned], route.rows[width : width + loan.borrowed]
        sizes = [sum(at_home)] if lending is None else [sum(at_home), sum(away)]
        arrived = dispatch(group, route, rows, self.traffic, sizes)

        own = home.to(dtype)
        if lending is not None:
            # Made before the experts at home run, so that its backward, which other ranks wait for, runs after theirs.
            lent: Tensor = _Lend.apply(home, lending)  # type: ignore[no-untyped-call]
        results = [feed_forward(self.shape, own, arrived[0], at_home)]
        if lending is not None:
            self.buffer.wait()
            spilled = feed_forward(self.shape, lent, arrived[1], away)
            if spilled.requires_grad:
                spilled = _Repeat.apply(spilled, lent, self.flat.detach(), lending)  # type: ignore[no-untyped-call]
            results.append(spilled)
        announce = None if lending is None else partial(lending.repeat, self.flat.detach())
        output = combine(group, route, results, weight, self.traffic, self.finish, announce)
        if output.requires_grad:
            output.register_hook(lambda _: self._require_at_home(homes))
            self._made.add(output, counts, means, (homes, loan))
        return output

    def _require_at_home(self, homes: Homes) -> None:
        """Raise, on every rank alike, if experts have moved since a pass whose backward this is.

        Raises:
            RuntimeError: they have.
        """
        if homes is not self.homes:
            raise RuntimeError(
                f"{self.title}: its experts have moved to other homes since the forward pass of this backward. Call "
                "HomeMoves.step() once all backward passes of a step are over"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have made no passes."""
        return super().__getstate__() | {
            "_made": MadePasses(),
            "_copies": weakref.WeakSet(),
            "_left": None,
            "original": weakref.ref(self),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        original = state.pop("original")()
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        original._copies.add(self)


class _Lending:
    """The loan of one pass, and its repetition for the backward pass."""

    def __init__(self, layer: ResidentExperts, loan: Loan, dtype: torch.dtype) -> None:
        self.layer = layer
        self.loan = loan
        self.contents = object()  # not the layer, which holds the buffer: process groups would live until a collection
        self.returning: Transfer | None = None
        self.into = layer.buffer.view(loan.borrowed, layer.flat, dtype)

    def start(self, flat: Tensor, purpose: str) -> None:
        layer = self.layer
        layer.buffer.lend(self.loan, flat, self.into, layer.group, layer.traffic, purpose, contents=self.contents)

    def repeat(self, flat: Tensor) -> None:
        """Start the transfer again, beside the gradients of the tokens, unless it is still the last one."""
        if self.layer.buffer.contents is not self.contents:
            self.start(flat, "weights.backward")


class _Land(torch.autograd.Function):
    """Identity on the weights at home; its backward adds the gradients that have come back from loans.

    A node apart from `_Lend`, made before the dispatch, so that its backward runs last, and the gradients of weights
    travel beside those of tokens.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, lending: _Lending) -> Tensor:
        ctx.lending = lending
        ctx.save_for_backward(flat)  # so that weights that change between forward and backward are an error
        return flat.view_as(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        lending: _Lending = ctx.lending
        _ = ctx.saved_tensors
        assert lending.returning is not None, "_Lend.backward has run"
        with beside(gradient.device):
            # In place: the gradient comes from the experts at home, which made it for nobody else.
            add_loan(gradient, lending.returning.wait(), lending.loan)
        join(gradient.device)
        lending.returning = None
        return gradient, None


class _Lend(torch.autograd.Function):
    """The buffer of transient replicas, which may still be on their way; its backward sends their gradients home."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, lending: _Lending) -> Tensor:
        ctx.lending = lending
        # `data`: autograd need not know that the buffer is written again, as a backward pass finds its own loan in it.
        return lending.into.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        lending: _Lending = ctx.lending
        layer, loan = lending.layer, lending.loan
        with beside(gradient.device):
            lending.returning = layer.group.exchange(
                gradient, loan.take, loan.give, weights=True, traffic=layer.traffic, purpose="gradients"
            )
        return None, None  # it is still travelling; _Land adds it


class _Repeat(torch.autograd.Function):
    """Identity on the results of transient replicas; before their backward, it has their weights in the buffer."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, lent: Tensor, flat: Tensor, lending: _Lending) -> Tensor:
        ctx.lending = lending
        # So that a checkpoint recomputes the pass before the loan is repeated: both use the buffer.
        ctx.save_for_backward(lent, flat)
        return results.view_as(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        _, flat = ctx.saved_tensors
        ctx.lending.repeat(flat)
        ctx.lending.layer.buffer.wait()
        return gradient, None, None, None
