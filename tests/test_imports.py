"""The package's shape: one namespace, four roots, and who may import whom."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOTS = {
    "solvers": ROOT / "solvers/moeplan/solvers",
    "v1": ROOT / "proto/moeplan/v1",
    "planner": ROOT / "planner/moeplan/planner",
    "runtime_client": ROOT / "runtime_client/moeplan/runtime_client",
}
MAY_IMPORT = {
    "solvers": {"numpy", "numba", "scipy", "ortools", "pulp", "highspy"},
    "v1": {"google", "grpc"},
    "planner": {"moeplan.solvers", "moeplan.v1"},
    "runtime_client": {"moeplan.solvers", "moeplan.v1"},
}
NEVER = {
    "solvers": {"grpc", "torch", "moeplan.planner", "moeplan.runtime_client", "moeplan.v1"},
    "v1": {"moeplan.planner", "moeplan.solvers", "moeplan.runtime_client", "torch"},
    "planner": {"torch", "moeplan.runtime_client"},
    "runtime_client": {"moeplan.planner"},
}


def imports(path: Path) -> set[str]:
    """Top-level packages that a module imports; two levels for moeplan itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            parts = name.split(".")
            found.add(".".join(parts[:2]) if parts[0] == "moeplan" else parts[0])
    return found


def test_the_namespace_has_no_file_of_its_own() -> None:
    assert importlib.import_module("moeplan").__file__ is None


@pytest.mark.parametrize("part", sorted(NEVER))
def test_forbidden_imports(part: str) -> None:
    for path in ROOTS[part].rglob("*.py"):
        assert not imports(path) & NEVER[part], path


def test_solvers_use_only_their_libraries() -> None:
    for path in ROOTS["solvers"].rglob("*.py"):
        outside = {name for name in imports(path) if name not in sys.stdlib_module_names and name != "moeplan.solvers"}
        assert outside <= MAY_IMPORT["solvers"], path


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    program = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    )


def test_help_waits_for_no_compiler_and_no_solver() -> None:
    heavy = {"numba", "scipy", "ortools", "pulp", "highspy", "grpc", "numpy", "torch"}
    assert not modules_after("import moeplan.planner.cli") & heavy


def test_spilling_needs_no_solver() -> None:
    planning = "from moeplan.solvers.spill import QuotaPlanner; from moeplan.solvers import solve, evaluate"
    assert not modules_after(planning) & {"ortools", "pulp", "highspy"}
