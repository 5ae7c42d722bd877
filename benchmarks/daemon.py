"""Figures of the daemon, on this machine, over loopback, with everything as users start it.

    python benchmarks/daemon.py streams --jobs 16 --ranks 64 --seconds 60     1,024 rank streams, a report a second each
    python benchmarks/daemon.py streams --together                            the same, all jobs looking in one second
    python benchmarks/daemon.py streams --jobs 1 --ranks 1024 --seconds 60    the same as one job
    python benchmarks/daemon.py streams --jobs 1 --ranks 10000 --node 8       10,000 ranks, one stream for 8 of them
    python benchmarks/daemon.py saturation --ranks 1024 --seconds 20          as fast as the streams take it
    python benchmarks/daemon.py solve                                         Solve against the same solve in process
    python benchmarks/daemon.py restart --jobs 100                            kill -9, start, everything there

Results are JSON on standard output, and with --out in a file. Messages a second of the daemon's own processor time
depend less on what else the machine does than those a second. Latency of a plan: from the writing of the window's last
statistics to the plan's arrival at each rank, less the time that the daemon reports for the solve (decision to plan:
queue, solve and answer). `with_solve_ms` is the same without taking that off: what makes messages quick and solves slow
shows there.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from moeplan.api import wire
from moeplan.api.client import Client
from moeplan.api.jobs import Forecast, JobSpec, Replan
from moeplan.solvers import Cluster, Demand, Problem, SolveParameters, solve
from moeplan.v1 import planner_pb2, planner_pb2_grpc, solver_pb2
from result_file import write_result

LAYERS, EXPERTS = 8, 64
DISTINCT = 16
"""Steps after which loads repeat: more than a window, so that there is always something to plan."""
WORK = 10
"""Layouts that a solve may score: as many as it likes would leave the daemon no processor of a small machine."""
CLIENTS = max(2, min(8, (os.cpu_count() or 1) // 2))
"""Processes of clients: enough to have the daemon as busy as it can be, where there are cores for them."""
CONNECTIONS = 16
AHEAD = 2
"""Steps that a rank may be ahead of the last one where all go as fast as they can: ranks of a training go together."""


class Daemon:
    """A daemon in a process of its own."""

    def __init__(self, data: Path, *arguments: str) -> None:
        self.started = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "moeplan.planner.commands.main",
            "serve",
            "--data",
            str(data),
            "--metrics",
            "127.0.0.1:0",
        ]
        self.process = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0", *arguments], stderr=subprocess.PIPE, text=True
        )
        serving = self._await("serving")
        self.address = serving["address"]

    def _await(self, name: str) -> dict[str, Any]:
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            event: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == name:
                return event
        raise SystemExit(f"the daemon did not start:\n{''.join(said)}")

    def ready(self) -> None:
        """Wait for the workers."""
        self._await("workers ready")

    def mute(self) -> None:
        """Keep its log from filling the pipe."""
        assert self.process.stderr is not None
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def memory_mb(self) -> float:
        """Resident memory of the daemon itself."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def cpu_s(self) -> float:
        """Processor time of the daemon itself."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def messages(self, node: int) -> float:
        """Statistics messages that it has accepted, each of all layers and `node` ranks."""
        with Client(self.address) as client:
            return sum(found.status.statistics.accepted for found in client.jobs()) / LAYERS / node

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it."""
        self.process.send_signal(how)
        self.process.wait(60)


