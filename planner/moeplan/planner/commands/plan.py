"""`moeplan plan`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.planner.commands.explained import Command, refuse_typed
from moeplan.planner.commands.options import (
    CLUSTER,
    DAEMON,
    OUTPUT,
    PROBLEM,
    SEARCH,
    Deadline,
    Devices,
    EngineName,
    ForecastBy,
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
    Split,
    TraceFile,
    WindowSteps,
    Work,
    layer_numbers,
    numbers,
    positive,
    print_json,
    solve_parameters,
    writable,
)
from moeplan.planner.commands.remote import Ca, Certificate, Key, Token, connect
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.forecast_spec import Forecast, ForecastMethod

if TYPE_CHECKING:
    from moeplan.api.client import Client
    from moeplan.planner.studies.planning import PlannedLayer, PlanRequest
    from moeplan.solvers import Constraints, SplitRule

__all__ = ["register"]

RemoteServer = Annotated[
    str | None,
    typer.Option(help="Solve in the daemon at this address.", envvar="MOEPLAN_SERVER", rich_help_panel=DAEMON),
]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(cls=Command)(plan)


def plan(
    context: typer.Context,
    trace: TraceFile,
    devices: Devices,
    slots: Slots,
    nodes: Nodes = 1,
    failed: Annotated[
        str | None,
        typer.Option(help="Devices that failed, such as 3,7: plan for those that remain.", rich_help_panel=CLUSTER),
    ] = None,
    window: WindowSteps = 10,
    until: Annotated[
        int | None,
        typer.Option(
            help="Step of the trace, from 0, that the window ends before and that judges the plan; by default the "
            "window is the end of the trace.",
            rich_help_panel=PROBLEM,
        ),
    ] = None,
    forecast: ForecastBy = ForecastMethod.SCENARIOS,
    split_rule: Split = None,
    layers: Layers = None,
    groups: Groups = 1,
    current: Annotated[
        Path | None,
        typer.Option(help="Plan file in force, from which moves are counted.", rich_help_panel=PROBLEM),
    ] = None,
    max_moves: MaxMoves = None,
    constraints: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with limits on where replicas may be; see docs/constraints.md.", rich_help_panel=PROBLEM
        ),
    ] = None,
    engine: Annotated[
        EngineName | None,
        typer.Option(
            "--for",
            help="Engine that will run the layouts: sets the split rule, or keeps experts at home; see export.",
            rich_help_panel=PROBLEM,
        ),
    ] = None,
    share_slots: Annotated[
        bool,
        typer.Option(
            "--share-slots", help="Divide slots x layers over the layers by what each gains.", rich_help_panel=PROBLEM
        ),
    ] = False,
    policy: Annotated[str, typer.Option(help="Policy; see `moeplan policies`.", rich_help_panel=SEARCH)] = "hybrid",
    deadline_ms: Deadline = None,
    work_limit: Work = None,
    traffic_tolerance: Annotated[
        float,
        typer.Option(
            help="With --policy traffic: how much larger the largest load may become, as a fraction.",
            rich_help_panel=SEARCH,
        ),
    ] = 0.01,
    seed: Seed = 0,
    solver: Solver = "cpsat",
    prove: Prove = False,
    server: RemoteServer = None,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Plan file to write (JSON).", rich_help_panel=OUTPUT)
    ] = Path("plan.json"),
    output: Output = Format.TABLE,
) -> None:
    """Plan layouts from steps of a trace.

    The table says what each layer gains: imbalance (largest load of a device over the mean: 1.0 is perfect) before,
    under the layout of --current or else with experts in order, and after, on what the window forecasts and, where the
    trace goes on, on the step after it. With several nodes it also says what share of the tokens is computed on a
    different node from their source.
    """
    from dataclasses import replace

    from moeplan.planner.commands.tables import show_plans
    from moeplan.planner.files.limits_file import read_limits
    from moeplan.planner.files.plan_file import PlanFile, plan_document, write
    from moeplan.planner.studies.planning import PlanRequest
    from moeplan.planner.traces.trace import Trace
    from moeplan.solvers import Cluster
    from moeplan.solvers.exact.run import require

    _check_output(writable("--output", out), current)
    if max_moves is not None and current is None:
        raise ProblemError("--max-moves", max_moves, "needs --current, the plan file that moves start from")
    if share_slots:
        _check_sharing(server, current, failed)
        if engine is not None:
            raise ProblemError(
                "--share-slots", "on", f"{engine.value} knows one number of slots for all layers; drop it"
            )
    if policy != "traffic":
        refuse_typed(context, ["traffic_tolerance"], "is for --policy traffic; drop it")
    if server is None:
        refuse_typed(context, ["token", "ca", "certificate", "key"], "is for a daemon; give --server, or drop it")
        require(solver)
    opened = Trace.open(trace)
    limits = read_limits(constraints)
    demanded = limits.constraints
    if engine is not None:
        if engine is not EngineName.DEEPEP and slots > opened.experts:
            reason = (
                f"{engine.value} fills every slot, and no device takes an expert twice; give {opened.experts} at most"
            )
            raise ProblemError("--slots", slots, reason)
        split_rule, demanded = _asked_by(engine, split_rule, demanded, opened.experts, devices)
    request = PlanRequest(
        opened,
        layer_numbers(layers, opened.layers),
        limits.cluster(Cluster.uniform(devices, slots, nodes=nodes)),
        policy=policy,
        parameters=replace(
            solve_parameters(deadline_ms, work_limit, seed, solver, prove), traffic_tolerance=traffic_tolerance
        ),
        forecast=Forecast(forecast, window_steps=positive("--window", window)),
        until=until,
        expert=limits.expert,
        constraints=demanded,
        split_rule=split_rule,
        groups=groups,
        current={} if current is None else PlanFile.read(current).layouts,
        max_moves=max_moves,
        failed=[] if failed is None else numbers("--failed", failed, devices),
        fill_slots=engine not in (None, EngineName.DEEPEP),
    )
    with ExitStack() as stack:
        client = None if server is None else stack.enter_context(connect(server, token, ca, certificate, key))
        planned = _run(request, client, slots * len(request.layers) if share_slots else None)
    document = plan_document(
        {layer.layer: layer.plan for layer in planned}, {p.layer: _said_of(p, opened.layer_numbers) for p in planned}
    )
    write(out, document)
    if output is Format.JSON:
        print_json(document)
        return
    steps = min(window, request.end)
    title = f"{policy}: {len(planned)} layers planned from {steps} steps ({forecast}), written to {out}"
    show_plans(title, planned, output)


def _run(request: PlanRequest, client: Client | None, shared_slots: int | None) -> list[PlannedLayer]:
    from moeplan.planner.commands.terminal import compiling, progress
    from moeplan.planner.studies.planning import plan_trace
    from moeplan.planner.studies.warming import load_kernels

    if client is None:
        with compiling():
            load_kernels(request.policy)
    with progress(f"planning with {request.policy}", len(request.layers)) as advance:
        return plan_trace(request, client=client, shared_slots=shared_slots, on_plan=advance)


def _check_output(out: Path, current: Path | None) -> None:
    if current is not None and out.resolve() == current.resolve():
        raise ProblemError("--output", out, "is --current too; give another file, so that both can be compared")


def _check_sharing(server: str | None, current: Path | None, failed: str | None) -> None:
    for flag, value in (("--server", server), ("--current", current), ("--failed", failed)):
        if value is not None:
            raise ProblemError("--share-slots", "on", f"plans anew, in this process, on all devices; drop {flag}")


def _asked_by(
    engine: EngineName, split_rule: SplitRule | None, constraints: Constraints, experts: int, devices: int
) -> tuple[SplitRule | None, Constraints]:
    """Split rule and constraints with those of the engine."""
    from dataclasses import replace

    import numpy as np

    from moeplan.planner.exports.engines import ENGINES, homes

    needs = ENGINES[engine.value]
    if split_rule not in (None, needs.split_rule):
        raise ProblemError(
            "--split-rule", split_rule, f"{engine.value} divides by {needs.split_rule}; drop one of both"
        )
    if needs.at_home:
        if experts % devices:
            raise ProblemError("--devices", devices, f"{engine.value} needs a divisor of the {experts} experts")
        pinned = [*np.asarray(constraints.pinned).reshape(-1, 2).tolist(), *homes(experts, devices)]
        constraints = replace(constraints, pinned=np.array(pinned, np.int32))
    return needs.split_rule, constraints


def _said_of(planned: PlannedLayer, layer_numbers: Sequence[int] | None) -> dict[str, object]:
    after = planned.next_step
    return {
        **({} if layer_numbers is None else {"model_layer": layer_numbers[planned.layer]}),
        "imbalance_before": planned.window.before,
        "next_step": None if after is None else {"imbalance_before": after.before, "imbalance": after.after},
        "between_nodes": planned.between_nodes,
        "move_bytes": planned.move_bytes,
    }
