"""What fully sharded and resident experts have in common: how they are called, moved, copied and saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moeplan.runtime_client.group import ExpertGroup, Traffic
from moeplan.runtime_client.layers.feed_forward import ExpertShape, join_weights, split_weights

__all__ = ["ExpertLayer", "state_in_parts"]

_IN_PARTS = ContextVar("in_parts", default=False)


@contextmanager
def state_in_parts() -> Iterator[None]:
    """Within it, the state of a layer is its parameter: what this rank holds, under the parameter's own name."""
    token = _IN_PARTS.set(True)
    try:
        yield
    finally:
        _IN_PARTS.reset(token)


class ExpertLayer(nn.Module, ABC):
    """The experts of one MoE layer on the ranks of a group; `FullyShardedExperts` and `ResidentExperts` are its kinds.

    Attributes:
        shape: Dimensions of an expert.
        experts: Number of experts.
        group: The ranks.
        compute_dtype: Type that weights travel and compute in; that of the parameter by default.
        traffic: Bytes sent to other ranks since the counter was last cleared.
    """

    own: ClassVar[str]
    """Name of the only parameter, this rank's part of the experts."""

    def __init__(self, shape: ExpertShape, experts: int, group: ExpertGroup, compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.shape = shape
        self.experts = experts
        self.group = group
        self.compute_dtype = compute_dtype
        self.traffic = Traffic()

    @property
    def weights(self) -> nn.Parameter:
        """This rank's part of the experts."""
        return self.get_parameter(self.own)

    @property
    def whole_names(self) -> tuple[str, str]:
        """Names of the weights as a fused experts module holds them, [experts, rows, columns] each."""
        return "gate_up_proj" if self.shape.gated else "up_proj", "down_proj"

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Apply to each token its experts, weighted and summed.

        Every rank of the group calls it at the same time, also with no tokens.

        Args:
            hidden: [tokens, hidden] of this rank (leading dimensions are flattened).
            index: int64[tokens, k], experts of each token.
            weight: [tokens, k].

        Returns:
            As `hidden`.

        Raises:
            RouterError: a choice is out of range or a weight not finite, on any rank.
            LayoutMismatchError: the ranks hold different layouts.
            InfeasibleError: no plan keeps every rank within its token cap; raised on all ranks.
            RuntimeError: the weights are on the meta device.
        """
        if self.weights.is_meta:
            raise RuntimeError(
                f"{type(self).__name__}: its weights are on the meta device; call model.to_empty(device=...), "
                "then load a checkpoint"
            )
        rows = hidden.reshape(-1, hidden.shape[-1])
        index, weight = index.reshape(len(rows), index.shape[-1]), weight.reshape(len(rows), weight.shape[-1])
        return self._run(rows, index, weight).view_as(hidden)

    @abstractmethod
    def _run(self, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """`forward` of rows [tokens, hidden]."""

    @abstractmethod
    def load_experts(self, first: int, flat: Tensor) -> None:
        """Take over whole experts, of which every rank holds the same copy.

        Args:
            first: The first expert given.
            flat: [n, elements], experts ``first`` to ``first + n - 1`` in flat form.
        """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if _IN_PARTS.get():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        if self.group.size > 1:
            raise RuntimeError(
                f"{prefix.rstrip('.')}: each of {self.group.size} ranks holds a part of the experts, so a state_dict() "
                "saved by one of them would lose the others'. Save instead, on every rank, with "
                "torch.distributed.checkpoint as dcp:\n"
                '    dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)'
            )
        flat = self.weights if keep_vars else self.weights.detach()
        for name, part in zip(self.whole_names, split_weights(self.shape, flat), strict=True):
            destination[prefix + name] = part

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if _IN_PARTS.get():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        names = [prefix + name for name in self.whole_names]
        unexpected_keys += [key for key in state_dict if strict and key.startswith(prefix) and key not in names]
        missing_keys += [name for name in names if strict and name not in state_dict]
        if not all(name in state_dict for name in names):
            return
        rows, columns = (self.shape.inner_rows, self.shape.hidden), (self.shape.hidden, self.shape.width)
        for name, matrix in zip(names, (rows, columns), strict=True):
            if tuple(state_dict[name].shape) != (self.experts, *matrix):
                error_msgs.append(
                    f"size mismatch for {name}: {tuple(state_dict[name].shape)}, must be {(self.experts, *matrix)}"
                )
                return
        for expert in range(self.experts):  # one by one: never two copies of a layer
            self.load_experts(expert, join_weights(*(state_dict[name][expert, None].detach() for name in names)))

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {self.shape}, rank={self.group.rank}/{self.group.size}"
