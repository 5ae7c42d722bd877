"""The pool of workers, where what matters is the order of two things in one turn of the event loop, or a hang."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

import pytest
from tests.support.daemon import WAIT_S, eventually

from moeplan.planner.daemon.budgets import Budgets
from moeplan.planner.daemon.metrics import Metrics
from moeplan.planner.daemon.settings import ServiceLimits
from moeplan.planner.daemon.tenants import Tenants
from moeplan.planner.daemon.workers import pool
from moeplan.planner.daemon.workers.pool import Workers
from moeplan.planner.daemon.workers.zygote import NICENESS


@pytest.mark.parametrize("free", [False, True])
def test_a_worker_that_is_free_as_one_gives_up_is_not_lost(free: bool) -> None:
    """Who waits is cancelled, or its time is over, and in the same turn a worker is free, before it has withdrawn."""

    async def give_up() -> None:
        workers = Workers(1, ServiceLimits(), Metrics(), Budgets(Tenants(None, None)))
        workers.start()
        try:
            end = time.monotonic() + WAIT_S
            worker = await workers._acquire(end, free, "first", 0)
            waiting = asyncio.create_task(workers._acquire(end, free, "second", 0))
            await asyncio.sleep(0)
            waiting.cancel()
            workers._free_running -= free
            workers._idle.append(worker)
            workers._hand_out()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
            async with asyncio.timeout(WAIT_S):
                assert await workers._acquire(end, free, "third", 0) is worker
        finally:
            await workers.stop()

    asyncio.run(give_up())


def test_workers_give_way_to_the_daemon() -> None:
    """Or a solve would delay messages, where there are more workers than free processors."""
    lower = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)

    async def start() -> None:
        workers = Workers(1, ServiceLimits(), Metrics(), Budgets(Tenants(None, None)))
        workers.start()
        try:
            worker = await workers._acquire(time.monotonic() + WAIT_S, free=True, caller="first", size=0)
            # It is there before it has lowered itself.
            await asyncio.to_thread(eventually, lambda: os.getpriority(os.PRIO_PROCESS, worker.pid) == lower)
        finally:
            await workers.stop()

    asyncio.run(start())


def test_a_zygote_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives, and gives no worker: nobody waits for it for ever."""
    monkeypatch.setattr(pool, "FORK_S", 0.5)

    async def hang() -> None:
        workers = Workers(1, ServiceLimits(), Metrics(), Budgets(Tenants(None, None)))
        workers.start()
        try:
            worker = await workers._acquire(time.monotonic() + WAIT_S, free=True, caller="first", size=0)
            assert workers._zygote is not None
            os.kill(workers._zygote.pid, signal.SIGSTOP)
            workers._free_running -= 1
            workers._replace(worker, "as a test wants it")
            again = await workers._acquire(time.monotonic() + WAIT_S, free=True, caller="second", size=0)
            assert again.pid != worker.pid
        finally:
            await workers.stop()

    asyncio.run(hang())
