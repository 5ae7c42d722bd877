"""Steps of the example's model in every mode: what share of force-balanced training each of them reaches.

    torchrun --nproc-per-node 2 benchmarks/training.py --size large wide fine gpt-oss --out training.json
    torchrun --nproc-per-node 2 benchmarks/training.py --size large --against ec06be9=../moeplan-ec06be9
    torchrun --nproc-per-node 2 benchmarks/training.py --size large --mode sharded-device --planner --out training.json
    torchrun --nproc-per-node 2 benchmarks/training.py --size tiny        # on CPU cores: only whether it works
    python benchmarks/training.py --show training.json

Modes: `force-balanced` has a router that deals tokens out evenly to static experts: what the best balancing could
reach. `static` is plain expert parallelism; `quota` and `llep` lend experts in each pass; `sharded` experts have a
layout that is perfect for the step before, `sharded-quota` ones lend beyond it, and `sharded-copies` ones travel by
copy engines. `static-device`, `quota-device` and `sharded-device`, which travel by copy engines, too, run passes
without the host, and beside them `force-balanced-device`; in `static-graph` and `quota-graph` the whole step, optimizer
included, is a CUDA graph, and beside them `force-balanced-graph`. Shares are of the fastest of the force-balanced ones.
Sharded experts are measured under that router, too, each where a static one would be: what sharding alone costs.
Routing: `text` is what the routers choose, which have been trained for some steps on the example's text; `trace` deals
tokens out by the last steps of the recorded trace in `examples/traces`, with the busiest experts on the first ranks;
`skewed` has the squares of its loads.

Every rank is a process for this checkout, and one for each other checkout given, with the same weights, seeds and
text; they take turns. Weights stay as they are while steps are measured (the optimizer runs with a rate of zero), so
all modes route the same tokens to the same experts. Times are of steps until the slowest rank is done. `idle` is the
part of a profiled step in which no kernel runs on the busiest rank but such as wait for other ranks, as far as can be
told, from its first kernel to the end of its last.

With `--ahead` devices sleep before measured steps, so that the host is ahead of them, and times are the device's own:
what a step costs where the host's processor is no limit.

With `--planner` a daemon on this host plans the layouts of sharded experts while they train, from the layout in order
on: so many steps of each of two kinds of text. Told are the steps until imbalance is at most 1.03 and stays there,
switches, the age of the plans in use, the cores that the daemon kept busy, and the time of a step at the layouts in
force.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import runpy
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

START = time.perf_counter()
HERE = Path(__file__).resolve()
ROOTS = ("solvers", "planner", "runtime_client", "proto")
MODES = ("quota", "llep", "sharded")
LENDING = "sharded-quota"
DEVICE_MODES = ("static-device", "quota-device", "sharded-device")
GRAPH_MODES = ("static-graph", "quota-graph")
COPIES = "sharded-copies"
PLANNED = ("sharded-device", COPIES, "sharded")
"""Modes in which a daemon may plan layouts; of those asked for it does so in the first."""
SAMPLED = ("ms", "forward", "backward", "optimizer", "memory", "imbalance")
SIZES = ("tiny", "small", "large", "wide", "fine", "gpt-oss")
ROUTINGS = ("text", "trace", "skewed")
OLD_HOMES = {
    "runtime_client": {
        "ffn": ["ExpertShape"],
        "fsep": ["FullyShardedExperts", "chain"],
        "group": ["ExpertGroup", "Traffic"],
        "lending": ["LoanBuffer"],
        "spilling": ["ResidentExperts", "SpillPlanner"],
    },
    "solvers": {"spill": ["LlepPlanner", "QuotaPlanner", "SpillOptions"]},
}
"""Where checkouts up to ec06be9 keep the names that the model needs."""

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny"])
    modes = (*MODES, LENDING, COPIES, *DEVICE_MODES, *GRAPH_MODES)
    parser.add_argument("--mode", nargs="+", choices=modes, default=MODES, help="beside static")
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["text", "trace"])
    parser.add_argument("--batch", type=int, help="pieces of text of a rank in a step, if not the size's own")
    parser.add_argument("--train", type=int, default=20, help="steps that train the routers first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a mode in a round")
    parser.add_argument("--ahead", action="store_true", help="times of the device, with the host ahead of it")
    parser.add_argument("--planner", nargs="?", type=int, const=40, metavar="STEPS", help="train so long with a daemon")
    parser.add_argument("--commit", help="name of this checkout, where git cannot tell")
    parser.add_argument("--against", action="append", default=[], metavar="COMMIT=PATH", help="another checkout")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print the table of these results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for_gpus = (COPIES, *DEVICE_MODES, *GRAPH_MODES)
    if set(for_gpus) & set(arguments.mode) and not torch.cuda.is_available():
        parser.error(f"--mode {' '.join(for_gpus)}: need GPUs")
    if arguments.ahead and not torch.cuda.is_available():
        parser.error("--ahead: needs GPUs")
    if arguments.planner and not set(PLANNED) & set(arguments.mode):
        parser.error("--planner: plans layouts of sharded experts; add sharded or sharded-device to --mode")
    if arguments.show:
        print(table(json.loads(arguments.show.read_text())))
    elif arguments.worker:
        use(arguments.worker)
        runpy.run_path(str(HERE.with_name("training_worker.py")), run_name="__main__")
    else:
        checkouts = {arguments.commit or commit(): HERE.parents[1]}
        checkouts |= {
            name: Path(path).resolve() for name, _, path in (each.partition("=") for each in arguments.against)
        }
        measure(arguments, checkouts)


def commit() -> str:
    command = ["git", "-C", str(HERE.parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def use(root: Path) -> None:
    """Import moeplan from the checkout at `root`, and from no other."""
    others = [path for path in sys.path if not (Path(path) / "moeplan").is_dir()]
    sys.path[:] = [str(HERE.parents[1] / "examples"), *(str(root / each) for each in ROOTS), *others]
    if importlib.util.find_spec("moeplan.runtime_client.fsep"):
        for package, homes in OLD_HOMES.items():
            face = importlib.import_module(f"moeplan.{package}")
            for home, names in homes.items():
                module = importlib.import_module(f"moeplan.{package}.{home}")
                for name in names:
                    setattr(face, name, getattr(module, name))


class Rank:
    """The process that does this rank's work with one checkout."""

    def __init__(self, root: Path, port: int) -> None:
        self.newer = (root / "runtime_client/moeplan/runtime_client/device").is_dir()
        # A group of their own, not that of the processes that torchrun started.
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        command = [sys.executable, str(HERE), "--worker", str(root)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | own
        )

    def knows(self, mode: str) -> bool:
        """Whether the checkout has the mode."""
        return self.newer or not (mode in (LENDING, COPIES) or mode.endswith(("-device", "-graph")))

    def ask(self, name: str, **arguments: object) -> None:
        assert self.process.stdin is not None
        print(json.dumps([name, arguments]), file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a rank ended before its time; its error is above")
        return json.loads(line)

    def call(self, name: str, **arguments: object) -> Any:
        self.ask(name, **arguments)
        return self.answer()


@contextmanager
def started(root: Path, port: int) -> Iterator[Rank]:
    rank = Rank(root, port)
    try:
        yield rank
        assert rank.process.stdin is not None
        rank.process.stdin.close()
        rank.process.wait(60)
    finally:
        rank.process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def measure(arguments: argparse.Namespace, checkouts: dict[str, Path]) -> None:
    """Run all of it; the first rank prints what it finds, and writes it."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    ports = [free_port() for _ in checkouts]
    dist.broadcast_object_list(ports)
    is_first = dist.get_rank() == 0
    results: Result = {
        "commits": list(checkouts),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **{name: getattr(arguments, name) for name in ("rounds", "steps", "train", "ahead")},
        "sizes": {},
    }
    with ExitStack() as stack:
        ranks = {
            name: stack.enter_context(started(root, port))
            for (name, root), port in zip(checkouts.items(), ports, strict=True)
        }
        for size in arguments.size:
            results["machine"], results["sizes"][size] = measure_size(arguments, ranks, size, is_first)
            if is_first:
                print(f"\n{table(results | {'sizes': {size: results['sizes'][size]}})}\n", flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()


def measure_size(
    arguments: argparse.Namespace, ranks: dict[str, Rank], size: str, is_first: bool
) -> tuple[Result, Result]:
    """The machine; the model with the rows of all checkouts, routings and modes."""
    plan = {name: getattr(arguments, name) for name in ("batch", "train", "rounds", "steps", "ahead")}
    for rank in ranks.values():
        rank.ask("build", size=size, **plan)
    plan_layouts([[[1, 2], [2, 1]]])  # compiles it meanwhile
    described = [rank.answer() for rank in ranks.values()]
    losses = {name: rank.call("train") for name, rank in ranks.items()}
    if is_first:
        print(f"{size}: losses after {arguments.train} steps {losses}", flush=True)
    modes = ["static", *arguments.mode]
    even = ["force-balanced"]
    if set(DEVICE_MODES) & set(modes):
        even.append("force-balanced-device")
    if set(GRAPH_MODES) & set(modes):
        even.append("force-balanced-graph")
    even += [mode for mode in modes if mode.startswith("sharded")]
    cases = [*(("even", mode) for mode in even), *((routing, mode) for routing in arguments.routing for mode in modes)]
    rows: dict[tuple[str, str, str], Result] = {}
    in_order = np.arange(described[0]["size"]["experts"]).reshape(int(described[0]["machine"]["ranks"]), -1)
    layouts: dict[tuple[str, str], Any] = {
        (name, "even"): [in_order.tolist()] * int(described[0]["size"]["blocks"]) for name in ranks
    }
    expected: dict[tuple[str, str], float] = {}
    for nth in range(arguments.rounds):
        for routing, mode in cases:
            # No checkout is always the first.
            for name in list(ranks)[:: 1 if nth % 2 else -1]:
                if not ranks[name].knows(mode):
                    continue
                planned = layouts.get((name, routing)) if mode.startswith("sharded") else None
                sample = ranks[name].call("sample", mode=mode, routing=routing, nth=nth, layouts=planned)
                if mode == "static":
                    expected[name, routing] = sample["loss"]
                    layouts[name, routing] = plan_layouts(sample["counts"])
                elif abs(sample["loss"] - expected.get((name, routing), sample["loss"])) > 0.01 * sample["loss"]:
                    raise SystemExit(
                        f"{name}, {size}, {routing}: {mode} and static experts differ in what they compute"
                    )
                row = rows.setdefault((name, routing, mode), {key: [] for key in SAMPLED})
                for key in SAMPLED:
                    row[key].append(round(sample[key], 4))
        if is_first:
            print(f"{time.perf_counter() - START:.0f} s, {size}, round {nth + 1}: ", end="")
            print(", ".join(f"{' '.join(key)} {row['ms'][-1]:.1f}" for key, row in rows.items()), flush=True)
    ours, rank = next(iter(ranks.items()))
    beside = beside_planner(arguments, rank, size, is_first) if arguments.planner else {}
    for routing, mode in cases:
        planned = layouts.get((ours, routing)) if mode.startswith("sharded") else None
        rows[ours, routing, mode] |= rank.call("profile", mode=mode, routing=routing, layouts=planned)
    listed = [{"commit": name, "routing": routing, "mode": mode} | row for (name, routing, mode), row in rows.items()]
    return described[0]["machine"], described[0]["size"] | {"rows": listed} | beside


def beside_planner(arguments: argparse.Namespace, rank: Rank, size: str, is_first: bool) -> Result:
    """Sharded experts with a daemon on this host: what came of it, by routing; nothing on ranks but the first.

    They travel by copy engines, or run without the host, where that is measured, too.
    """
    from planner_beside import daemon, plan_steps, summary  # not above, as for plan_layouts

    shift, found = arguments.planner, {}
    mode = next(mode for mode in PLANNED if mode in arguments.mode)
    with ExitStack() as stack:
        planner = stack.enter_context(daemon([HERE.parents[1] / root for root in ROOTS])) if is_first else None
        told = [planner and planner.address]
        dist.broadcast_object_list(told)
        for routing in arguments.routing:
            if planner:
                planner.mark()
            job = f"{size}-{routing}"
            run = rank.call(
                "planned", mode=mode, routing=routing, address=told[0], job=job, steps=2 * shift, shift=shift
            )
            if planner:
                made_from = plan_steps(planner.address, job, run["version"])
                found[routing] = summary(run, made_from, shift, planner.load()) | {"mode": mode, "steps": run}
        dist.barrier()
    return {"planner": found}


def plan_layouts(counts: list[Any]) -> list[Any]:
    """Slots of each block, one more than needed on every rank: perfect for counts [blocks, ranks, experts]."""
    # Not above, as a worker imports this file before it knows from which checkout to import moeplan.
    from moeplan.solvers.construct.sliding_window import sliding_window

    blocks = np.array(counts, np.float64)
    _, devices, experts = blocks.shape
    width = -(-experts // devices) + 1
    return [sliding_window(block.sum(axis=0), np.arange(experts), devices, width).tolist() for block in blocks]


def table(results: Result) -> str:
    """Markdown: a row for each mode, with the time of the other checkouts beside it."""
    commits = results["commits"]
    columns = ["routing", "mode", "imbalance", "ms a step", "share", "forward", "backward", "optimizer", "GiB", "idle"]
    columns += [f"{name}: ms, share" for name in commits[1:]]
    machine = results["machine"]
    lines = [
        f"{machine['ranks']} x {machine['device']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{results['date']}, commit {commits[0]}; medians of {results['rounds']} rounds (least to most)"
        f"{', the host ahead' if results.get('ahead') else ''}"
    ]
    for name, size in results["sizes"].items():
        dimensions = "{hidden:,} x {width:,}, {experts} experts, top-{choices}, {blocks} blocks, {tokens:,} tokens"
        lines += ["", f"`{name}`: {dimensions.format(**size)} a rank", ""]
        lines += [f"| {' | '.join(columns)} |", f"|---|---|{'---:|' * (len(columns) - 2)}"]
        rows = {(row["commit"], row["routing"], row["mode"]): row for row in size["rows"]}
        for (commit, routing, mode), row in rows.items():
            if commit != commits[0]:
                continue
            cells = [routing, mode, f"{statistics.median(row['imbalance']):.2f}", spread(row["ms"])]
            cells += [share(rows, commit, row)]
            parts = [statistics.median(row[part]) for part in ("forward", "backward", "optimizer")]
            cells += ["" if mode.endswith("-graph") else f"{part:.1f}" for part in parts]
            cells += [f"{max(row['memory']) / 2**30:.1f}" if any(row["memory"]) else ""]
            cells += [idle(row)]
            for other in commits[1:]:
                peer = rows.get((other, routing, mode))
                cells.append(f"{statistics.median(peer['ms']):.1f}, {share(rows, other, peer)}" if peer else "")
            lines.append(f"| {' | '.join(cells)} |")
        lines += planner_table(size, rows, commits[0])
    return "\n".join(lines)


def planner_table(size: Result, rows: dict[tuple[str, str, str], Result], commit: str) -> list[str]:
    """A row for each routing that was trained with a daemon."""
    columns = ["planned by a daemon", "mode", "steps until balanced", "switches", "plan age", "daemon's cores"]
    columns += ["imbalance", "ms a step", "share"]
    lines = (
        ["", f"| {' | '.join(columns)} |", f"|---|---|{'---:|' * (len(columns) - 2)}"] if size.get("planner") else []
    )
    for routing, told in size.get("planner", {}).items():
        until = ", ".join("never" if steps is None else str(steps) for steps in told["until_balanced"])
        age = "" if told["plan_age"] is None else f"{told['plan_age']:.1f}"
        cells = [routing, told.get("mode", "sharded"), until, str(told["switches"]), age, f"{told['daemon_cores']:.2f}"]
        cells += [f"{told['imbalance_first']:.2f} to {told['imbalance']:.2f}", f"{told['ms']:.1f}"]
        cells += [share(rows, commit, {"ms": [told["ms"]]})]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def share(rows: dict[tuple[str, str, str], Result], commit: str, row: Result) -> str:
    """Part of the force-balanced throughput of the same checkout, with the faster way to run it."""
    balanced = [
        statistics.median(each["ms"])
        for (name, _, mode), each in rows.items()
        if name == commit and mode.startswith("force-balanced")
    ]
    return percent(min(balanced) / statistics.median(row["ms"]))


def idle(row: Result) -> str:
    """Part of a step without work. Older results have only kernels of a profiled step beside a step that was not."""
    if "busy_share" not in row:
        row = {**row, "busy_share": row["busy"] and row["busy"] / statistics.median(row["ms"])}
    share = row["busy_share"]
    return "" if share is None or share > 1 else percent(1 - share)


def percent(part: float) -> str:
    return f"{100 * part:.0f} %"


if __name__ == "__main__":
    main()