def job(ranks: int, devices: int, every: int) -> JobSpec:
    """A job of the benchmark; sources are merged where there are more of them than a window should hold."""
    return JobSpec(
        cluster=Cluster.uniform(devices, max(5, -(-EXPERTS // devices) + 1), nodes=max(1, devices // 8)),
        layers=LAYERS,
        experts=EXPERTS,
        ranks=ranks,
        merge_sources=True,
        forecast=Forecast(window_steps=4),
        replan=Replan(every_steps=every),
        parameters=SolveParameters(work_limit=WORK),
    )


async def _ranks(
    address: str, streams: list[tuple[str, range, float]], seconds: float, interval: float, done_steps: Any, own: int
) -> dict[str, Any]:
    """Ranks of one process; each reports a step, waits for its turn, and notes when plans come.

    `done_steps` has the steps that all ranks of each process have reported; `own` is this process.
    """
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(CONNECTIONS // CLIENTS)]
    rng = np.random.default_rng(len(streams))
    shape = (LAYERS, len(streams[0][1]), EXPERTS)
    payloads = [wire.write_array((rng.pareto(1.2, shape) * 50).astype(np.int32)) for _ in range(DISTINCT)]
    start = time.time() + 3.0
    sent_at: dict[tuple[str, int], float] = {}
    arrivals: list[tuple[str, int, float, float]] = []
    sent = acknowledged = 0
    reported = Counter[int]()
    allowed, moved = AHEAD, asyncio.Event()

    async def keep_together() -> None:
        nonlocal allowed, moved
        while allowed < sys.maxsize:
            await asyncio.sleep(0.001)
            newest = min(done_steps) + AHEAD if time.time() < start + seconds else sys.maxsize
            if newest > allowed:
                allowed, past, moved = newest, moved, asyncio.Event()
                past.set()

    async def node(number: int, name: str, ranks: range, phase: float) -> None:
        nonlocal sent, acknowledged
        stub: Any = planner_pb2_grpc.PlannerServiceStub(channels[number % len(channels)])
        call = stub.StreamRank()
        hello = planner_pb2.Hello(job=name, rank=ranks[0], reports_for=ranks, session=str(number))
        await call.write(planner_pb2.StreamRankRequest(hello=hello))
        credit = (await call.read()).welcome.credit
        room = asyncio.Semaphore(credit)
        done = 0

        async def receive() -> None:
            nonlocal acknowledged, done
            while (response := await call.read()) is not grpc.aio.EOF:
                kind = response.WhichOneof("message")
                if kind == "plan_update":
                    plan = response.plan_update.plan
                    took = wire.read_seconds(plan.solve_time)
                    arrivals.append((name, plan.decision.step, time.time(), took))
                elif kind == "acknowledgement":
                    for _ in range(response.acknowledgement.sequence - done):
                        room.release()
                    acknowledged += response.acknowledgement.sequence - done
                    done = response.acknowledgement.sequence

        receiver = asyncio.create_task(receive())
        step = 0
        while True:
            due = start + phase + step * interval
            if due > start + seconds:
                break
            if interval:
                await asyncio.sleep(max(0.0, due - time.time()))
            while not interval and step >= allowed:
                await moved.wait()
            if not interval and time.time() > start + seconds:
                break
            async with asyncio.timeout(60):
                await room.acquire()
            statistics = planner_pb2.Statistics(sequence=step + 1, step=step, tokens=payloads[step % DISTINCT])
            await call.write(planner_pb2.StreamRankRequest(statistics=statistics))
            sent_at[name, step] = max(sent_at.get((name, step), 0.0), time.time())
            sent += 1
            step += 1
            reported[step] += 1
            if reported[step] == len(streams):
                done_steps[own] = step
        await asyncio.sleep(1.0)
        await call.write(planner_pb2.StreamRankRequest(leave=planner_pb2.Leave()))
        await receiver

    together = asyncio.create_task(keep_together())
    await asyncio.gather(*(node(n, name, ranks, phase) for n, (name, ranks, phase) in enumerate(streams)))
    await together
    for channel in channels:
        await channel.close()
    return {
        "sent": sent,
        "acknowledged": acknowledged,
        "sent_at": [(*key, value) for key, value in sent_at.items()],
        "arrivals": arrivals,
    }


def _process(queue: Queue[Any], *arguments: Any) -> None:
    gc.disable()  # or what is measured are pauses of hundreds of ranks in one process, which no real rank has
    queue.put(asyncio.run(_ranks(*arguments)))


def streams(
    jobs: int, ranks: int, devices: int, every: int, seconds: float, interval: float, node: int, together: bool = False
) -> dict[str, Any]:
    """Ranks of `jobs` jobs, one stream for `node` of them, reporting every `interval` seconds.

    Jobs begin their steps spread over the time from one look to the next, as trainings of their own do; or over one
    interval, so that all look `together` in the same one.
    """
    spread = interval if together else interval * every
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder))
        daemon.ready()
        daemon.mute()
        with Client(daemon.address) as client:
            names = [client.create_job(f"job-{n}", job(ranks, devices, every)).name for n in range(jobs)]
        nodes = [range(first, first + node) for first in range(0, ranks, node)]
        all_streams = [(name, own, n * spread / jobs) for n, name in enumerate(names) for own in nodes]
        context = multiprocessing.get_context("spawn")
        queue: Queue[Any] = context.Queue()
        done_steps = context.Array("q", CLIENTS)
        workers = [
            context.Process(
                target=_process,
                args=(queue, daemon.address, all_streams[n::CLIENTS], seconds, interval, done_steps, n),
            )
            for n in range(CLIENTS)
        ]
        for worker in workers:
            worker.start()
        time.sleep(8)
        memory = [daemon.memory_mb()]
        cpu, began, before = daemon.cpu_s(), time.time(), daemon.messages(node)
        while time.time() - began < seconds - 10:
            time.sleep(1)
            memory.append(daemon.memory_mb())
        used_s, taken = daemon.cpu_s() - cpu, daemon.messages(node) - before
        cpu = used_s / (time.time() - began)
        results = [queue.get(timeout=seconds + 300) for _ in workers]
        for worker in workers:
            worker.join(60)
        with Client(daemon.address) as client:
            counts = [found.status.statistics for found in client.jobs()]
            versions = sum(found.status.plan_version for found in client.jobs())
        daemon.stop()
    last: dict[tuple[str, int], float] = {}
    for result in results:
        for name, step, when in result["sent_at"]:
            last[name, step] = max(last.get((name, step), 0.0), when)
    arrivals = [arrival for result in results for arrival in result["arrivals"]]
    whole = [(when - last[name, step]) * 1e3 for name, step, when, _ in arrivals]
    latencies = [all_ms - took * 1e3 for all_ms, (*_, took) in zip(whole, arrivals, strict=True)]
    sent = sum(result["sent"] for result in results)
    size = LAYERS * EXPERTS * 4 * node
    report: dict[str, Any] = {
        "streams": len(all_streams),
        "ranks": jobs * ranks,
        "jobs": jobs,
        "messages_sent": sent,
        "messages_accepted": sum(count.accepted for count in counts) / LAYERS / node,
        "late_or_early": sum(count.late + count.early for count in counts) / LAYERS / node,
        "messages_per_s": sent / seconds,
        "MB_per_s": sent * size / seconds / 1e6,
        "plan_versions": versions,
        "plans_received": len(latencies),
        "memory_MB_first": memory[0],
        "memory_MB_last": memory[-1],
        "daemon_cpu_cores": cpu,
        "messages_per_core_s": taken / used_s,
    }
    if latencies:
        for name, percent in (("median", 50), ("p99", 99), ("most", 100)):
            report[f"latency_ms_{name}"] = float(np.percentile(latencies, percent))
            report[f"with_solve_ms_{name}"] = float(np.percentile(whole, percent))
    return report


def solve_overhead(rounds: int) -> dict[str, Any]:
    """Solve of 8 layers, 64 experts, 16 devices: over loopback against in process, taken in turns.

    The client judges every plan again; that is counted apart, as a program in another language does not.
    """
    rng = np.random.default_rng(0)
    cluster = Cluster.uniform(16, 5, nodes=2)
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder))
        daemon.ready()
        daemon.mute()
        here, there, judged = [], [], []
        with Client(daemon.address) as client:
            for number in range(rounds + 5):
                tokens = (rng.pareto(1.2, (LAYERS, 16, EXPERTS)) * 500).astype(np.int64)
                problems = [Problem(cluster, Demand.of(layer)) for layer in tokens]
                start = time.perf_counter()
                for problem in problems:
                    solve(problem)
                middle = time.perf_counter()
                request = solver_pb2.SolveRequest(problems=[wire.write_problem(problem) for problem in problems])
                answer = client.solver.Solve(request)
                answered = time.perf_counter()
                for plan, problem in zip(answer.plans, problems, strict=True):
                    wire.read_plan(plan, problem)
                end = time.perf_counter()
                if number >= 5:
                    here.append(middle - start)
                    there.append(answered - middle)
                    judged.append(end - answered)
        daemon.stop()
    local, remote = np.array(here) * 1e3, np.array(there) * 1e3
    return {
        "in_process_ms_median": float(np.median(local)),
        "over_loopback_ms_median": float(np.median(remote)),
        "added_ms_median": float(np.median(remote - local)),
        "judging_ms_median": float(np.median(judged)) * 1e3,
    }


