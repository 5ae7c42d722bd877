"""The public names: one table per root, and documents and examples that keep to them."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.repository import DOCUMENTS, ROOT, ROOTS

from moeplan.solvers import Layout

FACES = {f"moeplan.{root}": ROOTS[root] / "__init__.pyi" for root in ("solvers", "api", "runtime_client")}
ADAPTERS = "moeplan.runtime_client.integrations."
"""Its modules are public one by one, by their ``__all__``, as each needs its framework."""

MESSAGES = "moeplan.v1"
"""Generated from the API's definition, which is public in every language."""

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
REFERENCE = ROOT / "docs/reference.md"


def table(face: str) -> list[str]:
    """Names that a face imports from its rooms, in order."""
    tree = ast.parse(FACES[face].read_text())
    return sorted(alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names)


def adapter(module: str) -> list[str]:
    """Public names of an adapter, without its framework being imported."""
    path = ROOTS["runtime_client"] / "integrations" / f"{module.removeprefix(ADAPTERS)}.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no __all__")


def blocks(document: Path) -> Iterator[str]:
    """Python code of a document."""
    return (match[1] for match in re.finditer(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S))


def imports(code: str) -> Iterator[tuple[str, list[str]]]:
    """Modules of moeplan that code imports, and what it takes from them."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names if alias.name.startswith("moeplan"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moeplan"):
            yield node.module, [alias.name for alias in node.names]


@pytest.mark.parametrize("face", FACES)
def test_a_face_is_its_table(face: str) -> None:
    module = importlib.import_module(face)
    names = table(face)
    assert sorted(module.__all__) == names
    assert set(names) <= set(dir(module))
    for name in names:
        assert getattr(module, name) is not None, name


@pytest.mark.parametrize("face", FACES)
def test_the_reference_has_every_public_name_once(face: str) -> None:
    _, section = re.split(rf"^## `{re.escape(face)}`$", REFERENCE.read_text(), flags=re.M)
    listed = re.findall(r"^\| `(\w+)` \|", re.split(r"^## ", section, flags=re.M)[0], re.M)
    assert sorted(listed) == table(face)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_import_what_faces_export(document: Path) -> None:
    for module, names in (found for block in blocks(document) for found in imports(block)):
        adapts = module.startswith(ADAPTERS)
        assert adapts or module in FACES, f"import from {', '.join(FACES)} or {ADAPTERS}*, not from {module}"
        assert set(names) <= set(adapter(module) if adapts else table(module)), module


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_import_from_faces(example: Path) -> None:
    modules = {module for module, _ in imports(example.read_text())}
    assert modules <= {*FACES, MESSAGES}


def test_the_readme_solves_a_problem() -> None:
    (code,) = (block for block in blocks(ROOT / "README.md") if "solve(" in block)
    layout = Layout.contiguous(64, np.full(16, 5))
    names: dict[str, Any] = {"counts": np.random.default_rng(3).integers(1, 1_000, (16, 64)), "layout": layout}
    exec(code, names)
    plan = names["plan"]
    assert plan.layout.slots.shape == (16, 5)
    assert plan.split.quota.shape == (1, 16, 5)
    assert len(plan.moves) <= 8
