"""Errors of a training rank.

RuntimeError
├── RouterError            the router produced numbers that no expert can be chosen from
├── LayoutMismatchError    ranks are about to compute with different layouts
├── RanksDifferError       ranks hold weights that do not go together
├── PassError              a pass on GPUs has no room for its tokens
├── MissedPassError        ranks are not in the same pass of the same layer
└── AgreementError         ranks did not agree in time
"""

from __future__ import annotations

__all__ = ["AgreementError", "LayoutMismatchError", "MissedPassError", "PassError", "RanksDifferError", "RouterError"]


class RouterError(RuntimeError):
    """A rank's router chose an expert that does not exist, or gave a weight that is not finite.

    Every rank of the group raises it in the same forward pass, so that none waits for another.
    """


class LayoutMismatchError(RuntimeError):
    """Ranks hold different layouts for one layer; every rank of the group raises it in the same forward pass."""


class RanksDifferError(RuntimeError):
    """Ranks hold the same part of the experts, or other weights of what they share.

    What happens to weights and gradients around the layers is wrong; every rank of the group raises it in one pass.
    """


class PassError(RuntimeError):
    """A pass that runs without the host has failed on all ranks, as a rank had more tokens than there is room for."""


class MissedPassError(RuntimeError):
    """A rank has left out a pass of a layer, or has not come to it within the time limit of the group."""


class AgreementError(RuntimeError):
    """Another rank did not take part in an agreement within its time limit."""
