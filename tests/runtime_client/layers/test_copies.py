"""Wide copies move the same bytes as plain ones, whatever the strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeplan.runtime_client.layers.copies import copy_strided, wide_views

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Different finite numbers, a not-a-number and a negative zero among them."""
    values = torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape).to(dtype)
    values.view(-1)[:2] = torch.tensor([float("nan"), -0.0], dtype=dtype)[: values.numel()]
    return values


@given(
    dtype=st.sampled_from(DTYPES),
    blocks=st.integers(1, 3),
    rows=st.integers(1, 4),
    width=st.integers(1, 24),
    surplus=st.integers(0, 9),
    skip=st.integers(0, 5),
)
def test_a_strided_copy_moves_every_element(
    dtype: torch.dtype, blocks: int, rows: int, width: int, surplus: int, skip: int
) -> None:
    source = numbers((rows, blocks, width + surplus), dtype)[:, :, :width].transpose(0, 1)
    room = torch.zeros(skip + blocks * rows * width, dtype=dtype)
    out = room[skip:].view(blocks, rows, width)
    copy_strided(out, source)
    assert torch.equal(out.view(torch.uint8), source.contiguous().view(torch.uint8))
    assert not room[:skip].any()


def test_a_copy_to_another_dtype_converts() -> None:
    out = torch.empty(2, 8, dtype=torch.float32)
    copy_strided(out, torch.arange(16, dtype=torch.bfloat16).view(2, 8))
    assert out.flatten().tolist() == list(range(16))


@pytest.mark.parametrize(
    ("width", "expected"), [(2880, torch.complex128), (4, torch.int64), (6, torch.int32), (3, torch.bfloat16)]
)
def test_elements_are_as_wide_as_the_rows_allow(width: int, expected: torch.dtype) -> None:
    assert [tensor.dtype for tensor in wide_views(*torch.zeros(2, 5, width, dtype=torch.bfloat16))] == [expected] * 2


def test_the_narrowest_of_several_tensors_decides() -> None:
    one, other = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(4, 18, dtype=torch.bfloat16)[:, 2:]
    assert {tensor.dtype for tensor in wide_views(one, other)} == {torch.int32}
