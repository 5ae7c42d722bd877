"""Tables of the documents, made from the results of benchmarks, so that no figure is copied by hand.

    python benchmarks/tables.py            # write them: `make tables`
    python benchmarks/tables.py --check    # fail where one is out of date

A table stands in a document between two comments, of which the first names a file of benchmarks/results:

    <!-- table: next-step.json where trace=moe-e256 | max_moves: max moves | moved: moved .1% | mean: mean .4f -->
    <!-- end of table -->

After the file come conditions that rows must meet, if any, then the columns: `key: title format`, the format as Python
writes it, or none. Without columns the table is that which the benchmark itself prints. Below it stand the machine, the
date, the commit and the command.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
BLOCK = re.compile(r"(<!-- table: (?P<what>.*?) -->\n).*?(?=<!-- end of table -->)", re.S)
COLUMN = re.compile(r"(?P<key>\w+): (?P<title>.*?)(?: (?P<format>[,+]?\.\d[f%g]|,d))?$")
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+ ?[%x]?|-|")

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table is out of date")
    arguments = parser.parse_args()
    old = []
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = document.read_text()
        made = BLOCK.sub(partial(block, document), text)
        if made != text:
            old.append(str(document.relative_to(ROOT)))
            if not arguments.check:
                document.write_text(made)
    if arguments.check and old:
        sys.exit(f"out of date: {', '.join(old)}; run `make tables`")


def block(document: Path, found: re.Match[str]) -> str:
    """The text of a block, made anew."""
    link = Path(os.path.relpath(RESULTS, document.parent)).as_posix()
    return f"{found[1]}\n{table(found['what'], link)}\n\n"


def table(what: str, link: str) -> str:
    """Markdown of a table and where it is from.

    Args:
        what: File, conditions and columns, as in a document.
        link: The folder of results, from the document.
    """
    source, *columns = (part.strip() for part in what.split(" | "))
    name, _, conditions = source.partition(" where ")
    result = json.loads((RESULTS / name).read_text())
    if not columns:
        import training  # loads torch

        return f"{training.table(result)}\n\n([the file]({link}/{name}))"
    wanted = dict(condition.split("=", 1) for condition in shlex.split(conditions))
    rows = [row for row in result["rows"] if all(str(row[key]) == value for key, value in wanted.items())]
    if not rows:
        raise SystemExit(f"{name}: no row has {conditions}")
    return f"{markdown(rows, columns)}\n\n{origin(result)} ([the file]({link}/{name}))"


def markdown(rows: list[Row], columns: list[str]) -> str:
    """The rows' columns; those of numbers are aligned to the right."""
    parts = [COLUMN.fullmatch(column) for column in columns]
    specs = [part.groupdict() for part in parts if part]
    if len(specs) < len(columns):
        raise SystemExit(f"cannot be read: {columns[parts.index(None)]}; write `key: title .2f`")
    cells = [[cell(row[spec["key"]], spec["format"] or "") for spec in specs] for row in rows]
    right = ["---:" if all(NUMBER.fullmatch(row[i]) for row in cells) else "---" for i in range(len(specs))]
    lines = [[spec["title"] for spec in specs], *cells]
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([body[0], f"|{'|'.join(right)}|", *body[1:]])


def cell(value: Any, form: str) -> str:
    """A value as it stands in a table; what was not measured is empty."""
    if value is None:
        return ""
    if isinstance(value, str) or not form:
        return str(value)
    return format(value, form).replace("%", " %")


def origin(result: Row) -> str:
    """Where, when and by what the figures were measured; of older ones that a document had, the text says where."""
    machine, command = result["machine"], result["command"]
    if machine is None:
        where = "taken down from what was printed"
    elif "device" in machine:
        where = f"{machine['ranks']} x {machine['device']}, torch {machine['torch']}"
    else:
        where = f"{machine['cores']} cores of {machine['cpu']}"
    by = f": `{shlex.join(['python', *command])}`" if command else ""
    return f"{result['date']}, commit {result['commit']}, {where}{by}"


if __name__ == "__main__":
    main()
