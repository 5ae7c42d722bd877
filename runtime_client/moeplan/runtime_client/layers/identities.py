"""Choices that give a token back as it is, beside those of experts, as in LongCat-Flash."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["with_identities"]


def with_identities(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], identities: range, rows: Tensor, index: Tensor, weight: Tensor
) -> Tensor:
    """Apply a layer where some choices are the identity: they stay where they are, and no rank computes them.

    Args:
        run: Applies the experts: called with rows, index and weight, of one choice for each row.
        identities: The choices that are the identity.
        rows: [tokens, hidden].
        index: int64[tokens, k].
        weight: [tokens, k].

    Returns:
        [tokens, hidden], weighted and summed.
    """
    same = (index >= identities.start) & (index < identities.stop)
    token, choice = same.logical_not().nonzero(as_tuple=True)
    results = run(rows[token], index[token, choice, None], weight[token, choice, None])
    kept = rows * (weight * same).sum(dim=1, keepdim=True).to(rows.dtype)
    return kept.index_add(0, token, results)
