"""The process that workers are forked from.

It imports the solvers and solves one small problem, so that a worker has compiled kernels from its first task on and
starts in milliseconds, also when it replaces one that was killed. It has one thread and none of the daemon's sockets,
so forking it is safe where forking the daemon would not be.

Standard input is a socket to the daemon. Each message brings a worker's socket; the answer is the worker's process id.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import select
import signal
import socket
import sys
import time

import numpy as np

from moeplan.api.jobs import JobSpec
from moeplan.planner.daemon.workers import frames, tasks, work
from moeplan.planner.daemon.workers.frames import FORK, Kind
from moeplan.planner.jobs.outlook import LayerOutlook
from moeplan.planner.jobs.solve import LayersTask, plan_layers
from moeplan.solvers import Cluster, Demand, Problem, SolveParameters, solve
from moeplan.solvers.problem.layout import Layout

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1

NICENESS = 3
"""Of workers, above the daemon's: where there are more of them than free processors, messages go first, which take the
daemon a tenth of a millisecond each. Other work of the same machine goes first too, but only where it is in the
daemon's own control group, and in the same session: the kernel divides a processor among those first. So only a
little: with 10, solves beside a training of the same session waited several times as long."""


def main() -> None:
    """Fork a worker for each message, until the daemon is gone."""
    _end_with_parent()  # also while it warms up, and does not look whether the daemon is there
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the whole group; the daemon decides
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps workers
    control = socket.socket(fileno=0)
    if select.select([control], [], [], 0)[0]:  # nothing comes before the first answer, but the end
        return
    _warm()
    gc.collect()
    gc.freeze()  # what workers share is never looked through, so its pages stay shared
    control.sendall(FORK.pack(os.getpid()))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, FORK.size, 1)
        if not message:
            return
        zygote, child = os.getpid(), os.fork()
        if child == 0:
            control.close()
            _end_with_parent()
            if os.getppid() != zygote:  # it ended before
                os._exit(0)
            _work(socket.socket(fileno=descriptors[0]), *FORK.unpack(message))
        os.close(descriptors[0])
        control.sendall(FORK.pack(child))


def _work(connection: socket.socket, memory_bytes: int) -> None:
    with contextlib.suppress(OSError):  # where a sandbox forbids it
        os.nice(NICENESS)
    with contextlib.suppress(ValueError):  # a harder limit is set already
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    status = 0
    try:
        while True:
            kind, payload = frames.receive(connection)
            try:
                for answer in work.do(kind, payload):
                    frames.send(connection, *answer)
            except Exception as error:
                frames.send(connection, Kind.ERROR, tasks.failure(error))
    except (EOFError, ConnectionError):
        pass
    except BaseException:
        status = 1
    finally:
        os._exit(status)


def _end_with_parent() -> None:
    """Ask the kernel to kill this process, busy or not, when its parent ends: the daemon, or of a worker the zygote."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _warm() -> None:
    """Load what workers need: the kernels of the default policy and of homes, for the types that requests bring."""
    cluster = Cluster.uniform(4, 3, nodes=2)
    tokens = np.arange(1, 65, dtype=np.int64).reshape(2, 4, 8) ** 2 % 97
    current = Layout.contiguous(8, cluster.slots)
    for spill_slots in (None, 1):
        spec = JobSpec(cluster, layers=1, experts=8, ranks=4, initial=(current,), spill_slots=spill_slots)
        outlook = LayerOutlook(spec, tuple(tokens), current)
        plan_layers(LayersTask((0,), (outlook,), "hybrid", SolveParameters(work_limit=8), time.monotonic() + 600))
    solve(Problem(cluster, Demand.of(tokens[0, 0])))


if __name__ == "__main__":
    main()
