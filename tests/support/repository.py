"""Places in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "examples/traces/moe-e64-cut.npz"
