"""How many lines the tests run in each root, from what `make coverage` has counted.

make coverage && .venv/bin/coverage json
python benchmarks/covered_lines.py coverage.json --out benchmarks/results/covered-lines.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from result_file import write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("counted", type=Path, help="what `coverage json` writes")
    parser.add_argument("--out", type=Path, required=True, help="result file to write")
    arguments = parser.parse_args()
    rows = by_root(json.loads(arguments.counted.read_text())["files"])
    for row in rows:
        print(f"{row['root']:<16}{row['lines']:>7}{row['run']:>7}{row['share']:>8.1%}")
    write_result(arguments.out, rows)


def by_root(files: dict[str, Any]) -> list[dict[str, Any]]:
    """Statements of each root and of all together, and those that were run."""
    lines, run = Counter[str](), Counter[str]()
    for path, file in files.items():
        for root in (Path(path).parts[0], "all"):
            lines[root] += file["summary"]["num_statements"]
            run[root] += file["summary"]["covered_lines"]
    return [
        {"root": root, "lines": lines[root], "run": run[root], "share": run[root] / lines[root]}
        for root in (*sorted(lines.keys() - {"all"}), "all")
    ]


if __name__ == "__main__":
    main()
