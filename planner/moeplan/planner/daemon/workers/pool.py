"""Worker processes that solve: a fair, bounded queue, a time limit for each task, and replacement of those that die.

Jobs come first: free solves, which callers ask for, wait for them, and never take the last of several workers. Among
jobs each tenant has its turn, among free solves each caller, however many another has waiting.

A task that is cancelled, or that overruns, is ended by killing its worker: native solvers do not look for a flag.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass

import grpc
import structlog

from moeplan.planner.daemon.budgets import Budgets
from moeplan.planner.daemon.metrics import Metrics
from moeplan.planner.daemon.settings import ServiceLimits
from moeplan.planner.daemon.statuses import RefusalError, exhausted, unavailable
from moeplan.planner.daemon.traces import passed
from moeplan.planner.daemon.workers import frames, tasks
from moeplan.planner.daemon.workers.frames import FORK, Kind
from moeplan.planner.daemon.workers.turns import Turns

__all__ = ["Workers"]

OVERRUN_S = 1.0
"""Time past its limit after which a task is killed: searches stop by themselves within 20 ms, many times that where the
machine is overloaded, and a late plan is worth more to its caller than none."""

START_S = 180.0
"""Longest wait for the zygote: the very first one compiles every kernel."""

FORK_S = 30.0
"""Longest wait for a worker of a zygote that has started, which takes milliseconds. One that hangs is replaced, and
its other workers with it."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Worker:
    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.writer.close()


@dataclass(eq=False, slots=True)
class _Waiting:
    free: bool
    caller: str
    size: int
    worker: asyncio.Future[_Worker]


