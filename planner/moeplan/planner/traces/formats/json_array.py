"""The elements of one array of a JSON file, one at a time: the file may be larger than memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeplan.planner.traces.trace import TraceError

__all__ = ["json_elements"]

BLOCK = 1 << 20
"""Characters that are read together; the array must begin in the first ones."""
WORD = 64
"""Characters of the longest word of these files: what is wrong before the last ones was not just cut off."""
BETWEEN = " \t\r\n,"
"""Characters between elements."""


def json_elements(path: Path, name: str, dropped: list[str]) -> Iterator[Any]:
    """The elements of the array of that name. A last one that was cut off is dropped, and said.

    Args:
        path: The file, an object with the array in it.
        name: Key of the array.
        dropped: Where to say what was left out.

    Raises:
        TraceError: the file cannot be read, has no such array, or is no JSON.
    """
    decode, number = json.JSONDecoder().raw_decode, 0
    try:
        with path.open() as file:
            text = file.read(BLOCK)
            begin = re.search(rf'"{name}"\s*:\s*\[\s*', text)
            if begin is None:
                raise TraceError(path, f"has no array `{name}` at its beginning")
            at, wanted = begin.end(), BLOCK
            while True:
                while at < len(text) and text[at] in BETWEEN:
                    at += 1
                if text.startswith("]", at):
                    return
                try:
                    value, end = decode(text, at)
                except RecursionError:
                    raise TraceError(path, f"is nested too deeply at {name}[{number}]") from None
                except json.JSONDecodeError as error:
                    if error.pos < len(text) - WORD:
                        raise TraceError(path, f"is no JSON at {name}[{number}] ({error.msg})") from None
                    end = len(text)
                if end < len(text):  # a number at the end may go on
                    yield value
                    at, number, wanted = end, number + 1, BLOCK
                    continue
                block = file.read(wanted)
                if not block:
                    break
                text, at = text[at:] + block, 0
                wanted *= 2  # so that a large element is not read anew with every block
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(path, f"cannot be read ({error})") from None
    dropped.append(f"{path}: {name}[{number}], which was cut off")
