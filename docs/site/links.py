"""Links of pages that lead out of docs/, to code and other files of the repository: the site shows their paths."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace the links of a page; called by mkdocs."""
    up = r"\.\./" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]+)\]\({up}([^)\s]+)\)", lambda link: _named(link[1], link[2]), markdown)


def _named(text: str, path: str) -> str:
    """The text of a link, and the path where the text does not say it."""
    return text if path in text else f"{text} (`{path}`)"
