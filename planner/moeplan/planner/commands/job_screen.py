"""The terminal view of a job: where it stands, drawn anew every second, also while its daemon is away."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import fmean

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moeplan.api.client import Client
from moeplan.api.errors import NotFoundError, UnavailableError
from moeplan.api.job_plans import JobPlan
from moeplan.api.jobs import Job

__all__ = ["Screen", "follow"]

PERIOD_S = 1.0
PLANS = 60
"""Plans in the sparklines."""

BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Screen:
    """State of a job as far as it is known.

    Attributes:
        job: The job as last read; None before the first time.
        plan: Its newest plan.
        before: Imbalance of the layouts in force when a plan was made, on its forecast, averaged over changed layers.
        planned: That of the plan's layouts.
        away_since: When the daemon stopped to answer, on the monotonic clock; None while it does.
    """

    job: Job | None = None
    plan: JobPlan | None = None
    before: deque[float] = field(default_factory=lambda: deque(maxlen=PLANS))
    planned: deque[float] = field(default_factory=lambda: deque(maxlen=PLANS))
    away_since: float | None = None

    def read(self, client: Client, name: str) -> bool:
        """Ask the daemon; whether there is a plan that was not known.

        Raises:
            ServiceError: it does not answer, or not well.
        """
        self.job = client.job(name)
        newest = self.job.status.plan_version
        known = max(newest - PLANS, 0) if self.plan is None else self.plan.version
        for version in range(known + 1, newest + 1):
            try:
                plan = client.plan(f"{name}/plans/{version}")
            except NotFoundError:  # the store keeps so many
                continue
            self.plan = plan
            changed = [layer for layer in plan.layers_after(version - 1) if layer.imbalance is not None]
            if changed:
                self.before.append(fmean(layer.imbalance_before or 1.0 for layer in changed))
                self.planned.append(fmean(layer.imbalance or 1.0 for layer in changed))
        self.away_since = None
        return newest > known

    def draw(self, now: datetime) -> Group:
        """The screen as of a moment, in UTC."""
        lines: list[Text | Table] = []
        if self.away_since is not None:
            away = time.monotonic() - self.away_since
            lines.append(Text(f"the daemon does not answer, for {away:.0f} s; trying again", style="bold red"))
        if self.job is None:
            return Group(*lines)
        spec, status = self.job.spec, self.job.status
        table = Table(title=self.job.name, title_justify="left", show_header=False, box=None, pad_edge=False)
        silent = spec.ranks - status.connected_ranks
        ranks = f"{status.connected_ranks} of {spec.ranks} report" + (f", {silent} silent" if silent else "")
        table.add_row("ranks", Text(ranks, style="red" if silent else "green"))
        table.add_row("step", "none yet" if status.closed_step is None else f"{status.closed_step:,}")
        age = "" if self.plan is None or self.plan.created is None else f", {_age(now - self.plan.created)} old"
        force = f", version {status.applied_version} in force" if status.applied_version else ""
        table.add_row("plan", f"version {status.plan_version}{age}{force}")
        if status.decision is not None:
            decision = status.decision
            detail = f": {decision.detail}" if decision.detail else ""
            words = decision.reason.value.replace("_", " ")
            # Not markup: what a rank says of a failure is in it.
            table.add_row("last decision", Text(f"{words} at step {decision.step}{detail}"))
        if self.planned:
            most = max(*self.before, *self.planned)
            table.add_row("imbalance before", Text(f"{sparkline(self.before, most)}  {self.before[-1]:.3f}"))
            table.add_row("as planned", Text(f"{sparkline(self.planned, most)}  {self.planned[-1]:.3f}"))
            table.add_row("", Text(f"plan by plan; bars from 1 to {most:.3f}, largest load over the mean", style="dim"))
        return Group(*lines, table)


def sparkline(values: Sequence[float], most: float) -> str:
    """Bars from 1 to `most`."""
    span = max(most - 1, 1e-9)
    return "".join(BARS[min(len(BARS) - 1, max(0, int((value - 1) / span * len(BARS))))] for value in values)


def follow(client: Client, name: str, count: int) -> None:
    """Show a job until `count` new plans have come, or for ever; a daemon that is away is waited for.

    Raises:
        ServiceError: the job does not exist, or the daemon refuses; or it has not answered even once.
    """
    screen = Screen()
    screen.read(client, name)
    seen = 1
    with Live(screen.draw(datetime.now(UTC)), auto_refresh=False, transient=False) as live:
        while not 0 < count <= seen:
            time.sleep(PERIOD_S)
            try:
                seen += screen.read(client, name)
            except UnavailableError:
                screen.away_since = screen.away_since or time.monotonic()
            live.update(screen.draw(datetime.now(UTC)), refresh=True)


def _age(age: timedelta) -> str:
    seconds = int(age.total_seconds())
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min"
