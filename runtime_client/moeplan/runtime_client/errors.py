"""Errors of a training rank.

RuntimeError
├── RouterError            the router produced numbers that no expert can be chosen from
├── LayoutMismatchError    ranks are about to compute with different layouts
└── AgreementError         ranks did not agree in time
"""

from __future__ import annotations

__all__ = ["AgreementError", "LayoutMismatchError", "RouterError"]


class RouterError(RuntimeError):
    """A rank's router chose an expert that does not exist, or gave a weight that is not finite.

    Every rank of the group raises it in the same forward pass, so that none waits for another.
    """


class LayoutMismatchError(RuntimeError):
    """Ranks hold different layouts for one layer; every rank of the group raises it in the same forward pass."""


class AgreementError(RuntimeError):
    """Another rank did not take part in an agreement within its time limit."""
