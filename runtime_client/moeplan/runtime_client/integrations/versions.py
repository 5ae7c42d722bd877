"""Which releases of a framework an adapter has been read against and run with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

__all__ = ["UnsupportedVersionError", "require_version"]


class UnsupportedVersionError(RuntimeError):
    """A framework is installed in a release that its adapter was not made for, or not at all."""


def require_version(package: str, supported: Sequence[str]) -> str:
    """The installed version of a package.

    Adapters take the place of parts of a framework that change between releases without notice, so releases that were
    not tried are refused.

    Args:
        package: Its name in the package index.
        supported: Beginnings of versions, as "5.24".

    Raises:
        UnsupportedVersionError: it is not installed, or in another version.
    """
    series = " and ".join(f"{release}.x" for release in supported)
    needs = f"this adapter was made for {series}: pip install '{package}=={supported[-1]}.*'"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedVersionError(f"{package} is not installed; {needs}") from None
    if not any(f"{version}.".startswith(f"{release}.") for release in supported):
        raise UnsupportedVersionError(f"{package} {version} is installed; {needs}")
    return version
