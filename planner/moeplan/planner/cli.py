"""The command line."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moeplan.solvers import Cluster, ProblemError, SolveParameters

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Plan where the expert replicas of a Mixture-of-Experts model live, and prove how good the plan is.",
)
trace_app = typer.Typer(no_args_is_help=True, help="Look at recorded routing.")
app.add_typer(trace_app, name="trace")

BAD_INPUT = 2
WORK_LIMIT = SolveParameters().work_limit


class Format(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


TraceFile = Annotated[
    Path, typer.Argument(metavar="TRACE", help="An .npz file with counts[step, layer, source, expert].")
]
Devices = Annotated[int, typer.Option(help="Devices (ranks) that host experts.")]
Slots = Annotated[int, typer.Option(help="Expert slots per device.")]
Nodes = Annotated[int, typer.Option(help="Nodes that the devices are spread over, in contiguous blocks.")]
Layers = Annotated[str | None, typer.Option(help="Layers to plan, such as 0,3-5; all by default.")]
Groups = Annotated[int, typer.Option(help="Expert groups that routing treats as units.")]
Deadline = Annotated[float | None, typer.Option(help="Milliseconds per layer that a search may take.")]
Work = Annotated[int, typer.Option(help="Candidate layouts per layer that a search may score.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
MaxMoves = Annotated[int | None, typer.Option(help="Most replicas that a re-plan of a layer may copy.")]
Output = Annotated[Format, typer.Option("--format", help="A table to read, or JSON on standard output.")]


@app.command()
def policies(output: Output = Format.TABLE) -> None:
    """List the policies and where each comes from."""
    from moeplan.planner.terminal import show_table
    from moeplan.solvers import available_policies

    known = available_policies().values()
    if output is Format.JSON:
        _print_json(
            {
                "policies": [
                    {"policy": p.name, "source": p.source, "split": p.split, "summary": p.summary} for p in known
                ]
            }
        )
        return
    show_table(
        "Policies", ["policy", "from", "split", "what it does"], [[p.name, p.source, p.split, p.summary] for p in known]
    )


@trace_app.command()
def info(trace: TraceFile, output: Output = Format.TABLE) -> None:
    """Summarise a trace: its size, and how uneven its experts are."""
    from moeplan.planner.terminal import progress, show_table
    from moeplan.planner.trace import Trace
    from moeplan.planner.trace_info import describe

    opened = Trace.open(trace)
    with progress("reading", opened.steps) as advance:
        description = describe(opened, advance)
    if output is Format.JSON:
        _print_json(description)
        return
    facts = [[name, str(value)] for name, value in description.items() if name != "per_layer" and value is not None]
    show_table(str(trace), ["trace", ""], facts)
    show_table(
        "Per layer, mean over steps",
        ["layer", "tokens per step", "hottest expert / mean", "idle experts", "change per step"],
        [
            [
                str(row["layer"]),
                f"{row['tokens']:,.0f}",
                f"{row['hottest']:.2f}",
                f"{row['idle']:.1f}",
                f"{row['change']:.1%}",
            ]
            for row in description["per_layer"]
        ],
    )


@app.command()
def plan(
    trace: TraceFile,
    devices: Devices,
    slots: Slots,
    out: Annotated[Path, typer.Option("--output", "-o", help="Plan file to write (JSON).")] = Path("plan.json"),
    nodes: Nodes = 1,
    policy: Annotated[str, typer.Option(help="Policy; see `moeplan policies`.")] = "hybrid",
    window: Annotated[int, typer.Option(help="Newest steps of the trace to plan from.")] = 10,
    layers: Layers = None,
    groups: Groups = 1,
    current: Annotated[Path | None, typer.Option(help="Plan file in force, from which moves are counted.")] = None,
    max_moves: MaxMoves = None,
    deadline_ms: Deadline = None,
    work_limit: Work = WORK_LIMIT,
    seed: Seed = 0,
    output: Output = Format.TABLE,
) -> None:
    """Plan layouts from the last steps of a trace."""
    import numpy as np

    from moeplan.planner.plan_file import plan_document, read_layouts, write
    from moeplan.planner.terminal import progress, show_table
    from moeplan.planner.trace import Trace
    from moeplan.solvers import Demand, Problem, solve

    opened = Trace.open(trace)
    chosen = _layers(layers, opened.layers)
    steps = np.stack(list(opened.read(max(0, opened.steps - _positive("--window", window)))))
    in_force = {} if current is None else read_layouts(current)
    cluster = Cluster.uniform(devices, slots, nodes=nodes)
    parameters = _parameters(deadline_ms, work_limit, seed)
    plans = {}
    with progress(f"planning with {policy}", len(chosen)) as advance:
        for layer in chosen:
            problem = Problem(
                cluster, Demand.of(steps[:, layer]), current=in_force.get(layer), max_moves=max_moves, groups=groups
            )
            plans[layer] = solve(problem, policy, parameters)
            advance()
    document = plan_document(plans)
    write(out, document)
    if output is Format.JSON:
        _print_json(document)
        return
    show_table(
        f"{policy}: {len(plans)} layers planned from {len(steps)} steps, written to {out}",
        ["layer", "imbalance", "bound", "at most above optimum", "replicas to copy", "ms"],
        [
            [
                str(layer),
                f"{p.mean_imbalance:.4f}",
                f"{p.bound:.4f}",
                f"{p.gap:.2%}",
                "-" if p.moves is None else str(len(p.moves)),
                f"{p.seconds * 1e3:.1f}",
            ]
            for layer, p in plans.items()
        ],
    )


@app.command()
def compare(
    trace: TraceFile,
    devices: Devices,
    slots: Slots,
    nodes: Nodes = 1,
    policies: Annotated[
        str, typer.Option(help="Policies to compare, comma-separated.")
    ] = "static,eplb,laer,symi,flexmoe,hybrid",
    window: Annotated[int, typer.Option(help="Steps to plan from.")] = 10,
    every: Annotated[int, typer.Option(help="Steps from one plan to the next.")] = 20,
    layers: Layers = None,
    groups: Groups = 1,
    max_moves: MaxMoves = None,
    deadline_ms: Deadline = None,
    work_limit: Work = WORK_LIMIT,
    seed: Seed = 0,
    output: Output = Format.TABLE,
) -> None:
    """Compare policies on steps that they did not see.

    Every policy plans from a window of steps and is judged on the step right after it, over and over along the trace.
    Imbalance is the largest load of a device over the mean: 1.0 is perfect, and a step takes that much longer.
    --max-moves binds the policies that can limit their moves; the others re-plan freely.
    """
    from moeplan.planner.compare import Setting
    from moeplan.planner.compare import compare as judge
    from moeplan.planner.comparison_table import show_comparison
    from moeplan.planner.terminal import progress, status
    from moeplan.planner.trace import Trace
    from moeplan.solvers.policy import find

    opened = Trace.open(trace)
    names = [find(name.strip()).name for name in policies.split(",")]
    setting = Setting(
        Cluster.uniform(devices, slots, nodes=nodes),
        _layers(layers, opened.layers),
        groups=groups,
        max_moves=max_moves,
        parameters=_parameters(deadline_ms, work_limit, seed),
    )
    windows = opened.windows(_positive("--window", window), _positive("--every", every))
    with status("compiling kernels (the first time only)"):
        first = next(iter(opened.windows(window, every)))
        judge(
            [first, first],
            names,
            Setting(setting.cluster, setting.layers[:1], groups, max_moves, SolveParameters(work_limit=1)),
        )
    plans = opened.window_count(window, every) * len(setting.layers) * len(names)
    with progress("planning", plans) as advance:
        result = judge(windows, names, setting, advance)
    if output is Format.JSON:
        _print_json(result)
        return
    show_comparison(
        f"{trace.name}: plan from {window} steps, judge on the next, every {every} steps "
        f"({opened.experts} experts, {devices} devices, {slots} slots each)",
        result,
    )


def _layers(text: str | None, layers: int) -> list[int]:
    """Layer numbers of a list such as ``0,3-5``."""
    if text is None:
        return list(range(layers))
    chosen: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            span = range(int(first), int(last or first) + 1)
        except ValueError:
            raise ProblemError("--layers", repr(text), "must look like 0,3-5") from None
        if not span or span[0] < 0 or span[-1] >= layers:
            raise ProblemError("--layers", part, f"must be within 0-{layers - 1}")
        chosen.extend(span)
    return sorted(set(chosen))


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ProblemError(name, value, "must be at least 1")
    return value


def _parameters(deadline_ms: float | None, work_limit: int, seed: int) -> SolveParameters:
    return SolveParameters(
        deadline_s=None if deadline_ms is None else deadline_ms / 1e3, work_limit=work_limit, seed=seed
    )


def _print_json(document: object) -> None:
    json.dump(document, sys.stdout, indent=2)
    print()


def main() -> None:
    """Run the command line; a mistake of the user's ends with a message and exit code 2."""
    try:
        app()
    except ProblemError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
