"""Ranks of a gloo group, kept between tests. One process imports torch, which takes seconds; ranks fork from it."""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("rank_worker.py")


class Ranks:
    """Processes that run a function of a test file as the ranks of a gloo group. Every wait has a limit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parent: subprocess.Popen[bytes] | None = None
        self._control: socket.socket
        self._workers: list[Connection[Any, Any]] = []
        self._runs = 0

    def __call__(self, size: int, function: Callable[..., Any], *arguments: object, timeout_s: float = 90) -> list[Any]:
        """The answers of `function(*arguments)` from ranks 0..size-1; an error on any of them fails the test."""
        while len(self._workers) < size:
            self._add()
        self._runs += 1
        store = str(self._folder / f"store{self._runs}")
        path, name = Path(inspect.getfile(function)), function.__name__
        workers = self._workers[:size]
        for rank, worker in enumerate(workers):
            # Not worker.send, by which torch would share the memory of tensors.
            worker.send_bytes(pickle.dumps((path, name, rank, size, store, timeout_s / 2, arguments)))
        answers = self._answers(workers, time.monotonic() + timeout_s)
        failures = [f"rank {rank}:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        if failures:
            self.stop()  # a rank may be left inside a collective
            pytest.fail("\n".join(failures), pytrace=False)
        return [answer for _, answer in answers]

    def _add(self) -> None:
        """Have a rank forked."""
        if self._parent is None:
            self._control, theirs = socket.socketpair()
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TRITON_INTERPRET": "1",  # kernels of GPUs run on CPUs
            }
            with theirs:
                self._parent = subprocess.Popen(
                    [sys.executable, str(WORKER)], stdin=theirs.fileno(), env=environment, start_new_session=True
                )
        mine, worker = Pipe()
        with worker:
            socket.send_fds(self._control, [b"1"], [worker.fileno()])
        self._workers.append(mine)

    def _answers(self, workers: list[Connection[Any, Any]], end: float) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {worker: rank for rank, worker in enumerate(workers)}
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                answers |= dict.fromkeys(waiting.values(), (False, "no answer within the limit"))
                break
            for worker in [worker for worker in waiting if worker in ready]:
                rank = waiting.pop(worker)
                try:
                    answers[rank] = pickle.loads(worker.recv_bytes())
                except (EOFError, ConnectionError):
                    answers[rank] = (False, "the process ended")
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + 5)  # the others may be waiting for this one
        return [answers[rank] for rank in range(len(workers))]

    def close(self) -> None:
        """Let the ranks end, so that what counts their lines can write them down, and stop those that do not."""
        self._let_go()
        if self._parent is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._parent.wait(10)
        self.stop()

    def stop(self) -> None:
        self._let_go()
        if self._parent is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._parent.pid, signal.SIGKILL)
            self._parent.wait(10)
            self._parent = None

    def _let_go(self) -> None:
        """Close the sockets, at which who is idle ends."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        if self._parent is not None:
            self._control.close()
