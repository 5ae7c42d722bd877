"""Errors of a training rank.

RuntimeError
├── RouterError            the router produced numbers that no expert can be chosen from
├── LayoutMismatchError    ranks are about to compute with different layouts
├── PassError              a pass on GPUs was abandoned
└── AgreementError         ranks did not agree in time
"""

from __future__ import annotations

__all__ = ["AgreementError", "LayoutMismatchError", "PassError", "RouterError"]


class RouterError(RuntimeError):
    """A rank's router chose an expert that does not exist, or gave a weight that is not finite.

    Every rank of the group raises it in the same forward pass, so that none waits for another.
    """


class LayoutMismatchError(RuntimeError):
    """Ranks hold different layouts for one layer; every rank of the group raises it in the same forward pass."""


class PassError(RuntimeError):
    """A pass that runs without the host was abandoned on all ranks; what it gave is not a number.

    A rank had more tokens than there is room for, ran another layer, or did not take part in time.
    """


class AgreementError(RuntimeError):
    """Another rank did not take part in an agreement within its time limit."""
