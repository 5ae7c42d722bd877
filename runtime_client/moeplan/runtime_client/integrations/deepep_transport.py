"""DeepEP 2.5: autograd around its collectives, for passes that follow a plan's mapping; see `redundancy_mapping`.

Written from the source of sgl-deep-ep-v25 0.1.0rc0 (``deep_ep_v25/buffers/ep.py``), and not run with it: that needs
GPUs of one NVLink domain, NCCL 2.32.3 or newer and a torch of its own.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime_client.derivatives import once_differentiable
from moeplan.runtime_client.integrations.versions import require_version
from moeplan.solvers.problem.arrays import Int32, integers
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["SUPPORTED", "DeepEPTransport"]

SUPPORTED = ("0.1",)
"""Releases of sgl-deep-ep-v25, of which 0.1.0rc0 was read."""


class DeepEPTransport:
    """Tokens and lent weights of the ranks of one NVLink domain, for layers that run one after another.

    Every rank makes one and calls its functions at the same points. Of `dispatch` to `combine` there may be several
    under way; the loan of each pass is copied out of the memory that peers write to.

    Args:
        group: The ranks.
        owned: Experts at home on a rank.
        slots: Redundant slots of a rank, ``max(options.spare)``.
        elements: Of a flat expert, a multiple of 8.
        tokens: Most tokens of a rank.
        hidden: Width of a token.
        k: Choices of a token.

    Raises:
        UnsupportedVersionError: sgl-deep-ep-v25 is missing, or another release.
        ProblemError: `elements` is no multiple of 8, which is 16 bytes of bfloat16.
    """

    def __init__(
        self, group: dist.ProcessGroup, owned: int, slots: int, elements: int, *, tokens: int, hidden: int, k: int
    ) -> None:
        require_version("sgl-deep-ep-v25", SUPPORTED)
        if elements % 8:
            raise ProblemError("elements", elements, "must be a multiple of 8: the transport moves 16 bytes at a time")
        library: Any = importlib.import_module("deep_ep_v25")
        region = library.BufferAllocator()
        self._weights: Tensor = region.allocate((slots, elements), torch.bfloat16)
        self._gradients: Tensor = region.allocate((slots, elements), torch.float32)
        self._buffer = library.EPBuffer(
            group,
            num_max_tokens_per_rank=tokens,
            hidden=hidden,
            num_topk=k,
            lb_allocation_plan_or_num_bytes=region,
        )
        self._choice = library.topk_idx_t
        self._rank = group.rank()
        self._physical = group.size() * (owned + slots)

    def lend(self, own: Tensor, mapping: Int32) -> Tensor:
        """bfloat16[slots, elements]: the experts that a mapping lends to this rank, zeros in empty slots.

        Gradients go home in float32.

        Args:
            own: bfloat16[owned, elements], flat experts at home.
            mapping: int32[ranks, slots], as of `redundancy_mapping`.
        """
        checked = integers("mapping", mapping, ndim=2, low=-1, high=len(own) * len(mapping) - 1)
        if checked.shape[1] != len(self._weights):
            wanted = f"must be [ranks, {len(self._weights)}], the slots of the transport"
            raise ProblemError("mapping", f"array of shape {checked.shape}", wanted)
        table = torch.tensor(checked, dtype=torch.int32, device=own.device)
        lent: Tensor = _Lend.apply(own, table, self)  # type: ignore[no-untyped-call]
        return lent

    def dispatch(self, hidden: Tensor, physical: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Send tokens to the ranks of their physical experts, once to each.

        Args:
            hidden: bfloat16[tokens, hidden].
            physical: int64[tokens, k], ``rank * (owned + slots) + slot``, as of `physical_choices`.
            weight: float32[tokens, k].

        Returns:
            (rows, slot, weight, handle): bfloat16[received, hidden], int64[received, k] slots of this rank, -1 for
            choices of other ranks, float32[received, k], and what `combine` asks for.
        """
        given = hidden.contiguous(), physical.to(self._choice).contiguous(), weight.float().contiguous()
        sent: tuple[Tensor, Tensor, Tensor, Any] = _Dispatch.apply(*given, self)  # type: ignore[no-untyped-call]
        return sent

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """bfloat16[tokens, hidden], for each token the sum of what the ranks made of it.

        Args:
            rows: bfloat16[received, hidden], weighed.
            handle: Of the `dispatch` that they came by.
        """
        combined: Tensor = _Combine.apply(rows.contiguous(), handle, self)  # type: ignore[no-untyped-call]
        return combined


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, table: Tensor, transport: DeepEPTransport) -> Tensor:
        ctx.transport, ctx.shape, ctx.dtype = transport, own.shape, own.dtype
        ctx.save_for_backward(table)
        transport._buffer.lb_prefetch_weights(transport._weights, own.contiguous(), table).current_stream_wait()
        return transport._weights.where(table[transport._rank, :, None] >= 0, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        transport: DeepEPTransport = ctx.transport
        (table,) = ctx.saved_tensors
        transport._gradients.copy_(gradient)
        total = gradient.new_zeros(ctx.shape, dtype=torch.float32)  # what comes back is added to it
        transport._buffer.lb_reduce_grads(transport._gradients, total, table).current_stream_wait()
        return total.to(ctx.dtype), None, None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, physical: Tensor, weight: Tensor, transport: DeepEPTransport) -> Any:
        rows, slot, received, handle, _ = transport._buffer.dispatch(
            hidden, physical, weight, num_experts=transport._physical
        )
        ctx.transport, ctx.handle = transport, handle
        ctx.save_for_backward(slot)
        ctx.mark_non_differentiable(slot)
        return rows, slot, received, handle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_rows: Tensor, _: Any, to_weight: Tensor, __: Any) -> tuple[Any, ...]:
        (slot,) = ctx.saved_tensors
        here = to_weight.masked_fill(slot < 0, 0)
        hidden, weight, _ = ctx.transport._buffer.combine(to_rows.contiguous(), ctx.handle, topk_weights=here)
        return hidden, None, weight, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Any, transport: DeepEPTransport) -> Tensor:
        ctx.transport, ctx.handle = transport, handle
        combined: Tensor = transport._buffer.combine(rows, handle)[0]
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transport._buffer.dispatch(gradient.contiguous(), handle=ctx.handle)[0], None, None
