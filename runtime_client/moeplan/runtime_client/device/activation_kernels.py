"""Triton kernels of activations between the two products of an expert, and of their backward."""

from __future__ import annotations

import triton.language as tl

from moeplan.runtime_client.device.programs import program

__all__ = ["activate", "activate_backward"]


@program()
def activation(x: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """The activation of float32 values."""
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = tl.maximum(x, 0.0)
    return y


@program()
def slope(x: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """The derivative of `activation`."""
    if NAME == "silu":
        gate = tl.sigmoid(x)
        y = gate * (1.0 + x * (1.0 - gate))
    elif NAME == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        y = (x > 0.0).to(tl.float32)
    return y


@program("end")
def activate(
    product: tl.tensor,
    out: tl.tensor,
    end: tl.tensor,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """``act(gate) * up`` of the rows before `end`, or ``act(up)``.

    Args:
        product: [rows, WIDTH or 2 * WIDTH], gate before up.
        out: [rows, WIDTH], out.
        end: int32, number of rows.
    """
    rows = tl.load(end)
    for start in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        for left in range(0, WIDTH, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
            if GATED:
                at = product + row[:, None] * (2 * WIDTH) + column[None, :]
                value = activation(tl.load(at, mask=mask).to(tl.float32), NAME)
                value *= tl.load(at + WIDTH, mask=mask).to(tl.float32)
            else:
                at = product + row[:, None] * WIDTH + column[None, :]
                value = activation(tl.load(at, mask=mask).to(tl.float32), NAME)
            tl.store(out + row[:, None] * WIDTH + column[None, :], value.to(out.dtype.element_ty), mask=mask)


@program("end")
def activate_backward(
    gradient: tl.tensor,
    product: tl.tensor,
    scale: tl.tensor,
    to_product: tl.tensor,
    scaled: tl.tensor,
    to_weight: tl.tensor,
    end: tl.tensor,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The backward of `activate` for results that are weighted afterwards, and the gradients of the weights.

    With ``a`` the activations, ``w`` the weight of a row and ``g`` its gradient before weighting, `gradient` is that of
    ``a`` for w = 1. The gradient of the weight is then ``gradient . a``, that of the activations ``w * gradient``, and
    that of the second matrix needs ``w * a``.

    Args:
        gradient: [rows, WIDTH].
        product: As in `activate`.
        scale: float32[rows], the weights.
        to_product: As `product`, out.
        scaled: [rows, WIDTH], ``w * a``, out.
        to_weight: float32[rows], out.
        end: int32, number of rows.
    """
    rows = tl.load(end)
    for start in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        used = row < rows
        weight = tl.load(scale + row, mask=used, other=0.0)[:, None]
        dots = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for left in range(0, WIDTH, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            mask = used[:, None] & (column < WIDTH)[None, :]
            narrow = row[:, None] * WIDTH + column[None, :]
            raw = tl.load(gradient + narrow, mask=mask, other=0.0).to(tl.float32)
            wide = row[:, None] * (2 * WIDTH) + column[None, :] if GATED else narrow
            gate = tl.load(product + wide, mask=mask, other=0.0).to(tl.float32)
            active = activation(gate, NAME)
            if GATED:
                up = tl.load(product + wide + WIDTH, mask=mask, other=0.0).to(tl.float32)
                tl.store(to_product + wide + WIDTH, (weight * raw * active).to(to_product.dtype.element_ty), mask=mask)
                turn = weight * raw * up * slope(gate, NAME)
                active *= up
            else:
                turn = weight * raw * slope(gate, NAME)
            tl.store(to_product + wide, turn.to(to_product.dtype.element_ty), mask=mask)
            tl.store(scaled + narrow, (weight * active).to(scaled.dtype.element_ty), mask=mask)
            dots += raw * active
        tl.store(to_weight + row, tl.sum(dots, axis=1), mask=used)
