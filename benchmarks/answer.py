"""A command's answer as a result file, for tables of the documents.

    python benchmarks/answer.py FILE.json compare TRACE --devices 16 --slots 5

The rows are those of the answer, with the names of nested figures joined by ``_``; lists in them are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from result_file import write_result


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit((__doc__ or "").split("\n\n")[1].strip())
    out, *command = sys.argv[1:]
    program = [sys.executable, "-m", "moeplan.planner.commands.main"]
    done = subprocess.run([*program, *command, "--format", "json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    (rows,) = (value for value in json.loads(done.stdout).values() if isinstance(value, list))
    write_result(Path(out), [dict(figures(row)) for row in rows])


def figures(value: dict[str, Any], of: str = "") -> list[tuple[str, Any]]:
    """Names and values, of those in a nested object too."""
    found: list[tuple[str, Any]] = []
    for name, each in value.items():
        if isinstance(each, dict):
            found += figures(each, f"{of}{name}_")
        elif not isinstance(each, list):
            found.append((f"{of}{name}", each))
    return found


if __name__ == "__main__":
    main()
