"""Homes: what spilling inside link domains leaves when homes follow the load, beside homes that stay and the floor.

    python benchmarks/homes.py TRACE:DEVICES:DOMAINS ... [--spare 2] [--moves 0.1] [--price 0.15] [--out FILE.json]

Homes are re-planned before every step that has ten before it, in every layer, and judged on the step by the spilling
that ranks do. `followed` is what a job would have; `no limit` moves whatever gains; the floor plans from the very step
that it is judged on. What `followed` misses of 1 is parted into the floor's own, the forecast's (no limit over floor),
that of few moves (followed over no limit) and what spilling leaves within domains.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moeplan.planner.studies.homes import HomesStudy, Variant, follow_homes
from moeplan.solvers import Forecast
from result_file import write_result
from trace_in_domains import FORM, trace_in_domains

WINDOW = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("traces", nargs="+", metavar=FORM)
    parser.add_argument("--spare", type=int, default=2, help="spare slots of a device")
    parser.add_argument("--moves", type=float, default=0.1, help="largest share of experts that one re-plan may move")
    parser.add_argument("--price", type=float, default=0.15, help="imbalance that moving all experts must gain")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    measured: list[dict[str, Any]] = []
    for text in arguments.traces:
        trace, options = trace_in_domains(text, arguments.spare)
        variants = [
            Variant("fixed", 0),
            Variant("followed", int(arguments.moves * trace.experts), arguments.price),
            Variant("no limit", None),
            Variant("floor", None, foresight=True),
        ]
        with Progress(transient=True) as progress:
            task = progress.add_task(trace.path.name, total=trace.window_count(WINDOW, 1))
            tick = partial(progress.advance, task)
            study = follow_homes(trace, options, variants, Forecast(window_steps=WINDOW), on_step=tick)
        missed = misses(study)
        show(text, study, missed)
        measured.append({"trace": Path(text).name, "spare": arguments.spare, **figures(study), "missed": missed})
    if arguments.out:
        write_result(arguments.out, measured)


def figures(study: HomesStudy) -> dict[str, Any]:
    """A row of the table, as numbers: those of each variant under its name."""
    found: dict[str, Any] = {"samples": study["samples"], "one_domain": study["one_domain"]}
    for row in study["variants"]:
        name = row["variant"].replace(" ", "_")
        found |= {name: row["imbalance"], f"{name}_error": row["standard_error"]}
        found |= {f"{name}_{part}": row[part] for part in ("domains_alone", "moved", "moved_most")}
    return found


def misses(study: HomesStudy) -> dict[str, float]:
    """What the followed homes miss of perfect balance, in parts that add up to it."""
    rows = {row["variant"]: row for row in study["variants"]}
    floor, free, followed = (rows[name]["domains_alone"] for name in ("floor", "no limit", "followed"))
    return {
        "floor": floor - 1,
        "forecast": free - floor,
        "moves": followed - free,
        "spilling": rows["followed"]["imbalance"] - followed,
    }


def show(title: str, study: HomesStudy, missed: dict[str, float]) -> None:
    table = Table("homes", "imbalance", "error", "moved", "at once", title=title)
    table.add_row("one domain", f"{study['one_domain']:.4f}", "", "", "")
    for row in study["variants"]:
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        table.add_row(
            row["variant"], f"{row['imbalance']:.4f}", error, f"{row['moved']:.1%}", f"{row['moved_most']:.1%}"
        )
    Console().print(table, ", ".join(f"{part} {value:.4f}" for part, value in missed.items()))


if __name__ == "__main__":
    main()