class Workers:
    """A pool of `size` workers. `start` it before use, `stop` it after.

    Args:
        size: Number of workers.
        limits: Of what waits, and of a worker's memory.
        metrics: To count in.
        budgets: Told of the seconds that workers solve for each caller.
    """

    def __init__(self, size: int, limits: ServiceLimits, metrics: Metrics, budgets: Budgets) -> None:
        self._size, self._limits, self._metrics, self._budgets = size, limits, metrics, budgets
        self._idle: deque[_Worker] = deque()
        self._all: dict[int, _Worker] = {}
        self._jobs: Turns[_Waiting] = Turns()
        self._free: Turns[_Waiting] = Turns()
        self._free_running = 0
        self._zygote: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._forking = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.ready = asyncio.Event()

    @property
    def size(self) -> int:
        """Number of workers."""
        return self._size

    @property
    def solve_s(self) -> float:
        """Longest that a solve may take, seconds."""
        return self._limits.solve_s

    def payer(self, job: str) -> str:
        """For whom the plans of a job, by its id, are solved."""
        return self._budgets.payer(job)

    @property
    def idle(self) -> int:
        """Number of workers that a free solve would get now."""
        return max(0, min(len(self._idle), self._free_most - self._free_running))

    @property
    def _free_most(self) -> int:
        return max(1, self._size - 1)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return sorted(self._all)

    def start(self) -> None:
        """Begin to start the workers; tasks wait until one is there."""
        for _ in range(self._size):
            self._later(self._add())

    async def stop(self) -> None:
        """Kill the workers, idle or not."""
        self._stopping = True
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for worker in list(self._all.values()):
            worker.kill()
        self._all.clear()
        await self._end_zygote()

    async def run(self, kind: Kind, payload: bytes, *, limit_s: float, label: str, caller: str = "") -> bytes:
        """Do a task with one answer; see `stream`.

        Raises:
            ProblemError: the task cannot be solved.
            RefusalError: the queue is full, the time is over, or the worker died.
        """
        answers = self.stream(kind, payload, limit_s=limit_s, label=label, caller=caller)
        return [answer async for answer in answers][-1]

    async def run_all(
        self, kind: Kind, payloads: Sequence[bytes], *, limit_s: float, label: str, caller: str = ""
    ) -> list[bytes]:
        """Do several tasks at once, each with one answer; all of them end before an error of one is raised.

        Raises:
            ProblemError: a task cannot be solved; the first of those that fail decides, here and below.
            RefusalError: the queue is full, the time is over, or the worker died.
        """
        tasks = (self.run(kind, payload, limit_s=limit_s, label=label, caller=caller) for payload in payloads)
        # To cancel the others would kill their workers.
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, bytes)]

    async def stream(
        self, kind: Kind, payload: bytes, *, limit_s: float, label: str, caller: str = ""
    ) -> AsyncGenerator[bytes]:
        """Do a task with any number of answers.

        Args:
            kind: What to do.
            payload: The task.
            limit_s: Seconds that it may take, the wait for a worker included.
            label: Name of the kind in the metrics.
            caller: Who asks for a free solve, or whose the job is.

        Raises:
            ProblemError: the task cannot be solved.
            RefusalError: the queue is full, the time is over, or the worker died.
        """
        end = time.monotonic() + limit_s
        asked = time.monotonic()
        try:
            worker = await self._acquire(end, kind is not Kind.LAYERS, caller, len(payload))
        finally:
            self._metrics.queue_wait.labels(label).observe(time.monotonic() - asked)
            passed("queue", asked)
        start = time.monotonic()
        self._metrics.busy.inc()
        outcome = "cancelled"
        clean = False
        try:
            async with asyncio.timeout(end + OVERRUN_S - start):
                await frames.write(worker.writer, kind, payload)
            while True:
                async with asyncio.timeout(end + OVERRUN_S - time.monotonic()):
                    answer, data = await frames.read(worker.reader)
                if answer is Kind.ERROR:
                    outcome, clean = "error", True
                    tasks.raise_failure(data)
                if answer is Kind.DONE:
                    outcome, clean = "done", True
                    if data:
                        yield data
                    return
                yield data
        except TimeoutError:
            outcome = "overrun"
            raise _too_late(limit_s) from None
        except (EOFError, ConnectionError):
            outcome = "died"
            raise unavailable("WORKER_DIED", "the worker that solved this died; try again", 0.1) from None
        except MemoryError:
            outcome = "memory"
            raise exhausted(
                "WORKER_MEMORY",
                f"a solve may use {self._limits.worker_bytes} bytes (limits.worker_bytes); ask for less",
                60,
            ) from None
        finally:
            took = time.monotonic() - start
            self._metrics.solve.labels(label).observe(took)
            self._budgets.spend(caller, took)
            self._metrics.solves.labels(label, outcome).inc()
            passed("worker", start, outcome=outcome, process=worker.pid)
            self._metrics.busy.dec()
            self._free_running -= kind is not Kind.LAYERS
            if clean:
                self._idle.append(worker)
            else:
                self._replace(worker, outcome)
            self._hand_out()

    async def _acquire(self, end: float, free: bool, caller: str, size: int) -> _Worker:
        while True:
            waiting = _Waiting(free, caller, size, asyncio.get_running_loop().create_future())
            if free and not self._idle:
                self._make_room(waiting)
            (self._free if free else self._jobs).add(waiting)
            self._hand_out()
            try:
                async with asyncio.timeout(max(end - time.monotonic(), 0)):
                    worker = await waiting.worker
            except BaseException as error:
                self._withdraw(waiting)
                if isinstance(error, TimeoutError):
                    raise _too_late(0, "waiting for a worker") from None
                raise
            if not worker.reader.at_eof():
                return worker
            self._free_running -= free
            self._replace(worker, "died idle")

    def _make_room(self, new: _Waiting) -> None:
        """Let a free solve wait: where the queue is full, in the place of who has most waiting there."""
        most = self._limits.queue_bytes
        while self._free.size + new.size > most:
            self._give_way(
                new,
                self._free.fullest(),
                lambda waiting: sum(one.size for one in waiting),
                new.size,
                f"solves of {self._free.size} bytes wait already (limits.queue_bytes = {most}); try later",
            )
        if self._depth >= self._limits.queue:
            self._give_way(
                new, self._free.longest(), len, 1, f"{self._depth} solves wait already (limits.queue); try later"
            )

    def _give_way(
        self, new: _Waiting, who: str, measure: Callable[[Sequence[_Waiting]], int], more: int, text: str
    ) -> None:
        """The last of who has most waiting gives way to a caller that would still have less; or that is refused."""
        theirs = self._free.of(who)
        refusal = exhausted("QUEUE_FULL", text, 0.5)
        if not theirs or who == new.caller or measure(theirs) <= measure(self._free.of(new.caller)) + more:
            raise refusal
        last = theirs[-1]
        self._free.remove(last)
        if not last.worker.done():
            last.worker.set_exception(refusal)

    @property
    def _depth(self) -> int:
        return len(self._jobs) + len(self._free)

    def _hand_out(self) -> None:
        """Give idle workers to who waits: jobs first, tenants in turn; then free solves, callers in turn."""
        while self._idle:
            if self._jobs:
                waiting = self._jobs.take()
            elif self._free and self._free_running < self._free_most:
                waiting = self._free.take()
            else:
                break
            if waiting.worker.done():  # cancelled, or out of time, just now: it has not withdrawn yet
                continue
            self._free_running += waiting.free
            waiting.worker.set_result(self._idle.popleft())
        self._metrics.queue.set(self._depth)

    def _withdraw(self, waiting: _Waiting) -> None:
        """Who waited has gone; a worker that it was given just then goes back."""
        if waiting.worker.done() and not waiting.worker.cancelled() and waiting.worker.exception() is None:
            self._free_running -= waiting.free
            self._idle.append(waiting.worker.result())
        else:
            (self._free if waiting.free else self._jobs).remove(waiting)
        self._hand_out()

    def _replace(self, worker: _Worker, why: str) -> None:
        worker.kill()
        self._all.pop(worker.pid, None)
        self._metrics.workers.set(len(self._all))
        if not self._stopping:
            self._metrics.worker_restarts.inc()
            log.info("worker replaced", pid=worker.pid, why=why)
            self._later(self._add())

    async def _add(self) -> None:
        delay_s = 0.1
        while True:
            try:
                worker = await self._fork()
                break
            except (OSError, EOFError, TimeoutError) as error:
                log.error("worker does not start", error=repr(error), retry_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, 10)
        self._all[worker.pid] = worker
        self._metrics.workers.set(len(self._all))
        self._idle.append(worker)
        self._hand_out()
        self.ready.set()

    async def _fork(self) -> _Worker:
        async with self._forking:
            control = await self._start_zygote()
            ours, theirs = socket.socketpair()
            try:
                async with asyncio.timeout(FORK_S):
                    await asyncio.to_thread(
                        socket.send_fds, control, [FORK.pack(self._limits.worker_bytes)], [theirs.fileno()]
                    )
                    (pid,) = FORK.unpack(await _exactly(control, FORK.size))
            except BaseException:
                ours.close()
                await self._end_zygote()  # before another worker is asked of it
                raise
            finally:
                theirs.close()
            reader, writer = await asyncio.open_connection(sock=ours, limit=2**16)
            return _Worker(pid, reader, writer)

    async def _start_zygote(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair()
        with theirs:
            self._zygote = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "moeplan.planner.daemon.workers.zygote",
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.DEVNULL,
            )
        ours.setblocking(False)
        try:
            async with asyncio.timeout(START_S):
                await _exactly(ours, FORK.size)
        except BaseException:
            ours.close()
            await self._end_zygote()
            raise
        self._control = ours
        return ours

    async def _end_zygote(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._zygote is not None:
            with contextlib.suppress(ProcessLookupError):
                self._zygote.kill()
            await self._zygote.wait()
            self._zygote = None

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _exactly(control: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = await asyncio.get_running_loop().sock_recv(control, length - len(data))
        if not part:
            raise EOFError("the zygote ended; its error is above in the log")
        data += part
    return data


def _too_late(limit_s: float, doing: str = "") -> RefusalError:
    text = f"the deadline passed {doing}".rstrip() + (f" ({limit_s:.3f} s)" if limit_s else "")
    return RefusalError(grpc.StatusCode.DEADLINE_EXCEEDED, text)
