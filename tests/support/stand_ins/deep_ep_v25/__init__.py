"""What sgl-deep-ep-v25 0.1.0rc0 says that its buffers do, by plain collectives: for tests without wheel and GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64


class BufferAllocator:
    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)


class Event:
    def current_stream_wait(self) -> None:
        pass


@dataclass
class EPHandle:
    topk_idx: Tensor
    num_experts: int
    tokens: list[Tensor]
    """Of every source, those that came here."""


class EPBuffer:
    def __init__(self, group: dist.ProcessGroup, **options: Any) -> None:
        assert set(options) == {"num_max_tokens_per_rank", "hidden", "num_topk", "lb_allocation_plan_or_num_bytes"}
        assert isinstance(options["lb_allocation_plan_or_num_bytes"], BufferAllocator)
        self.rank, self.size = group.rank(), group.size()

    def _everyone(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value)
        return every

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        num_experts: int | None = None,
        handle: EPHandle | None = None,
    ) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16 and x.is_contiguous()  # noqa: PT018
        sent = self._everyone((x, topk_idx if handle is None else handle.topk_idx, topk_weights))
        assert num_experts is not None or handle is not None
        width = (num_experts or (handle.num_experts if handle else 0)) // self.size
        here = [idx // width == self.rank for _, idx, _ in sent]
        tokens = [mine.any(dim=1).nonzero().flatten() for mine in here]
        rows = torch.cat([x[rows] for (x, _, _), rows in zip(sent, tokens, strict=True)])
        if handle is not None:
            return rows, None, None, handle, Event()
        assert topk_idx is not None and topk_idx.dtype == topk_idx_t  # noqa: PT018
        slot = torch.cat([torch.where(m, i % width, -1)[t] for (_, i, _), m, t in zip(sent, here, tokens, strict=True)])
        weight = torch.cat([torch.where(m, w, 0)[t] for (_, _, w), m, t in zip(sent, here, tokens, strict=True)])
        return rows, slot, weight, EPHandle(topk_idx, width * self.size, tokens), Event()

    def combine(self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16 and x.is_contiguous()  # noqa: PT018
        sizes = [len(tokens) for tokens in handle.tokens]
        back = self._everyone(
            [
                (tokens, rows, None if topk_weights is None else weights)
                for tokens, rows, weights in zip(
                    handle.tokens,
                    x.split(sizes),
                    (x if topk_weights is None else topk_weights).split(sizes),
                    strict=True,
                )
            ]
        )
        combined = torch.zeros(len(handle.topk_idx), x.shape[1])
        weight = torch.zeros(handle.topk_idx.shape)
        for tokens, rows, weights in (mine[self.rank] for mine in back):
            combined[tokens] += rows.float()
            if weights is not None:
                weight[tokens] += weights
        return combined.bfloat16(), None if topk_weights is None else weight, Event()

    def lb_prefetch_weights(self, redundant: Tensor, own: Tensor, mapping: Tensor) -> Event:
        assert mapping.dtype == torch.int32
        every = torch.cat(self._everyone(own))
        for slot, expert in enumerate(mapping[self.rank].tolist()):
            if expert >= 0:
                redundant[slot] = every[expert]
        return Event()

    def lb_reduce_grads(self, redundant: Tensor, own: Tensor, mapping: Tensor) -> Event:
        assert redundant.dtype == own.dtype == torch.float32
        for gradients, table in zip(self._everyone(redundant), mapping.tolist(), strict=True):
            for gradient, expert in zip(gradients, table, strict=True):
                if expert >= 0 and expert // len(own) == self.rank:
                    own[expert % len(own)] += gradient
        return Event()
