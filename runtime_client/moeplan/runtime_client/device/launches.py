"""Launches of Triton kernels that cost the host little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Blocks", "Launch", "aligned", "blocks_beside", "is_captured", "lanes", "power_of_2", "processors"]


def aligned(part: Tensor) -> Tensor:
    """The same numbers one after the other, from an address that kernels can read 16 bytes at a time from."""
    part = part.contiguous()
    return part.clone() if part.data_ptr() % 16 else part


def is_captured(part: Tensor) -> bool:
    """True if what is done with a tensor now becomes part of a CUDA graph: nothing on the host can look at it."""
    return part.is_cuda and torch.cuda.is_current_stream_capturing()


class Blocks:
    """A tensor that a kernel reads or writes by blocks, which units of the device copy.

    In place of Triton's description of one, which takes four times as long to make and is asked for once.

    Args:
        base: The tensor, which begins at a multiple of 16 bytes, as all but its last dimension do; that is contiguous.
        block: Size of a block.
    """

    __slots__ = ("base", "block", "shape", "strides")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, base: Tensor, block: Sequence[int]) -> None:
        self.base, self.block = base, block
        self.shape, self.strides = base.shape, base.stride()

    def described(self) -> Any:
        """Triton's description."""
        from triton.tools.tensor_descriptor import TensorDescriptor  # not everywhere

        return TensorDescriptor(self.base, [*self.shape], [*self.strides], [*self.block])


class Launch:
    """A kernel with its constants.

    Triton looks at every argument and constant of a launch to find what it has compiled, 20 us or so, and at the device
    and who wants to know of launches, another 3. Here nothing but the types of tensors may differ from launch to
    launch, so a look at those is enough. A tensor must be aligned to 16 bytes at each launch or at none, unless the
    kernel does not care, and all launches are on the device that is current at the first.

    Args:
        kernel: Its constants are its last parameters.
        warps: Warps of a block.
        registers: The most of a thread, if the compiler should not choose.
        constants: The constants, by name and in the order of the parameters.
    """

    def __init__(self, kernel: Any, warps: int, registers: int | None = None, /, **constants: object) -> None:
        self._kernel = kernel
        self._options = {"num_warps": warps} | ({} if registers is None else {"maxnreg": registers})
        self._constants = constants
        self._last = tuple(constants.values())
        self._compiled: dict[tuple[torch.dtype, ...], Callable[..., None]] = {}

    def __call__(self, grid: tuple[int, int, int], *arguments: object) -> None:
        """Run the kernel in so many blocks, none of the three numbers 0."""
        types = tuple([part.dtype for part in arguments if isinstance(part, Tensor)])
        compiled = self._compiled.get(types)
        if compiled is not None:
            compiled(grid, arguments)
            return
        asked = [part.described() if isinstance(part, Blocks) else part for part in arguments]
        kernel = self._kernel[grid](*asked, **self._constants, **self._options)
        if kernel is not None:  # Triton's interpreter gives none, and is asked each time
            self._compiled[types] = self._bind(kernel)

    def _bind(self, kernel: Any) -> Callable[..., None]:
        """What runs a kernel that is compiled."""
        from triton.runtime import driver  # not everywhere, and so not where this module is only imported

        run, function, metadata, last = kernel.run, kernel.function, kernel.packed_metadata, self._last
        stream_of, device = driver.active.get_current_stream, driver.active.get_current_device()

        def launch(grid: tuple[int, int, int], arguments: tuple[object, ...]) -> None:
            run(*grid, stream_of(device), function, metadata, None, None, None, *arguments, *last)

        return launch


def lanes(ranks: int) -> int:
    """Lanes of a block that looks at all ranks at once."""
    return max(power_of_2(ranks), 2)


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


def processors(device: torch.device) -> int:
    """Blocks that fill the device when each does many rows; two on CPUs."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def blocks_beside(device: torch.device) -> int:
    """Blocks that fill the links to the device's memory, and leave room for others on its processors."""
    return max(processors(device) // 4, 1)
