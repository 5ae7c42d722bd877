"""The router of BASE layers: tokens to experts in equal numbers while training, each to its best expert otherwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from moeplan.runtime_client.errors import RouterError
from moeplan.runtime_client.group import ExpertGroup, Traffic
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.routing.balanced_assignment import Assignment, balanced_assignment

__all__ = ["BaseRouter"]

Assign = Callable[[np.ndarray], Assignment]


class BaseRouter(nn.Module):
    """Chooses one expert for each token (Lewis et al., *BASE Layers*, ICML 2021, arXiv 2103.16716).

    A token's affinity to an expert is the product of its hidden state with the expert's centroid. While training,
    tokens are assigned so that the sum of affinities is largest among the assignments with equal counts; in evaluation
    every token takes the expert that it likes best. With ``index, weight = router(hidden)`` the layer is

        experts(hidden, index, weight) + (1 - weight) * hidden

    where `weight` is the sigmoid of the affinity, through which centroids learn.

    Tokens of one rank belong together (they come from few texts), so each rank assigns a random sample of all ranks'
    tokens. As in the paper the ranks exchange tokens for that, but only their affinities and the answers travel.

    The assignment depends only on the tokens and on torch's random state, so activation checkpointing repeats it. It
    runs on the host.

    Args:
        hidden: Width of a token.
        experts: Number of experts.
        group: The ranks; also a group of one. All ranks hold the same centroids.
        assign: `balanced_assignment`, or `optimal_assignment` for the exact optimum in cubic time.
        dtype: Type of the centroids.
        device: Device of the centroids.

    Attributes:
        centroids: Parameter [experts, hidden].
        traffic: Bytes sent to other ranks since the counter was last cleared, under ``affinities``.
    """

    def __init__(
        self,
        hidden: int,
        experts: int,
        group: ExpertGroup,
        *,
        assign: Assign = balanced_assignment,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.assign = assign
        self.traffic = Traffic()
        self.centroids = nn.Parameter(torch.empty(experts, hidden, dtype=dtype, device=device))
        nn.init.orthogonal_(self.centroids, gain=0.1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Choose an expert for each token. While training, every rank calls it at the same time, also without tokens.

        Args:
            hidden: [..., hidden], tokens of this rank.

        Returns:
            index int64[tokens, 1] and weight [tokens, 1]. While training, the experts' counts over all ranks differ
            by at most the number of ranks.

        Raises:
            RouterError: an affinity is not finite; raised on all ranks while training.
        """
        affinity = functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.centroids)
        with torch.no_grad():
            index = self._balanced(affinity) if self.training else affinity.argmax(dim=1)
        index = index.unsqueeze(1)
        return index, torch.sigmoid(affinity.gather(1, index))

    def _balanced(self, affinity: Tensor) -> Tensor:
        group, device = self.group, affinity.device
        broken = (~torch.isfinite(affinity)).sum()
        told = torch.stack([torch.full_like(broken, len(affinity)), broken])
        table: Int64 = group.gather_rows(told).cpu().numpy()
        for rank, number in enumerate(table[:, 1]):
            if number:
                raise RouterError(
                    f"affinities of rank {rank}: {number} are not finite; the model has diverged or its input is wrong"
                )
        send = _parts(table[group.rank, 0], group)
        receive = [_parts(tokens, group)[group.rank] for tokens in table[:, 0]]
        order = torch.randperm(len(affinity)).to(device)  # of the host's generator, whose state checkpoints keep
        rows = affinity.float() if affinity.dtype != torch.float64 else affinity
        mine = group.exchange(rows[order], send, receive, traffic=self.traffic, purpose="affinities").wait()
        expert = torch.from_numpy(self.assign(mine.cpu().numpy()).expert).to(device, torch.int64)
        answers = group.exchange(expert, receive, send, traffic=self.traffic, purpose="affinities").wait()
        return torch.empty_like(answers).index_copy_(0, order, answers)

    def extra_repr(self) -> str:
        experts, hidden = self.centroids.shape
        return f"hidden={hidden}, experts={experts}, rank={self.group.rank}/{self.group.size}"


def _parts(tokens: int, group: ExpertGroup) -> list[int]:
    """Tokens that a rank with `tokens` sends to each rank: as equal as possible."""
    each, extra = divmod(int(tokens), group.size)
    return [each + (rank < extra) for rank in range(group.size)]
