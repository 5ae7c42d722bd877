"""The shape of the code: one namespace, roots and rooms, and who may import whom."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from tests.support.repository import ROOTS

MAY_IMPORT = {
    "solvers": {"lazy_loader", "numpy", "numba", "scipy", "ortools", "pulp", "highspy"},
    "v1": {"google", "grpc"},
    "api": {"moeplan.v1", "moeplan.solvers", "lazy_loader", "numpy", "google", "grpc", "grpc_status"},
}
"""All that a root may import, beside itself and the standard library."""

NEVER = {
    "planner": {"moeplan.runtime_client", "torch"},
    "runtime_client": {"moeplan.planner"},
}
READS_PT = ROOTS["planner"] / "traces/formats/recording.py"
"""Imports torch to read files that it saved, and says what to install where it is missing."""
ROOMS = {
    "solvers": (
        *("problem", "objective", "split", "construct", "plan", "exact", "search"),
        *("policies", "solving", "affinity", "routing", "spill", "homes", "known", "choice"),
    ),
    "planner": ("errors", "traces", "files", "exports", "jobs", "studies", "pages", "daemon", "commands"),
    "runtime_client": (
        "errors",
        "group",
        "derivatives",
        "recording",
        "device",
        "layers",
        "planning",
        "models",
        "integrations",
    ),
}
"""Rooms, and modules beside them, in the order in which they may import: later ones import earlier ones."""


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere: at its top, in functions, and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path: Path) -> set[str]:
    """Top-level packages that a module imports; two levels for moeplan itself."""
    parts = [name.split(".") for name in imports(path)]
    return {".".join(part[:2]) if part[0] == "moeplan" else part[0] for part in parts if part != ["moeplan"]}


def test_the_namespace_has_no_file_of_its_own() -> None:
    assert importlib.import_module("moeplan").__file__ is None


@pytest.mark.parametrize("root", sorted(MAY_IMPORT))
def test_a_root_uses_only_its_libraries(root: str) -> None:
    for path in ROOTS[root].rglob("*.py"):
        outside = {name for name in packages(path) if name not in sys.stdlib_module_names}
        assert outside <= MAY_IMPORT[root] | {f"moeplan.{root}"}, path


@pytest.mark.parametrize("root", sorted(NEVER))
def test_forbidden_imports(root: str) -> None:
    for path in ROOTS[root].rglob("*.py"):
        allowed = {"torch"} if path == READS_PT else set()
        assert not packages(path) & NEVER[root] - allowed, path


@pytest.mark.parametrize("root", sorted(ROOMS))
def test_rooms_import_only_rooms_before_them(root: str) -> None:
    order = {room: number for number, room in enumerate(ROOMS[root])}
    wrong = []
    for path in ROOTS[root].rglob("*.py"):
        parts = path.relative_to(ROOTS[root]).with_suffix("").parts
        if parts == ("__init__",):  # the face
            continue
        for name in imports(path):
            if name == f"moeplan.{root}":
                wrong.append(f"{path}: imports the face of its own root")
            elif name.startswith(f"moeplan.{root}."):
                room = name.split(".")[2]
                if order.get(room, len(order)) > order[parts[0]]:
                    wrong.append(f"{path}: {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("root", sorted(ROOTS))
def test_no_module_imports_itself_through_others(root: str) -> None:
    names = {
        f"moeplan.{root}." + ".".join(path.relative_to(ROOTS[root]).with_suffix("").parts): path
        for path in ROOTS[root].rglob("*.py")
        if path.stem != "__init__"
    }
    TopologicalSorter({name: set(imports(path)) & names.keys() for name, path in names.items()}).prepare()


@pytest.mark.parametrize("root", sorted(ROOMS))
def test_every_room_says_what_belongs_there(root: str) -> None:
    for folder in ROOTS[root].rglob("*/"):
        if folder.name != "__pycache__":
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("root", sorted(ROOTS))
def test_no_two_modules_of_a_root_share_a_name(root: str) -> None:
    """Commands are named as they are called, so they are exempt."""
    names = Counter(
        path.stem for path in ROOTS[root].rglob("*.py") if path.stem != "__init__" and path.parent.name != "commands"
    )
    assert not {name for name, times in names.items() if times > 1}


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    program = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    )


def test_help_waits_for_no_compiler_and_no_solver() -> None:
    heavy = {"numba", "scipy", "ortools", "pulp", "highspy", "grpc", "numpy", "torch"}
    assert not modules_after("import moeplan.planner.commands.main") & heavy


def test_the_daemon_waits_for_no_compiler() -> None:
    heavy = {"numba", "scipy", "ortools", "pulp", "highspy", "torch"}
    assert not modules_after("import moeplan.planner.daemon.server") & heavy


def test_only_affinity_loads_the_optimizers_of_scipy() -> None:
    """They take half a second to import; `linear_assignment` is what others need of them."""
    users = {path.stem for path in ROOTS["solvers"].rglob("*.py") if "scipy.optimize" in set(imports(path))}
    assert users == {"node_model"}


def test_spilling_needs_no_solver() -> None:
    planning = "from moeplan.solvers import QuotaPlanner, solve, evaluate"
    assert not modules_after(planning) & {"ortools", "pulp", "highspy"}
