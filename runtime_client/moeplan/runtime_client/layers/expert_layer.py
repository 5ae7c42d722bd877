"""What fully sharded and resident experts have in common: how they are called, moved, copied and saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from moeplan.runtime_client.group import ExpertGroup, Traffic
from moeplan.runtime_client.layers.feed_forward import ExpertShape

__all__ = ["ExpertLayer"]


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

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {self.shape}, rank={self.group.rank}/{self.group.size}"
