"""The command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner import (
    affinity_command,
    compare_command,
    generate_command,
    jobs_command,
    replay_command,
    serve_command,
)
from moeplan.planner.cli_options import (
    WORK_LIMIT,
    Deadline,
    Devices,
    Groups,
    Layers,
    MaxMoves,
    Nodes,
    Prove,
    Seed,
    Slots,
    Solver,
    TraceFile,
    Work,
    layer_numbers,
    numbers,
    positive,
    print_json,
    solve_parameters,
)
from moeplan.planner.formats import Format, Output
from moeplan.solvers.errors import ProblemError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Plan where the expert replicas of a Mixture-of-Experts model live, and prove how good the plan is.",
)
trace_app = typer.Typer(no_args_is_help=True, help="Look at recorded routing, or make some.")
app.add_typer(trace_app, name="trace")
generate_command.register(trace_app)
compare_command.register(app)
affinity_command.register(app)
replay_command.register(app)
serve_command.register(app)
jobs_command.register(app)

BAD_INPUT = 2

RemoteServer = Annotated[str | None, typer.Option(help="Solve in the daemon at this address.", envvar="MOEPLAN_SERVER")]


@app.command()
def policies(output: Output = Format.TABLE) -> None:
    """List the policies and where each comes from."""
    from moeplan.planner.terminal import show_table
    from moeplan.solvers import available_policies

    known = available_policies().values()
    if output is Format.JSON:
        print_json(
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
        print_json(description)
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
    constraints: Annotated[
        Path | None, typer.Option(help="JSON file with limits on where replicas may be; see docs/constraints.md.")
    ] = None,
    failed: Annotated[
        str | None, typer.Option(help="Devices that failed, such as 3,7: plan for those that remain.")
    ] = None,
    share_slots: Annotated[
        bool, typer.Option("--share-slots", help="Divide slots x layers over the layers by what each gains.")
    ] = False,
    deadline_ms: Deadline = None,
    work_limit: Work = WORK_LIMIT,
    traffic_tolerance: Annotated[
        float, typer.Option(help="With --policy traffic: how much larger the largest load may become, as a fraction.")
    ] = 0.01,
    seed: Seed = 0,
    solver: Solver = "cpsat",
    prove: Prove = False,
    server: RemoteServer = None,
    token: jobs_command.Token = None,
    ca: jobs_command.Ca = None,
    output: Output = Format.TABLE,
) -> None:
    """Plan layouts from the last steps of a trace.

    With several nodes the table says which part of the tokens another node computes than the one they come from.
    """
    from dataclasses import replace

    import numpy as np

    from moeplan.planner.limits_file import read_limits
    from moeplan.planner.plan_file import plan_document, read_layouts, write
    from moeplan.planner.remote import solver_at
    from moeplan.planner.terminal import progress, show_table, status
    from moeplan.planner.trace import Trace
    from moeplan.solvers import Cluster, Demand, Problem
    from moeplan.solvers import share_slots as divide_slots
    from moeplan.solvers.cost import between_nodes

    opened = Trace.open(trace)
    chosen = layer_numbers(layers, opened.layers)
    steps = np.stack(list(opened.read(max(0, opened.steps - positive("--window", window)))))
    in_force = {} if current is None else read_layouts(current)
    limits = read_limits(constraints)
    cluster = limits.cluster(Cluster.uniform(devices, slots, nodes=nodes))
    gone = [] if failed is None else numbers("--failed", failed, devices)
    parameters = replace(
        solve_parameters(deadline_ms, work_limit, seed, solver, prove), traffic_tolerance=traffic_tolerance
    )
    if share_slots and server is not None:
        raise ProblemError("--share-slots", True, "plans in this process only; drop --server")
    problems = {}
    for layer in chosen:
        problem = Problem(
            cluster,
            Demand.of(steps[:, layer]),
            limits.expert,
            current=in_force.get(layer),
            max_moves=max_moves,
            groups=groups,
            constraints=limits.constraints,
        )
        problems[layer] = problem.without(gone) if gone else problem
    if share_slots:
        with status(f"planning {len(chosen)} layers with {policy}, with more and more slots"):
            shares = divide_slots(list(problems.values()), slots * len(chosen), policy, parameters)
        plans = dict(zip(chosen, shares.plans, strict=True))
    else:
        plans = {}
        with solver_at(server, token, ca) as solve, progress(f"planning with {policy}", len(chosen)) as advance:
            for layer, problem in problems.items():
                plans[layer] = solve(problem, policy, parameters)
                advance()
    crossing = {}
    if nodes > 1 and opened.sources > 1:
        for layer, made in plans.items():
            part = between_nodes(problems[layer], made.layout, made.split)
            crossing[layer] = float(problems[layer].demand.weights @ part)
    document = plan_document(plans)
    write(out, document)
    if output is Format.JSON:
        print_json(document)
        return
    show_table(
        f"{policy}: {len(plans)} layers planned from {len(steps)} steps, written to {out}",
        ["layer", "slots", "imbalance", "bound", "at most above optimum", "between nodes", "replicas to copy", "ms"],
        [
            [
                str(layer),
                str(int((p.layout.slots >= 0).sum(axis=1).max())),
                f"{p.mean_imbalance:.4f}",
                f"{p.bound:.4f}",
                f"{p.gap:.2%}",
                f"{crossing[layer]:.1%}" if layer in crossing else "-",
                "-" if p.moves is None else str(len(p.moves)),
                f"{p.seconds * 1e3:.1f}",
            ]
            for layer, p in plans.items()
        ],
    )


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
