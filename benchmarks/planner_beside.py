"""A daemon beside the training that `training.py` measures, and what it did for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BALANCED = 1.03
"""Imbalance at which a layout counts as balanced."""

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Daemon:
    """`moeplan serve` on this host.

    Attributes:
        address: Where it listens.
    """

    process: subprocess.Popen[bytes]
    address: str
    _since: tuple[float, float] = field(default=(0.0, 0.0))

    def mark(self) -> None:
        """Begin to measure its load."""
        self._since = time.perf_counter(), self._cpu_s()

    def load(self) -> float:
        """Cores that it and its workers kept busy since `mark`."""
        wall, cpu = self._since
        return (self._cpu_s() - cpu) / (time.perf_counter() - wall)

    def _cpu_s(self) -> float:
        """Seconds of processor time of the daemon and of all that it started."""
        pids, ticks = [self.process.pid], 0
        while pids:
            pid = pids.pop()
            try:
                # After the name, which ends with the last bracket: user and system time, of it and of ended children.
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            except OSError:
                continue
        return ticks / TICKS


@contextmanager
def daemon(roots: Sequence[Path]) -> Iterator[Daemon]:
    """A daemon with an empty store, of the checkout at `roots`, until the end; it solves once this returns."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "moeplan.planner.commands.main", "serve", "--data", f"{folder}/data"]
        command += ["--listen", f"unix:{folder}/planner", "--workers", "1"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(b"{") and json.loads(line)["event"] == "workers ready":
                    break
            else:
                raise SystemExit("the daemon did not start; see what `moeplan serve` says")
            log = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)  # so that it never blocks
            yield Daemon(process, f"unix:{folder}/planner")
        finally:
            process.terminate()
            process.wait(60)
        log.wait(10)


def plan_steps(address: str, job: str, versions: Sequence[int]) -> dict[int, int]:
    """The newest step that each version of a job's plan was made from; -1 for the layouts of the start."""
    from moeplan.api import Client

    steps = {0: -1}
    with Client(address) as client:
        for version in sorted(set(versions) - {0}):
            decision = client.plan(f"jobs/{job}/plans/{version}").decision
            steps[version] = decision.step if decision.reason.value != "initial" else -1
    return steps


def summary(run: dict[str, Any], made_from: dict[int, int], shift: int, load: float) -> dict[str, Any]:
    """What the planner did.

    Args:
        run: ``ms``, ``imbalance``, ``version`` of each step.
        made_from: Newest step in the window of each version.
        shift: Steps of one kind of text.
        load: Cores that the daemon kept busy.

    Returns:
        ``until_balanced``: for each kind of text, steps until imbalance is at most `BALANCED` and on average stays so
        for the rest; None where it does not. ``switches``; ``plan_age``: steps between the newest that a layout was
        planned from and the one that it is used in, on average; ``daemon_cores``; ``ms`` and ``imbalance``: medians of
        the second half of each kind of text, at the layouts in force; ``imbalance_first``: of the first step.
    """
    imbalance, version = np.array(run["imbalance"]), run["version"]
    starts = range(0, len(imbalance), shift)
    late = np.concatenate([np.arange(start + shift // 2, min(start + shift, len(imbalance))) for start in starts])
    ages = [step - made_from[each] for step, each in enumerate(version) if made_from[each] >= 0]
    return {
        "until_balanced": [_until_balanced(imbalance[start : start + shift]) for start in starts],
        "switches": int(np.count_nonzero(np.diff(version))),
        "plan_age": float(np.mean(ages)) if ages else None,
        "daemon_cores": round(load, 3),
        "ms": float(np.median(np.array(run["ms"])[late])),
        "imbalance": float(np.median(imbalance[late])),
        "imbalance_first": float(imbalance[0]),
    }


def _until_balanced(imbalance: Any) -> int | None:
    for step in range(len(imbalance)):
        if imbalance[step] <= BALANCED and imbalance[step:].mean() <= BALANCED:
            return step
    return None
