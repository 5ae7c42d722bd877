"""Ranks of a gloo group, kept between tests: importing torch takes seconds."""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("rank_worker.py")
WORKERS = 4  # started together, as most of their start is importing torch


class Ranks:
    """Processes that run a function of a test file as the ranks of a gloo group. Every wait has a limit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._workers: list[subprocess.Popen[bytes]] = []
        self._runs = 0

    def __call__(self, size: int, function: Callable[..., Any], *arguments: object, timeout_s: float = 90) -> list[Any]:
        """The answers of `function(*arguments)` from ranks 0..size-1; an error on any of them fails the test."""
        while len(self._workers) < max(size, WORKERS):
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": "1",
                "TRITON_INTERPRET": "1",  # kernels of GPUs run on CPUs
            }
            self._workers.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
            )
        self._runs += 1
        store = str(self._folder / f"store{self._runs}")
        path, name = Path(inspect.getfile(function)), function.__name__
        workers = self._workers[:size]
        for rank, worker in enumerate(workers):
            assert worker.stdin is not None
            pickle.dump((path, name, rank, size, store, timeout_s / 2, arguments), worker.stdin)
            worker.stdin.flush()
        answers = self._answers(workers, time.monotonic() + timeout_s)
        failures = [f"rank {rank}:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        if failures:
            self.stop()  # a rank may be left inside a collective
            pytest.fail("\n".join(failures), pytrace=False)
        return [answer for _, answer in answers]

    def _answers(self, workers: list[subprocess.Popen[bytes]], end: float) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {worker.stdout: rank for rank, worker in enumerate(workers) if worker.stdout is not None}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, end - time.monotonic()))
            if not ready:
                answers |= dict.fromkeys(waiting.values(), (False, "no answer within the limit"))
                break
            for stream in ready:
                rank = waiting.pop(stream)
                try:
                    answers[rank] = pickle.load(stream)
                except EOFError:
                    answers[rank] = (False, f"the process ended with {workers[rank].wait(5)}")
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + 5)  # the others may be waiting for this one
        return [answers[rank] for rank in range(len(workers))]

    def close(self) -> None:
        """Let the ranks end, so that what counts their lines can write them down, and stop those that do not."""
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.close()
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(10)
        self.stop()

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait(10)
            for stream in (worker.stdin, worker.stdout):
                assert stream is not None
                stream.close()
        self._workers.clear()
