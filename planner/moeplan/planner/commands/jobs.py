"""`moeplan jobs`: look at the jobs of a daemon, and delete them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moeplan.planner.commands.explained import Command
from moeplan.planner.commands.options import OUTPUT, Format, Output, print_json
from moeplan.planner.commands.remote import with_client

if TYPE_CHECKING:
    from moeplan.api.client import Client
    from moeplan.api.job_plans import JobPlan
    from moeplan.api.jobs import Job

__all__ = ["Name", "register", "resource"]

TextOrJson = Annotated[
    Literal[Format.TABLE, Format.JSON],
    typer.Option("--format", help="Text to read, or JSON on standard output.", rich_help_panel=OUTPUT),
]
Name = Annotated[str, typer.Argument(help="The job, with or without jobs/.")]


SHOWN_RANKS = 32
"""Ranks that a daemon names at most."""


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    jobs = typer.Typer(help="Look at the jobs of a daemon, and delete them.", no_args_is_help=True)
    jobs.command("list", cls=Command)(list_jobs)
    jobs.command(cls=Command)(show)
    jobs.command(cls=Command)(watch)
    jobs.command(cls=Command)(delete)
    app.add_typer(jobs, name="jobs")


@with_client
def list_jobs(client: Client, output: Output = Format.TABLE) -> None:
    """List the jobs."""
    jobs = list(client.jobs())
    if output is Format.JSON:
        print_json([_summary(job) for job in jobs])
        return
    from moeplan.planner.commands.terminal import show_table

    columns = ["job", "layers", "experts", "ranks", "policy", "plan", "step", "owner"]
    rows = []
    for job in jobs:
        spec, status = job.spec, job.status
        rows.append(
            [
                job.name.removeprefix("jobs/"),
                str(spec.layers),
                str(spec.experts),
                f"{status.connected_ranks}/{spec.ranks}",
                spec.policy,
                str(status.plan_version),
                "-" if status.closed_step is None else str(status.closed_step),
                status.owner or "-",
            ]
        )
    show_table(f"{len(jobs)} jobs at {client.address}", columns, rows, output)


@with_client
def show(client: Client, job: Name, output: TextOrJson = Format.TABLE) -> None:
    """Show a job, its newest decision and its plan."""
    found = client.job(resource(job))
    plan = client.plan(f"{found.name}/plans/-")
    if output is Format.JSON:
        print_json({"job": _summary(found), "plan": _plan_summary(found.name, plan)})
        return
    for name, value in _summary(found).items():
        if isinstance(value, dict):
            value = ", ".join(f"{count:,} {what}" for what, count in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) + (", ..." if len(value) == SHOWN_RANKS else "")
        typer.echo(f"{name.replace('_', ' '):>16}  {'-' if value in (None, '') else value}")
    if plan.created is not None:
        age_s = (datetime.now(UTC) - plan.created).total_seconds()
        typer.echo(f"{'plan age':>16}  {timedelta(seconds=round(max(0.0, age_s)))}")
    _print_plan(plan)


@with_client
def watch(
    client: Client,
    job: Name,
    count: Annotated[
        int, typer.Option(help="End after so many plans; 0 for never.", min=0, rich_help_panel=OUTPUT)
    ] = 0,
    output: TextOrJson = Format.TABLE,
) -> None:
    """Show a job on a terminal: ranks, step, plan, last decision, imbalance plan by plan; piped, print new plans.

    On a terminal it goes on where the daemon is away for a while.
    """
    name = resource(job)
    if output is Format.TABLE and sys.stdout.isatty():
        from moeplan.planner.commands.job_screen import follow

        follow(client, name, count)
        return
    for number, plan in enumerate(client.watch_plans(name), 1):
        if output is Format.JSON:
            typer.echo(json.dumps(_plan_summary(name, plan)))
        else:
            _print_plan(plan)
        if number == count:
            return


@with_client
def delete(client: Client, job: Name) -> None:
    """Delete a job and its plans, and end its streams."""
    client.delete_job(resource(job))


def resource(job: str) -> str:
    """A job's resource name."""
    return job if job.startswith("jobs/") else f"jobs/{job}"


def _summary(job: Job) -> dict[str, object]:
    spec, status = job.spec, job.status
    return {
        "name": job.name,
        "incarnation": job.incarnation,
        "layers": spec.layers,
        "experts": spec.experts,
        "devices": spec.cluster.devices,
        "policy": spec.policy,
        "created": job.created.isoformat(),
        "owner": status.owner,
        "connected_ranks": status.connected_ranks,
        "closed_step": status.closed_step,
        "plan_version": status.plan_version,
        "applied_version": status.applied_version or None,
        "decision": None if status.decision is None else status.decision.reason.value,
        "detail": (status.decision and status.decision.detail) or None,
        "last_failure": None if status.failure is None else f"step {status.failure.step}: {status.failure.detail}",
        "saved_s": status.saved_s,
        "silent_ranks": list(status.silent_ranks),
        "late_ranks": list(status.late_ranks),
        "statistics": asdict(status.statistics),
    }


def _plan_summary(job: str, plan: JobPlan) -> dict[str, object]:
    decision = plan.decision
    return {
        "name": f"{job}/plans/{plan.version}",
        "incarnation": plan.incarnation,
        "created": _created(plan),
        "reason": decision.reason.value,
        "step": decision.step,
        "cost_before_s": decision.cost_before_s,
        "cost_after_s": decision.cost_after_s,
        "move_cost_s": decision.move_cost_s,
        "layers": [
            {
                "layer": layer.layer,
                "version": layer.version,
                "imbalance_before": layer.imbalance_before,
                "imbalance": layer.imbalance,
                "gap": layer.gap,
                "moved_replicas": layer.moved_replicas,
            }
            for layer in plan.layers
        ],
    }


def _created(plan: JobPlan) -> str:
    return "" if plan.created is None else plan.created.isoformat()


def _print_plan(plan: JobPlan) -> None:
    decision = plan.decision
    text = f"{_created(plan)}  version {plan.version}: {decision.reason.value.replace('_', ' ')}"
    if decision.cost_before_s:
        gain = decision.cost_after_s / decision.cost_before_s - 1
        text += f" at step {decision.step}, {decision.changed_layers} layers change, cost of a step {gain:+.1%}"
    if decision.move_cost_s:
        text += f", moving takes {decision.move_cost_s:.3g} s"
    typer.echo(text)
    for layer in plan.layers:
        if layer.imbalance is not None:
            typer.echo(
                f"    layer {layer.layer}: imbalance {layer.imbalance_before:.4f} -> {layer.imbalance:.4f} "
                f"(gap {layer.gap:.4f}), {layer.moved_replicas} replicas move"
            )
