"""Homes that move: resident experts change their owners between steps, with gradients and optimizer state."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from moeplan.runtime_client.errors import RanksDifferError
from moeplan.runtime_client.group import Transfer
from moeplan.runtime_client.layers.dividing import PlannedLayer
from moeplan.runtime_client.layers.fingerprints import fingerprint
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.spilling import require_speed
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.scalars import instance

__all__ = ["HomeMoves"]

Pair = tuple[int, int]
"""Two experts of a layer that change places."""


class HomeMoves(Stateful):
    """Moves resident experts to the homes of a plan, a slice between any two steps.

        moves = HomeMoves(layers, optimizer)
        with PlannerSession(address, job, moves.layouts, moves.take, slots=..., spill_slots=2) as session:
            for batch in data:
                train(batch)
                session.step(recorder.step())
                moves.step()

    Two experts change places between two steps or not at all, each with its weights, its gradient and what the
    optimizer keeps of it. So every expert has one owner at any time, homes half-way are homes like any others, and
    nothing waits for the planner once ranks have agreed on a plan. All ranks make the same slices: as many exchanges as
    a `share` of a step allows, by the times that they tell each other, but at least one.

    A checkpoint of it holds the homes in force. ``dcp.load({"homes": moves})`` moves the experts there, if there are as
    many ranks; checkpoints of `TrainingState` suit any homes.

    Args:
        layers: The resident layers of one group, in the order of the plans.
        optimizers: All that train them.
        share: Part of a step's time that a slice should take at most.

    Attributes:
        version: Plans taken, also before a checkpoint that was loaded.

    Raises:
        ValueError: there are no layers, they are no `ResidentExperts` or of different groups, their passes run by a
            `DeviceExchange`, or one of `optimizers` is none.
    """

    def __init__(self, layers: Sequence[ResidentExperts], *optimizers: Optimizer, share: float = 0.02) -> None:
        self._layers = list(layers)
        if not self._layers:
            raise ProblemError("layers", "none", "must be the resident layers of a model")
        for index, layer in enumerate(self._layers):
            instance(f"layers[{index}]", layer, ResidentExperts, "HomeMoves(layers, optimizer)")
        for index, optimizer in enumerate(optimizers):
            instance(f"optimizers[{index}]", optimizer, Optimizer, "HomeMoves(layers, optimizer, another)")
        self._group = self._layers[0].group
        for layer in self._layers:
            if layer.group is not self._group:
                raise ValueError(f"{layer.title}: is of another group than {self._layers[0].title}")
            layer.rehome(layer.homes)  # refuses what cannot
        self._optimizers = optimizers
        stepped = self._stepped = weakref.WeakSet[Optimizer]()
        hook = register_optimizer_step_post_hook(lambda optimizer, *_: stepped.add(optimizer))
        weakref.finalize(self, hook.remove)
        this = weakref.ref(self)
        for optimizer in optimizers:
            for added in (
                optimizer.register_state_dict_post_hook(lambda _, state: _note_homes(this(), state)),
                optimizer.register_load_state_dict_pre_hook(lambda _, state: _require_noted(this(), state)),
            ):
                weakref.finalize(self, added.remove)
        self._share = share
        self._goal = [layer.homes.device for layer in self._layers]
        # Of the last slice: when it ended, what an exchange took, and what the step before it took; 0 if not known.
        self._ended = self._exchange_s = self._step_s = 0.0
        self.version = 0

    @property
    def layouts(self) -> list[Layout]:
        """The homes in force as layouts of one replica per expert, for a `PlannerSession`."""
        return [layer.home_layout for layer in self._layers]

    @property
    def moving(self) -> int:
        """Experts that are not at home yet where the plan has them."""
        homes = (layer.homes.device for layer in self._layers)
        return sum(int(np.count_nonzero(device != goal)) for device, goal in zip(homes, self._goal, strict=True))

    def take(self, plan: Sequence[PlannedLayer]) -> None:
        """Move to other homes from the next `step` on; every rank calls it between the same two steps.

        Args:
            plan: A layout of one replica per expert for each layer, as a session brings them.

        Raises:
            ValueError: an expert has several replicas, a rank would own another number of experts than it does, the
                plan is for other speeds than those by which the layer's planner lends, or other expert groups hold the
                same experts.
        """
        goal = []
        for layer, planned in zip(self._layers, plan, strict=True):
            _require_one_group(layer)
            hosts = planned.layout.hosts
            if len(hosts.device) != layer.experts:
                raise ValueError(
                    f"{layer.title}: the plan has {len(hosts.device)} replicas of {layer.experts} experts, and homes "
                    "are one each; create the job with spill_slots="
                )
            require_speed(layer.planner, planned.division.cluster)
            goal.append(hosts.device.astype(np.int64))
            self._require_room(layer, goal[-1])
        self._goal = goal
        self.version += 1

    def step(self) -> int:
        """Move a slice; every rank calls it between the same two steps, without a pass under way.

        Returns:
            Experts moved.

        Raises:
            RanksDifferError: optimizers differ between ranks in what is not of single experts.
            ValueError: an optimizer keeps a tensor of the experts that has not the shape of their parameter, or keeps
                any and is not one of `optimizers`.
            RuntimeError: a copy of a layer, as an average of weights, was changed after earlier moves, which it has not
                made.
        """
        if not self.moving:
            self._ended = 0.0
            return 0
        allowed = self._allowed()  # waits for the work of the device, so that what follows is timed alone
        begin = time.perf_counter()
        moved = self._slice(allowed)
        if self._layers[0].flat.is_cuda:
            torch.cuda.synchronize(self._layers[0].flat.device)
        end = time.perf_counter()
        self._step_s = begin - self._ended if self._ended else 0.0
        self._exchange_s = (end - begin) / (moved / 2)
        self._ended = end
        return moved

    def finish(self) -> None:
        """Move all that is left; every rank calls it."""
        self._require_alike()
        while self.moving:
            self._slice(self.moving)

    def state_dict(self) -> dict[str, Any]:
        """``version``, ``ranks``, and ``homes`` int64[layers, experts], as tensors."""
        homes = torch.from_numpy(np.stack([layer.homes.device for layer in self._layers]))
        return {"version": torch.tensor(self.version), "ranks": torch.tensor(self._group.size), "homes": homes}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Move experts to homes that were saved, if they were homes on as many ranks; every rank calls it."""
        self.version = int(state_dict["version"])
        self._goal = [layer.homes.device for layer in self._layers]
        if int(state_dict["ranks"]) == self._group.size:
            self._goal = list(state_dict["homes"].numpy().copy())
            for layer, goal in zip(self._layers, self._goal, strict=True):
                self._require_room(layer, goal)
            self.finish()

    def _require_room(self, layer: ResidentExperts, goal: Int64) -> None:
        held, given = (np.bincount(device, minlength=self._group.size) for device in (layer.homes.device, goal))
        for rank in np.flatnonzero(held != given):
            raise ValueError(
                f"{layer.title}: the plan gives rank {rank} {given[rank]} experts, and it owns {held[rank]}; homes "
                "change by exchange, so every rank keeps as many"
            )

    def _allowed(self) -> int:
        """Exchanges of the next slice, the same on every rank."""
        told = self._require_alike()
        shortest, longest = int(told[:, 0].min()), int(told[:, 1].max())
        return max(1, int(self._share * shortest / longest)) if longest else 1

    def _require_alike(self) -> Int64:
        """int64[ranks, 3]: of each rank, nanoseconds of a step and of an exchange, and what moves with the weights."""
        self._require_all_optimizers()
        for layer in self._layers:
            layer.require_copies()
        row = [int(self._step_s * 1e9), int(self._exchange_s * 1e9), self._fingerprint()]
        device = self._layers[0].flat.device
        told: Int64 = self._group.gather_rows(torch.tensor(row, device=device), "homes that move").cpu().numpy()
        if (told[:, 2] != told[0, 2]).any():
            ranks = np.flatnonzero(told[:, 2] != told[0, 2]).tolist()
            raise RanksDifferError(
                f"ranks {ranks} differ from rank 0 in the optimizer of their experts, or in whether these have "
                "gradients; give HomeMoves the same optimizers on all ranks, and step them alike"
            )
        return told

    def _require_all_optimizers(self) -> None:
        given = {
            id(part) for optimizer in self._optimizers for group in optimizer.param_groups for part in group["params"]
        }
        for layer in self._layers if given else ():
            if layer.flat.requires_grad and not layer.replicated and id(layer.flat) not in given:
                kinds = ", ".join(type(optimizer).__name__ for optimizer in self._optimizers)
                raise ValueError(
                    f"{layer.title}: {kinds} does not train it, but copies of it, perhaps, which would stay where "
                    "experts leave. Give HomeMoves optimizers of the layers' own parameters, or keep homes as they are"
                )
        for optimizer in self._stepped:
            if any(optimizer.state is given.state for given in self._optimizers):  # wrappers share it
                continue
            for layer in self._layers:
                kept = optimizer.state.get(layer.flat, {}).values()
                if any(isinstance(value, Tensor) and value.ndim for value in kept):
                    raise ValueError(
                        f"{layer.title}: {type(optimizer).__name__} trains it, and HomeMoves was not given it, so what "
                        "it keeps would stay where experts leave. Write HomeMoves(layers, optimizer), with all "
                        "optimizers of the experts"
                    )

    def _fingerprint(self) -> int:
        """Equal on ranks whose parameters move with the same tensors, and whose other optimizer state is equal."""
        told = []
        for layer in self._layers:
            told.append(f"{layer.flat.grad is not None} {layer.loaded is not None}")
            for key, value in self._states(layer):
                if isinstance(value, Tensor) and value.shape == layer.flat.shape:
                    told.append(f"{key} of {value.dtype}")
                else:
                    told.append(f"{key} = {_plain(layer, key, value)}")
        return fingerprint("\n".join(told).encode())

    def _states(self, layer: ResidentExperts) -> Iterator[tuple[str, Any]]:
        for number, optimizer in enumerate(self._optimizers):
            for key, value in sorted(optimizer.state.get(layer.flat, {}).items()):
                yield f"{number}.{key}", value

    def _slice(self, most: int) -> int:
        """Exchange up to `most` pairs; the number of experts that moved."""
        moved = 0
        for layer, goal in zip(self._layers, self._goal, strict=True):
            pairs = list(islice(_exchanges(layer.homes.device, goal), most - moved // 2))
            if pairs:
                self._exchange(layer, pairs)
                moved += 2 * len(pairs)
        return moved

    @torch.no_grad()
    def _exchange(self, layer: ResidentExperts, pairs: Sequence[Pair]) -> None:
        _require_one_group(layer)
        homes, rank = layer.homes, self._group.rank
        # By rank, then by pair: the same order on both ends.
        leaving = sorted(
            (int(homes.device[there]), number, int(homes.row[here]))
            for number, pair in enumerate(pairs)
            for here, there in (pair, pair[::-1])
            if homes.device[here] == rank
        )
        give = np.bincount([peer for peer, _, _ in leaving], minlength=self._group.size).tolist()
        rows = torch.tensor([row for _, _, row in leaving], dtype=torch.int64, device=layer.flat.device)
        under_way: list[tuple[Tensor, Transfer]] = []
        for tensor in self._tensors(layer):
            at = rows.to(tensor.device)
            transfer = self._group.exchange(
                tensor.index_select(0, at).to(rows.device),
                give,
                give,
                weights=True,
                traffic=layer.traffic,
                purpose="homes",
            )
            under_way.append((tensor, transfer))
        for tensor, transfer in under_way:
            tensor.index_copy_(0, rows.to(tensor.device), transfer.wait().to(tensor.device))
        layer.rehome(homes.exchanged(pairs))

    def _tensors(self, layer: ResidentExperts) -> Iterator[Tensor]:
        """Tensors that move with the experts, a row each."""
        yield layer.flat
        if layer.flat.grad is not None:
            yield layer.flat.grad
        for _, value in self._states(layer):
            if isinstance(value, Tensor) and value.shape == layer.flat.shape:
                yield value
        if layer.loaded is not None:
            yield layer.loaded


def _note_homes(moves: HomeMoves | None, state: dict[str, Any]) -> None:
    """Write the homes of experts into an optimizer's state, which has a row of each expert."""
    if moves is not None:
        state["homes"] = state.get("homes", {}) | {layer.title: layer.homes.device.tolist() for layer in moves._layers}


def _require_noted(moves: HomeMoves | None, state: dict[str, Any]) -> None:
    """Refuse an optimizer's state that was kept while experts had other homes, on every rank alike.

    Raises:
        ValueError: it was.
    """
    noted = state.get("homes", {})
    for layer in () if moves is None else moves._layers:
        homes = layer.homes.device.tolist()
        if noted.get(layer.title, homes) != homes:
            raise ValueError(
                f"{layer.title}: this state of an optimizer was kept while its experts had other homes, so each row "
                "would be taken for another expert's. Keep and load\n"
                '    {"training": TrainingState(model, optimizer), "homes": moves}\n'
                "by torch.distributed.checkpoint"
            )


def _require_one_group(layer: ResidentExperts) -> None:
    """Refuse experts of which other expert groups hold the same, row by row, and with homes of their own.

    Raises:
        ValueError: there are other groups.
    """
    if layer.replicated:
        raise ValueError(
            f"{layer.title}: other expert groups hold the same experts, and homes of each group would move apart from "
            "theirs. Make one group of all ranks, ExpertGroup.create(), or leave the homes where they are"
        )


def _plain(layer: ResidentExperts, key: str, value: object) -> object:
    """State that an optimizer keeps of a parameter as a whole."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{layer.title}: the optimizer's {key} of it is {tuple(value.shape)}, and the parameter "
            f"{tuple(layer.flat.shape)}; which of its numbers belongs to which expert is unknown. Train experts whose "
            "homes move with an optimizer whose state has the shape of the parameter, as that of AdamW or SGD"
        )
    return value.item() if isinstance(value, Tensor) else value


def _exchanges(device: Int64, goal: Int64) -> Iterator[Pair]:
    """Pairs that change places on the way from homes to others, each expert in one at most; the same on every rank.

    Each brings one expert where it belongs, and both where that is possible.
    """
    taken = np.zeros(len(device), np.bool_)
    for expert in np.flatnonzero(device != goal).tolist():
        if taken[expert]:
            continue
        there = np.flatnonzero((device == goal[expert]) & (goal != device) & ~taken)
        if not len(there):
            continue
        both = there[goal[there] == device[expert]]
        other = int(both[0] if len(both) else there[0])
        taken[[expert, other]] = True
        yield expert, other
