"""Who changed what: one event ``audit`` for each change and each attempt, in the log whatever its level."""

from __future__ import annotations

import logging
import sys

import structlog

from moeplan.planner.daemon.tenants import CALLER

__all__ = ["audit"]


def audit(action: str, resource: str, result: str) -> None:
    """Write it down.

    Args:
        action: What was asked for, as the API names it.
        resource: Of what.
        result: A status code of gRPC.
    """
    caller = CALLER.get()
    chosen = structlog.get_config()
    log = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=chosen["processors"],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    log.info("audit", who=caller.tenant.name, peer=caller.peer, action=action, resource=resource[:200], result=result)
