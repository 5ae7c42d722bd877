"""`moeplan plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner.commands.options import (
    Deadline,
    Devices,
    Format,
    Groups,
    Layers,
    MaxMoves,
    Nodes,
    Output,
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
from moeplan.planner.commands.remote import Ca, Token, connect
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["register"]

RemoteServer = Annotated[str | None, typer.Option(help="Solve in the daemon at this address.", envvar="MOEPLAN_SERVER")]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(plan)


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
    work_limit: Work = None,
    traffic_tolerance: Annotated[
        float, typer.Option(help="With --policy traffic: how much larger the largest load may become, as a fraction.")
    ] = 0.01,
    seed: Seed = 0,
    solver: Solver = "cpsat",
    prove: Prove = False,
    server: RemoteServer = None,
    token: Token = None,
    ca: Ca = None,
    output: Output = Format.TABLE,
) -> None:
    """Plan layouts from the last steps of a trace.

    With several nodes the table says which part of the tokens another node computes than the one they come from.
    """
    from contextlib import ExitStack
    from dataclasses import replace

    import numpy as np

    from moeplan.planner.commands.terminal import progress, show_table, status
    from moeplan.planner.files.limits_file import read_limits
    from moeplan.planner.files.plan_file import plan_document, read_layouts, write
    from moeplan.planner.traces.trace import Trace
    from moeplan.solvers import Cluster, Demand, Problem, solve
    from moeplan.solvers import share_slots as divide_slots
    from moeplan.solvers.plan.cost import between_nodes

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
            shares = divide_slots(list(problems.values()), slots * len(chosen), policy=policy, parameters=parameters)
        plans = dict(zip(chosen, shares.plans, strict=True))
    else:
        plans = {}
        with ExitStack() as stack:
            client = None if server is None else stack.enter_context(connect(server, token, ca))
            advance = stack.enter_context(progress(f"planning with {policy}", len(chosen)))
            for layer, problem in problems.items():
                if client is None:
                    plans[layer] = solve(problem, policy=policy, parameters=parameters)
                else:
                    (plans[layer],) = client.solve([problem], policy=policy, parameters=parameters)
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
