"""Documents: what they point to is there, and the map shows every room."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.repository import DOCUMENTS, ROOT, ROOTS

FOLDERS = "solvers|planner|runtime_client|proto|tests|docs|examples|benchmarks|deploy"
HISTORY = ROOT / "CHANGELOG.md"
"""Names things that are gone."""

FIGURE = re.compile(r"[-+]?[\d,]*\.\d+ ?[%x]?|[-+]?\d+ ?%")


def anchors(document: Path) -> set[str]:
    """What links can name in a document: its headings, in small letters with hyphens."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_are_in_the_repository(document: Path) -> None:
    for path in re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*\w)", document.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", sorted({*DOCUMENTS} - {HISTORY}), ids=lambda path: path.name)
def test_names_with_dots_can_be_imported(document: Path) -> None:
    for name in re.findall(r"\bmoeplan\.(?:solvers|api|planner|runtime_client)(?:\.\w+)*", document.read_text()):
        if ".integrations." in name:  # what it adapts to may not be installed
            module, *attribute = name.partition(".integrations.")[2].split(".")
            text = (ROOTS["runtime_client"] / "integrations" / f"{module}.py").read_text()
            assert all(re.search(rf"^(def|class) {part}\b", text, re.M) for part in attribute), name
        else:
            pkgutil.resolve_name(name)


def test_tables_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", sorted({*DOCUMENTS} - {HISTORY}), ids=lambda path: path.name)
def test_tables_of_figures_are_made_from_results(document: Path) -> None:
    """Three cells with figures make a table one of them; under the mark of `benchmarks/tables.py` they may stand."""
    by_hand = re.sub(r"<!-- table: .*?<!-- end of table -->", "", document.read_text(), flags=re.S)
    for table in re.findall(r"^\|.*\n\|[-| :]+\|\n((?:\|.*\n)+)", by_hand, re.M):
        figures = [cell for cell in re.split(r"[|\n]", table) if FIGURE.fullmatch(cell.strip(" *"))]
        assert len(figures) < 3, table
    for block in re.findall(r"^```\n(.*?)^```", by_hand, re.M | re.S):
        assert not re.search(r"(?: {2,}[\d,]*\.\d+%?){3}", block), block


@pytest.mark.parametrize("root", ["solvers", "planner", "runtime_client"])
def test_the_map_shows_every_room(root: str) -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    _, section = text.split(f"| room of `moeplan.{root}` | holds |")
    shown = re.findall(r"^\| `(\w+)/` \|", section.split("\n\n")[0], re.M)
    assert sorted(shown) == sorted(path.parent.name for path in ROOTS[root].glob("*/__init__.py"))
