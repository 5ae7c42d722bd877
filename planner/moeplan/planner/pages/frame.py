"""The front end's files: as one page without network, or one by one as a daemon serves them."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from html import escape
from importlib import resources

from moeplan.planner.pages.document import script_json

__all__ = ["SCRIPTS", "STYLE", "front_end_file", "live_page", "self_contained"]

SCRIPTS = ("echarts.min.js", "model.js", "views.js", "page.js")
STYLE = "style.css"


@cache
def front_end_file(name: str) -> str:
    """The text of a file of the front end."""
    return resources.files("moeplan.planner.pages").joinpath("front_end", name).read_text("utf-8")


def live_page() -> str:
    """The page that asks a daemon; its policy comes with the answer's headers."""
    scripts = "\n".join(f'<script src="{name}" defer></script>' for name in SCRIPTS)
    return _frame("moeplan", f'<link rel="stylesheet" href="{STYLE}">', scripts)


def self_contained(document: dict[str, object]) -> str:
    """One HTML file with everything in it; its policy allows nothing but its own scripts, and no request.

    Args:
        document: ``{"head", "chunks", "plans"}``, see `moeplan.planner.pages.document`.
    """
    head = document["head"]
    assert isinstance(head, dict)
    style = front_end_file(STYLE)
    scripts = [front_end_file(name) for name in SCRIPTS]
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {' '.join(map(_digest, scripts))}; "
        "base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>'
    data = f'<script type="application/json" id="document">{script_json(document)}</script>'
    body = "\n".join([data, *(f"<script>{script}</script>" for script in scripts)])
    return _frame(f"{head['title']} - moeplan", meta, body)


def _frame(title: str, head: str, scripts: str) -> str:
    page = front_end_file("page.html")
    return page.replace("<!--title-->", escape(title)).replace("<!--head-->", head).replace("<!--scripts-->", scripts)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