def restart(jobs: int) -> dict[str, Any]:
    """Kill -9 with jobs in the store; time from process start to the first answer, and what is there."""
    with tempfile.TemporaryDirectory() as folder:
        first = Daemon(Path(folder))
        first.ready()
        first.mute()
        with Client(first.address) as client:
            names = [client.create_job(f"job-{n}", job(2, 16, 1)).name for n in range(jobs)]
            for name in names:
                stub = client.planner.StreamRank(iter(_two_reports(name)), timeout=60)
                for response in stub:
                    if response.WhichOneof("message") == "plan_update":
                        break
                stub.cancel()
            before = {name: client.plan(f"{name}/plans/-").version for name in names}
        first.stop(signal.SIGKILL)
        times = []
        for _ in range(3):
            second = Daemon(Path(folder))
            with Client(second.address) as client:
                client.job(names[0])
                times.append(time.perf_counter() - second.started)
                after = {name: client.plan(f"{name}/plans/-").version for name in names}
            second.stop(signal.SIGKILL)
    return {"serving_after_s": times, "jobs": jobs, "all_plans_there": after == before}


def _two_reports(name: str) -> Any:
    hello = planner_pb2.Hello(job=name, rank=0, reports_for=[0, 1], session="benchmark")
    yield planner_pb2.StreamRankRequest(hello=hello)
    tokens = (np.random.default_rng(0).pareto(1.2, (LAYERS, 2, EXPERTS)) * 500).astype(np.int64)
    yield planner_pb2.StreamRankRequest(
        statistics=planner_pb2.Statistics(sequence=1, step=0, tokens=wire.write_array(tokens))
    )
    time.sleep(30)


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["streams", "saturation", "solve", "restart"])
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=64, help="ranks of each job")
    parser.add_argument("--devices", type=int, default=16, help="devices of each job")
    parser.add_argument("--every", type=int, default=5, help="steps from one plan to the next")
    parser.add_argument("--node", type=int, default=1, help="ranks that one stream reports for")
    parser.add_argument("--together", action="store_true", help="let all jobs look within the same second")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--commit", help="name of this checkout, where git cannot tell")
    given = parser.parse_args()
    if given.ranks % given.node:
        parser.error("--ranks must be a multiple of --node")
    match given.what:
        case "streams":
            report = streams(
                given.jobs, given.ranks, given.devices, given.every, given.seconds, 1.0, given.node, given.together
            )
        case "saturation":
            report = streams(1, given.ranks, given.devices, 10**9, given.seconds, 0.0, given.node)
        case "solve":
            report = solve_overhead(given.rounds)
        case _:
            report = restart(given.jobs)
    print(json.dumps(report, indent=2))
    if given.out:
        write_result(given.out, [report], commit=given.commit)


if __name__ == "__main__":
    main()
