"""Reinforcement learning with replayed routes: steps that are known before they run, planned and not planned.

    python benchmarks/known_steps.py TRACE:DEVICES:DOMAINS ... [--micro-batches 8] [--moves 0.1] [--out FILE.json]

A step is made of consecutive steps of a trace: each is a micro-batch, and what a rank routed in it a sample, the least
that can change its place. Real samples are smaller and differ more, which leaves more to the order. Beside `plan_known`
stand static experts, EPLB given the loads of the very step (which ReLibra, arXiv 2605.08639, compares itself with), and
spilling inside domains from known counts without a plan.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moeplan.planner.studies.known_steps import KnownStudy, KnownVariant, study_known
from result_file import write_result
from trace_in_domains import FORM, trace_in_domains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("traces", nargs="+", metavar=FORM)
    parser.add_argument("--spare", type=int, default=2, help="spare slots of a device")
    parser.add_argument("--micro-batches", type=int, default=8, help="micro-batches of a step")
    parser.add_argument("--moves", type=float, default=0.1, help="largest share of experts that one step may move")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    measured: list[dict[str, Any]] = []
    for text in arguments.traces:
        trace, options = trace_in_domains(text, arguments.spare)
        few, title = int(arguments.moves * trace.experts), f"{arguments.moves:.0%}".replace("%", " %")
        variants = [
            KnownVariant("order", 0, reordered=True),
            KnownVariant(f"homes, {title} a step", few, reordered=False),
            KnownVariant(f"homes, {title} a step, and order", few, reordered=True),
            KnownVariant("homes, no limit, and order", None, reordered=True),
        ]
        with Progress(transient=True) as progress:
            task = progress.add_task(trace.path.name, total=trace.steps // arguments.micro_batches)
            tick = partial(progress.advance, task)
            study = study_known(trace, options, variants, arguments.micro_batches, on_step=tick)
        show(text, study)
        measured.extend({"trace": Path(text).name, "spare": arguments.spare, **row} for row in study["rows"])
    if arguments.out:
        write_result(arguments.out, measured)


def show(title: str, study: KnownStudy) -> None:
    table = Table("", "imbalance", "p95", "moved", "replicas", "seconds", title=f"{title}, {study['steps']} steps")
    for row in study["rows"]:
        moved = "" if row["moved"] is None else f"{row['moved']:.1%}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        table.add_row(
            row["variant"], f"{row['imbalance']:.4f}", f"{row['p95']:.4f}", moved, f"{row['replicas']:.1f}", seconds
        )
    Console().print(table)


if __name__ == "__main__":
    main()
