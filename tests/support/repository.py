"""Places in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "examples/traces/moe-e64-cut.npz"
ROOTS = {
    "solvers": ROOT / "solvers/moeplan/solvers",
    "v1": ROOT / "proto/moeplan/v1",
    "api": ROOT / "proto/moeplan/api",
    "planner": ROOT / "planner/moeplan/planner",
    "runtime_client": ROOT / "runtime_client/moeplan/runtime_client",
}
"""Packages of the namespace `moeplan`."""

DOCUMENTS = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/*.md")))
"""Every page that is written for people."""
