"""Solve seconds of tenants: each may have workers solve for so many seconds a minute, and save up a minute's worth."""

from __future__ import annotations

import time

from moeplan.planner.daemon.statuses import exhausted
from moeplan.planner.daemon.tenants import Tenant, Tenants

__all__ = ["Budgets"]

MINUTE_S = 60.0


class Budgets:
    """Seconds that tenants have used; only of those that were checked, so that their number is bounded."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._left: dict[str, tuple[float, float]] = {}

    def check(self, tenant: Tenant) -> None:
        """Raise RefusalError for a tenant that has used up its seconds."""
        if tenant.solve_s is None:
            return
        now = time.monotonic()
        left, since = self._left.get(tenant.name, (tenant.solve_s, now))
        rate = tenant.solve_s / MINUTE_S
        left = min(tenant.solve_s, left + (now - since) * rate)
        self._left[tenant.name] = left, now
        if left <= 0:
            raise exhausted(
                "SOLVE_SECONDS",
                f"{tenant.name} has used its {tenant.solve_s:g} solve seconds a minute (solve_s of its tenant)",
                max(0.1, -left / rate),
            )

    def payer(self, job: str) -> str:
        """Name of the tenant whose job it is, by its id; empty for nobody's."""
        return self._tenants.of_job(job)

    def spend(self, name: str, seconds: float) -> None:
        """A worker has solved for a tenant, its jobs' plans included."""
        if name in self._left:
            left, since = self._left[name]
            self._left[name] = left - seconds, since
