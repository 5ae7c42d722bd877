"""Launches of Triton kernels that cost the host little."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["Launch"]


class Launch:
    """A kernel with its constants.

    Triton looks at every argument and constant of a launch to find what it has compiled, 20 us or so. Here nothing but
    the types of tensors may differ from launch to launch, so a look at those is enough. A tensor must be aligned to 16
    bytes at each launch or at none, unless the kernel does not care.

    Args:
        kernel: Its constants are its last parameters.
        warps: Warps of a block.
        constants: The constants, by name and in the order of the parameters.
    """

    def __init__(self, kernel: Any, warps: int, **constants: object) -> None:
        self._kernel = kernel
        self._warps = warps
        self._constants = constants
        self._last = tuple(constants.values())
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(self, grid: tuple[int, int, int], *arguments: object) -> None:
        """Run the kernel in so many blocks, none of the three numbers 0."""
        types = tuple([part.dtype for part in arguments if isinstance(part, Tensor)])
        compiled = self._compiled.get(types)
        if compiled is None:
            # Triton's interpreter gives None, and is asked each time.
            self._compiled[types] = self._kernel[grid](*arguments, **self._constants, num_warps=self._warps)
        else:
            compiled[grid](*arguments, *self._last)
