"""Processors that this process may use: those it is bound to, within what its control groups grant."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["processors"]


def processors(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Processors, rounded down and at least 1; the quota of a container counts, also where the host has more.

    Args:
        groups: Where control groups are mounted (docs.kernel.org/admin-guide/cgroup-v2.html, or version 1).
        membership: File that names this process's groups.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        count = os.cpu_count() or 1
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = groups / controllers if controllers else groups
        group = root / path.lstrip("/")
        # Every group above grants at most its own quota. In a container the path may be the host's, and not be there.
        for folder in (group, *group.parents):
            quota = _quota(folder)
            if quota:
                count = min(count, int(quota))
            if folder == root:
                break
    return max(1, count)


def _quota(folder: Path) -> float:
    """Processors that a control group grants; 0 for no limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
            return 0.0 if quota == "max" else int(quota) / int(period)
        quota = (folder / "cpu.cfs_quota_us").read_text()
        return max(0.0, int(quota) / int((folder / "cpu.cfs_period_us").read_text()))
    except (OSError, ValueError):
        return 0.0
