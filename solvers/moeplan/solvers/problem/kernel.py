"""The compilation of numeric kernels."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache

__all__ = ["inner_kernel", "kernel"]

F = TypeVar("F", bound=Callable[..., object])

_SOLVERS = Path(__file__).parents[1]

KERNEL = re.compile(rb"^@(inner_)?kernel\b", re.MULTILINE)
"""A kernel in the text of a module."""


def kernel(function: F) -> F:
    """Compile `function` with numba: without the interpreter lock, cached on disk, and without fast-math.

    Ranks that solve the same problem must agree bit for bit, so floating-point operations are never reordered.
    """
    return _compiled(function)


def inner_kernel(function: F) -> F:
    """Compile `function` likewise, without counting who holds its arrays.

    For what other kernels call a million times: counting takes several times as long as a few additions. Its callers
    hold the arrays, so it can neither make an array nor return one, nor do what makes one, as to multiply two.
    """
    return _compiled(function, _nrt=False)


def _compiled(function: F, **options: bool) -> F:
    compiled: Any = numba.njit(nogil=True, **options)(function)
    compiled._cache = _Cache(function)
    return compiled


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of machine code, which holds that of called kernels, too, but looks only at the caller's file.

    Other files may change without it, as when another version is installed over this one. So what is cached belongs to
    the sources of all kernels, and to the constants that the kernel and those that it calls take from other modules.
    """

    def _index_key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
        folder = Path(inspect.getfile(self._py_func)).parent
        roots = (_SOLVERS,) if folder.is_relative_to(_SOLVERS) else (_SOLVERS, folder)
        return *super()._index_key(signature, codegen), *map(_sources, roots), _constants(self._py_func)


@cache
def _sources(folder: Path) -> str:
    """A digest of the modules below a folder that hold kernels."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*.py")):
        text = path.read_bytes()
        if KERNEL.search(text):
            digest.update(text)
    return digest.hexdigest()


@cache
def _constants(function: Callable[..., object]) -> tuple[str, ...]:
    """Names and values of the global constants that a function and the kernels that it calls are compiled with."""
    functions = [function]
    found: set[str] = set()
    for each in functions:  # grows
        for name in each.__code__.co_names:
            value = each.__globals__.get(name)
            called = getattr(value, "py_func", None)
            if called is not None and called not in functions:
                functions.append(called)
            if isinstance(value, int | float | str | tuple):
                found.add(f"{each.__module__}.{name} = {value!r}")
    return tuple(sorted(found))
