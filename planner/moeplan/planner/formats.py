"""How commands print results."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = ["Format", "Output"]


class Format(StrEnum):
    """A table to read, or JSON for programs."""

    TABLE = "table"
    JSON = "json"


Output = Annotated[Format, typer.Option("--format", help="A table to read, or JSON on standard output.")]
