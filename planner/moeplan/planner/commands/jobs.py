"""`moeplan jobs`: look at the jobs of a daemon, and delete them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.planner.commands.options import Format, Output

if TYPE_CHECKING:
    from moeplan.api.client import Client
    from moeplan.v1 import job_pb2

__all__ = ["Ca", "Certificate", "Key", "Server", "Token", "connect", "register"]

EXIT_FAILED = 1

Server = Annotated[str, typer.Option(help="Address of the daemon.", envvar="MOEPLAN_SERVER")]
Token = Annotated[Path | None, typer.Option(help="File with the bearer token.", envvar="MOEPLAN_TOKEN_FILE")]
Ca = Annotated[Path | None, typer.Option(help="PEM file of who signed the server.", envvar="MOEPLAN_CA")]
Certificate = Annotated[Path | None, typer.Option(help="PEM file of your certificate.", envvar="MOEPLAN_CERTIFICATE")]
Key = Annotated[Path | None, typer.Option(help="PEM file of its key.", envvar="MOEPLAN_KEY")]
Name = Annotated[str, typer.Argument(help="The job, with or without jobs/.")]

LOCAL = "127.0.0.1:7433"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    jobs = typer.Typer(help="Look at the jobs of a daemon, and delete them.", no_args_is_help=True)
    jobs.command("list")(list_jobs)
    jobs.command()(show)
    jobs.command()(watch)
    jobs.command()(delete)
    app.add_typer(jobs, name="jobs")


@contextmanager
def connect(
    server: str = LOCAL,
    token: Path | None = None,
    ca: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Iterator[Client]:
    """A client; what the server refuses becomes a message and exit status 1."""
    from moeplan.api.client import Client
    from moeplan.api.connection import Security
    from moeplan.api.errors import ServiceError

    try:
        secret = token.read_text().strip() if token else None
        with Client(server, Security(secret, ca, certificate, key)) as client:
            yield client
    except ServiceError as error:
        typer.echo(f"moeplan: {server}: {error.code.name}: {error.message}", err=True)
        raise typer.Exit(EXIT_FAILED) from None
    except OSError as error:
        typer.echo(f"moeplan: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from None


def list_jobs(
    server: Server = LOCAL,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    output: Output = Format.TABLE,
) -> None:
    """List the jobs."""
    with connect(server, token, ca, certificate, key) as client:
        jobs = list(client.jobs())
    if output is Format.JSON:
        typer.echo(json.dumps([_summary(job) for job in jobs], indent=2))
        return
    from moeplan.planner.commands.terminal import show_table

    columns = ["job", "layers", "experts", "ranks", "policy", "plan", "step", "owner"]
    rows = []
    for job in jobs:
        closed = str(job.status.closed_step) if job.status.HasField("closed_step") else "-"
        ranks = f"{job.status.connected_ranks}/{job.ranks or len(job.cluster.slots)}"
        name, owner = job.name.removeprefix("jobs/"), job.status.owner or "-"
        version = str(job.status.plan_version)
        rows.append([name, str(job.layers), str(job.experts), ranks, job.policy or "hybrid", version, closed, owner])
    show_table(f"{len(jobs)} jobs at {server}", columns, rows)


def show(
    job: Name,
    server: Server = LOCAL,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    output: Output = Format.TABLE,
) -> None:
    """Show a job, its newest decision and its plan."""
    with connect(server, token, ca, certificate, key) as client:
        found = client.job(_name(job))
        plan = client.plan(f"{found.name}/plans/-")
    if output is Format.JSON:
        typer.echo(json.dumps({"job": _summary(found), "plan": _plan_summary(plan)}, indent=2))
        return
    for name, value in _summary(found).items():
        if isinstance(value, dict):
            value = ", ".join(f"{count:,} {what}" for what, count in value.items())
        typer.echo(f"{name.replace('_', ' '):>16}  {'-' if value is None else value}")
    _print_plan(plan)


def watch(
    job: Name,
    server: Server = LOCAL,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    count: Annotated[int, typer.Option(help="End after so many plans; 0 for never.", min=0)] = 0,
    output: Output = Format.TABLE,
) -> None:
    """Print every new plan of a job as it is made."""
    with connect(server, token, ca, certificate, key) as client:
        for number, plan in enumerate(client.watch_plans(_name(job)), 1):
            if output is Format.JSON:
                typer.echo(json.dumps(_plan_summary(plan)))
            else:
                _print_plan(plan)
            if number == count:
                return


def delete(
    job: Name,
    server: Server = LOCAL,
    token: Token = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Delete a job and its plans, and end its streams."""
    with connect(server, token, ca, certificate, key) as client:
        client.delete_job(_name(job))


def _name(job: str) -> str:
    return job if job.startswith("jobs/") else f"jobs/{job}"


def _reason(decision: job_pb2.Decision) -> str:
    from moeplan.v1 import job_pb2

    return job_pb2.Decision.Reason.Name(decision.reason).removeprefix("REASON_").lower()


def _summary(job: job_pb2.Job) -> dict[str, object]:
    status, count = job.status, job.status.statistics
    return {
        "name": job.name,
        "incarnation": job.incarnation,
        "layers": job.layers,
        "experts": job.experts,
        "devices": len(job.cluster.slots),
        "policy": job.policy or "hybrid",
        "created": job.create_time.ToJsonString(),
        "owner": status.owner,
        "connected_ranks": status.connected_ranks,
        "closed_step": status.closed_step if status.HasField("closed_step") else None,
        "plan_version": status.plan_version,
        "applied_version": status.applied_version or None,
        "decision": _reason(status.decision),
        "statistics": {name: getattr(count, name) for name in ("accepted", "duplicate", "late", "missing", "early")},
    }


def _plan_summary(plan: job_pb2.JobPlan) -> dict[str, object]:
    decision = plan.decision
    return {
        "name": plan.name,
        "incarnation": plan.incarnation,
        "created": plan.create_time.ToJsonString(),
        "reason": _reason(decision),
        "step": decision.step,
        "cost_before_s": decision.cost_before_s,
        "cost_after_s": decision.cost_after_s,
        "move_cost_s": decision.move_cost_s,
        "layers": [
            {
                "layer": layer.layer,
                "version": layer.version,
                "imbalance_before": layer.imbalance_before if layer.HasField("imbalance_before") else None,
                "imbalance": layer.imbalance if layer.HasField("imbalance") else None,
                "gap": layer.gap if layer.HasField("gap") else None,
                "moved_replicas": layer.moved_replicas,
            }
            for layer in plan.layers
        ],
    }


def _print_plan(plan: job_pb2.JobPlan) -> None:
    decision = plan.decision
    text = f"{plan.create_time.ToJsonString()}  version {plan.version}: {_reason(decision).replace('_', ' ')}"
    if decision.cost_before_s:
        gain = decision.cost_after_s / decision.cost_before_s - 1
        text += f" at step {decision.step}, {decision.changed_layers} layers change, cost of a step {gain:+.1%}"
    if decision.move_cost_s:
        text += f", moving takes {decision.move_cost_s:.3g} s"
    typer.echo(text)
    for layer in plan.layers:
        if layer.HasField("imbalance"):
            typer.echo(
                f"    layer {layer.layer}: imbalance {layer.imbalance_before:.4f} -> {layer.imbalance:.4f} "
                f"(gap {layer.gap:.4f}), {layer.moved_replicas} replicas move"
            )
