"""A wall clock that jumps by a day while the daemon runs: leases, windows, deadlines and queues must not notice.

The daemon runs with a library that shifts the wall clock of its whole process, gRPC and SQLite included; the system's
own clock cannot be set without root.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.planner.daemon.test_solver_service import hard_problem
from tests.support.daemon import WAIT_S, DaemonProcess, Rank, Start, eventually, small_job, small_problem, tokens
from tests.support.preloaded import preloaded

from moeplan.api.client import Client
from moeplan.api.jobs import Closing
from moeplan.solvers import SolveParameters

DAY_S = 86_400


@dataclass(frozen=True)
class WallClock:
    """The wall clock of daemons that are started with `environment`."""

    library: Path
    file: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "WALL_CLOCK_FILE": str(self.file)}

    def shift(self, seconds: int) -> None:
        with self.file.open("r+b") as file:  # in place: daemons have it mapped
            file.write(struct.pack("=q", seconds))


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    library, file = preloaded("wall_clock", tmp_path), tmp_path / "offset"
    file.write_bytes(struct.pack("=q", 0))
    return WallClock(library, file)


def off_by(seconds: float) -> float:
    """How far a Unix time is from ours."""
    return seconds - time.time()


def made(client: Client, name: str) -> float:
    created = client.plan(f"{name}/plans/-").created
    assert created is not None
    return created.timestamp()


@pytest.mark.parametrize("jump_s", [pytest.param(DAY_S, marks=pytest.mark.slow), -DAY_S])
def test_a_jump_of_a_day_is_not_noticed(start: Start, clock: WallClock, jump_s: int) -> None:
    daemon = start(environment={**clock.environment, "MOEPLAN_LEASE_S": "1"}).serving()
    with daemon.client() as client:
        whole = client.create_job("whole", small_job()).name
        part = client.create_job("part", small_job(closing=Closing(timeout_s=1.0))).name
        rank, lonely = Rank(client, whole, 0, hello={"reports_for": [0, 1]}), Rank(client, part, 0)
        rank.report(0, tokens(0, ranks=2))
        version = rank.next("plan_update").plan.version
        lonely.report(0, tokens(0))
        eventually(lambda: client.job(part).status.statistics.accepted == 2)

        clock.shift(jump_s)  # with streams open and a step that waits for its time

        step = 1
        while made(client, whole) == pytest.approx(time.time(), abs=DAY_S / 2):
            rank.report(step, tokens(step, ranks=2))
            newer = rank.next("plan_update").plan.version
            assert newer > version
            step, version = step + 1, newer
            assert step < 50, "no plan bears the new time, so the clock did not jump"
        assert off_by(made(client, whole)) == pytest.approx(jump_s, abs=WAIT_S)

        # The step that waited closes by its own second, not at once and not in a day.
        status = eventually(lambda: (s := client.job(part).status).closed_step is not None and s, 20)
        assert (status.closed_step, status.statistics.missing) == (0, 2)
        lonely.report(1, tokens(1))
        eventually(lambda: client.job(part).status.closed_step == 1, 20)

        # A deadline that is given after the jump is met by a plan; so it is after the jump back.
        for shift in (jump_s, 0):
            clock.shift(shift)
            (plan,) = client.solve([small_problem()], parameters=SolveParameters(deadline_s=30, work_limit=100))
            assert plan.mean_imbalance >= 1
        time.sleep(1.2)  # more than two leases
        assert {job.status.owner for job in client.jobs()} == {daemon.address}
        assert not daemon.events("job lost to another daemon")
        rank.report(step, tokens(step + 1, ranks=2))
        rank.leave()
        lonely.leave()
    assert daemon.terminate() == 0


def test_a_solve_under_way_keeps_its_deadline(start: Start, clock: WallClock) -> None:
    """An anytime solve of 1.5 s, with a jump forth and one back within it, neither ends early nor goes on."""
    daemon = start(environment=clock.environment).serving()
    with daemon.client() as client:
        endless = SolveParameters(deadline_s=1.5, work_limit=2**31 - 1, target_gap=0.0)
        begun = time.monotonic()
        plans = client.solve_anytime(hard_problem(), parameters=endless)
        assert next(plans).gap > 0
        clock.shift(DAY_S)
        time.sleep(0.2)
        clock.shift(-DAY_S)
        rest = list(plans)
        assert time.monotonic() - begun >= 1.4 or (rest and rest[-1].gap == 0)


@pytest.mark.slow
def test_leases_are_the_databases(start: Start, clock: WallClock, postgres: str) -> None:
    """Two daemons a day apart share a store; the one ahead does not take the other's leases for over."""
    shared = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": "1"}
    first = start(environment=shared).serving(solver=False)
    clock.shift(DAY_S)
    with first.client() as client:
        name = client.create_job("shared", small_job()).name
        second: DaemonProcess = start(environment={**shared, **clock.environment}).serving(solver=False)
        time.sleep(2.5)  # more than two leases
        with second.client() as other:
            assert other.job(name).status.owner == client.job(name).status.owner == first.address
        assert not first.events("job lost to another daemon")
        assert not second.events("job taken over")
        client.delete_job(name)
