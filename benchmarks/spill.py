"""Spilling by known counts: balance, replicas and time of `quota` and LLEP, CP-SAT's answer, and how it all scales.

    python benchmarks/spill.py [TRACE:DEVICES ...] [--exact N] [--seconds S] [--hint] [--out FOLDER]

A trace is an .npz file with the array ``counts[step, layer, source, expert]``. Times are of one call for one layer on
one core, compiling left out: medians and 99th percentiles over the calls of a trace, each with its own counts. Without
traces only the synthetic loads are measured; without ``--exact`` CP-SAT is left out (it takes N * S seconds a row,
spread over the cores). Each kind of table has its own file: spill.json, spill-exact.json, spill-zipf.json and
spill-scaling.json.

The zipf loads follow the description of UltraEP's own solver test (Dots-Infra/UltraEP 94cab09, tests/utils.py):
8,192 tokens per rank choose 8 of 128 experts without replacement; the weights fall as a power of the rank, and within a
rank as the fourth power of the position, with the power that gives the wanted imbalance of the ranks. The random
numbers are not the same. UltraEP's replica counts are those that it reaches on such loads at its tolerance of 0.01.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from moeplan.solvers import ExactSpill, LlepPlanner, QuotaPlanner, SpillOptions, solve_exactly
from result_file import Columns, cells, write_result

Counts = npt.NDArray[Any]
Row = dict[str, Any]

ULTRAEP_REPLICAS = {1.5: 41, 2.0: 45, 2.5: 48, 3.0: 48}
TOLERANCES = {"tight": 5e-4, "loose": 0.01}
"""The default of `quota`, and UltraEP's."""
POLICY_COLUMNS: Columns = {
    "policy": ("policy", "{}"),
    "mean": ("mean", "{:.5f}"),
    "p95": ("p95", "{:.5f}"),
    "max": ("max", "{:.5f}"),
    "replicas": ("replicas", "{:.1f}"),
    "us_median": ("us p50", "{:.1f}"),
    "us_p99": ("us p99", "{:.1f}"),
    "us_batched": ("us batched", "{:.1f}"),
}
PASSES = 3
CONSOLE = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("traces", nargs="*", metavar="TRACE:DEVICES")
    parser.add_argument("--exact", type=int, default=0, metavar="N", help="instances per row that CP-SAT solves")
    parser.add_argument("--seconds", type=float, default=20.0, help="its time limit for each")
    parser.add_argument("--hint", action="store_true", help="let it start from the plan of `quota`")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the results, as JSON")
    arguments = parser.parse_args()
    policies: list[Row] = []
    exact: list[Row] = []
    for trace in arguments.traces:
        path, _, devices = trace.rpartition(":")
        counts = np.load(path)["counts"]
        layers = counts.reshape(-1, *counts.shape[2:]).astype(np.int32)
        policies += table_of_trace(path, layers, int(devices))
        if arguments.exact:
            sample = layers[np.linspace(0, len(layers) - 1, arguments.exact).astype(int)]
            exact += table_of_exact(path, sample, int(devices), arguments.seconds, arguments.hint)
    results = {
        "spill": policies,
        "spill-exact": exact,
        "spill-zipf": table_of_zipf(),
        "spill-scaling": table_of_sizes(),
    }
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, rows in results.items():
            if rows:
                write_result(arguments.out / f"{name}.json", rows)


def table_of_trace(path: str, layers: Counts, devices: int) -> list[Row]:
    _, sources, experts = layers.shape
    rows: list[Row] = []
    for spare in (2, 1):
        options = SpillOptions.uniform(experts, devices, spare)
        planner = QuotaPlanner(options, sources, dtype=layers.dtype)
        figures = measured(planner, layers)
        rows.append({"policy": f"quota, K={spare}", **figures, "us_batched": batched(options, layers)})
    static = QuotaPlanner(replace(options, spare=0 * options.spare), sources, dtype=layers.dtype)
    rows += [
        {"policy": "llep (ours)", **measured(LlepPlanner(options, sources), layers)},
        {"policy": "llep as published, pure Python", **measured_python(layers, devices)},
        {"policy": "static", **measured(static, layers)},
    ]
    table = new_table(f"{path} on {devices} devices", *(title for title, _ in POLICY_COLUMNS.values()))
    for row in rows:
        table.add_row(*cells(row, POLICY_COLUMNS))
    CONSOLE.print(table)
    instance = f"{Path(path).stem}, {devices} devices"
    return [{"instance": instance, **{key: row.get(key) for key in POLICY_COLUMNS}} for row in rows]


def table_of_exact(path: str, sample: Counts, devices: int, seconds: float, hint: bool) -> list[Row]:
    title = f"CP-SAT, {seconds:g} s on one thread{', starting from quota' if hint else ''}, {len(sample)} instances"
    table = new_table(
        title, "spare", "quota mean", "CP-SAT mean", "bound mean", "quota - CP-SAT: mean", "max", "proven"
    )
    rows = []
    for spare in (2, 1):
        options = SpillOptions.uniform(sample.shape[2], devices, spare)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            pairs = list(pool.map(ours_and_exact, sample, *map(itertools.repeat, (options, seconds, hint))))
        ours = np.array([mine for mine, _, _ in pairs])
        theirs = np.array([exact.makespan / balanced for _, exact, balanced in pairs])
        bounds = np.array([exact.bound / balanced for _, exact, balanced in pairs])
        figures = {
            "quota": float(ours.mean()),
            "cp_sat": float(theirs.mean()),
            "bound": float(bounds.mean()),
            "difference": float((ours - theirs).mean()),
            "largest_difference": float((ours - theirs).max()),
        }
        proven = sum(exact.optimal for _, exact, _ in pairs)
        rows.append({"instance": f"{Path(path).stem}, K={spare}", **figures, "proven": proven})
        table.add_row(f"K={spare}", *(f"{figure:.5f}" for figure in figures.values()), str(proven))
    CONSOLE.print(table)
    return rows


def ours_and_exact(
    counts: Counts, options: SpillOptions, seconds: float, hint: bool
) -> tuple[float, ExactSpill, float]:
    """Imbalance of `quota`, CP-SAT's answer on one thread, and the load of a perfectly balanced device."""
    plan = QuotaPlanner(options, len(counts), dtype=counts.dtype).plan(counts)
    return (
        plan.imbalance,
        solve_exactly(counts, options, time_limit_s=seconds, hint=plan if hint else None),
        plan.balanced,
    )


def table_of_zipf() -> list[Row]:
    table = new_table(
        "zipf, E128 on 64 devices, K=2",
        "rank / expert imbalance",
        "tolerance",
        "imbalance",
        "replicas",
        "UltraEP",
        "us p50",
    )
    rows: list[Row] = []
    for ratio, theirs in ULTRAEP_REPLICAS.items():
        counts = zipf_counts(128, 64, ratio, tokens=8192)
        tokens = counts.sum(axis=0)
        ranks = tokens.reshape(64, -1).sum(axis=1)
        row = {
            "imbalance_of_ranks": float(ranks.max() / ranks.mean()),
            "imbalance_of_experts": float(tokens.max() / tokens.mean()),
            "ultraep_replicas": theirs,
        }
        name = f"{row['imbalance_of_ranks']:.2f} / {row['imbalance_of_experts']:.2f}"
        for kind, tolerance in TOLERANCES.items():
            options = SpillOptions.uniform(128, 64, 2, tolerance=tolerance)
            imbalance, replicas, time = planned(options, counts)
            row |= {f"imbalance_{kind}": imbalance, f"replicas_{kind}": replicas, f"us_{kind}": time}
            peer = str(theirs) if kind == "loose" else "-"
            table.add_row(name, f"{tolerance:g}", f"{imbalance:.5f}", str(replicas), peer, f"{time:.1f}")
        rows.append(row)
    CONSOLE.print(table)
    return rows


def table_of_sizes() -> list[Row]:
    table = new_table(
        "scaling, zipf at rank imbalance 2", "experts", "devices", "spare", "imbalance", "replicas", "us p50"
    )
    rows: list[Row] = []
    for experts in (256, 512):
        by_spare: dict[int, Row] = {spare: {"experts": experts, "spare": spare} for spare in (2, 1)}
        for devices in (64, 128, 256):
            counts = zipf_counts(experts, devices, 2.0, tokens=512)
            for spare, row in by_spare.items():
                imbalance, replicas, time = planned(SpillOptions.uniform(experts, devices, spare), counts)
                row[f"imbalance_{devices}_devices"] = imbalance
                row[f"replicas_{devices}_devices"] = replicas
                row[f"us_{devices}_devices"] = time
                table.add_row(str(experts), str(devices), str(spare), f"{imbalance:.5f}", str(replicas), f"{time:.1f}")
        rows += by_spare.values()
    CONSOLE.print(table)
    return rows


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def measured(planner: QuotaPlanner | LlepPlanner, layers: Counts) -> dict[str, float]:
    planner.plan(layers[0])
    imbalance, replicas, seconds = [], [], []
    for counts in itertools.chain.from_iterable(itertools.repeat(layers, PASSES)):
        begin = perf_counter()
        plan = planner.plan(counts)
        seconds.append(perf_counter() - begin)
        imbalance.append(plan.imbalance)
        replicas.append(plan.replicas)
    return summary(imbalance, replicas, seconds)


def batched(options: SpillOptions, layers: Counts) -> float:
    """Microseconds per layer when one call plans all layers: what is left without the interpreter."""
    chunk = layers[: min(len(layers), 64)]
    planner = QuotaPlanner(options, layers.shape[1], layers=len(chunk), dtype=layers.dtype)
    seconds = []
    for _ in range(20):
        begin = perf_counter()
        planner.plan_layers(chunk)
        seconds.append(perf_counter() - begin)
    return float(np.median(seconds)) / len(chunk) * 1e6


def measured_python(layers: Counts, devices: int) -> dict[str, float]:
    imbalance, replicas, seconds = [], [], []
    for counts in layers[:: max(1, len(layers) // 100)]:
        begin = perf_counter()
        load, transfers = llep_as_published(counts.sum(axis=0).tolist(), devices)
        seconds.append(perf_counter() - begin)
        imbalance.append(max(load) / (sum(load) / devices))
        replicas.append(transfers)
    return summary(imbalance, replicas, seconds)


def summary(imbalance: Sequence[float], replicas: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(imbalance)),
        "p95": float(np.quantile(imbalance, 0.95)),
        "max": float(np.max(imbalance)),
        "replicas": float(np.mean(replicas)),
        "us_median": float(np.quantile(seconds, 0.5)) * 1e6,
        "us_p99": float(np.quantile(seconds, 0.99)) * 1e6,
    }


def planned(options: SpillOptions, counts: Counts, calls: int = 300) -> tuple[float, int, float]:
    """Imbalance and replicas of the plan of `quota`, and the median microseconds that it takes."""
    planner = QuotaPlanner(options, len(counts), dtype=counts.dtype)
    plan = planner.plan(counts)
    seconds = []
    for _ in range(calls):
        begin = perf_counter()
        planner.plan(counts)
        seconds.append(perf_counter() - begin)
    return plan.imbalance, plan.replicas, float(np.median(seconds)) * 1e6


def llep_as_published(
    tokens: list[int], devices: int, alpha: float = 1.0, smallest: int = 1024
) -> tuple[list[int], int]:
    """LLEP's algorithms 2 and 3 (arXiv 2601.17111) on Python lists: loads, and transfers with repeated pairs.

    As in its program, the devices are sorted anew for every chunk where the home has room for a part of the expert,
    and once per expert where the home is full.
    """
    each = len(tokens) // devices
    capacity = max(int(alpha * (sum(tokens) // devices)), 1)
    pending = [sum(tokens[d * each : (d + 1) * each]) for d in range(devices)]
    load = [0] * devices
    transfers = 0
    for expert in sorted(range(len(tokens)), key=lambda e: -tokens[e]):
        remaining, home = tokens[expert], expert // each
        pending[home] -= remaining
        room = capacity - load[home] - pending[home]
        stays = min(remaining, max(room, 0))
        load[home] += stays
        remaining -= stays
        order: list[int] = []
        while remaining > 0:
            if room > 0 or not order:
                order = sorted((d for d in range(devices) if d != home), key=lambda d: load[d] + pending[d])
            for device in order:
                chunk = min(remaining, capacity - load[device] - pending[device])
                if chunk > 0 and (chunk >= smallest or chunk == remaining):
                    break
            else:
                device, chunk = order[0], remaining
            load[device] += chunk
            transfers += 1
            remaining -= chunk
    return load, transfers


def zipf_counts(experts: int, ranks: int, ratio: float, *, tokens: int, top_k: int = 8, seed: int = 33) -> Counts:
    """int32[ranks, experts]: tokens of each expert from each rank, where ranks' loads have imbalance `ratio`."""
    low, high = 0.0, 8.0
    for _ in range(40):
        power = (low + high) / 2
        chosen = chance_of_choice(zipf_weights(experts, ranks, power), top_k).reshape(ranks, -1).sum(axis=1)
        low, high = (power, high) if chosen.max() < ratio * chosen.mean() else (low, power)
    weights = zipf_weights(experts, ranks, high).astype(np.float32)
    rng = np.random.default_rng(seed)
    counts = np.empty((ranks, experts), np.int32)
    for rank in range(ranks):
        # The k first arrivals of exponential clocks are a weighted choice without replacement.
        arrival = rng.standard_exponential((tokens, experts), dtype=np.float32) / weights
        counts[rank] = np.bincount(np.argpartition(arrival, top_k)[:, :top_k].ravel(), minlength=experts)
    return counts


def zipf_weights(experts: int, ranks: int, power: float) -> npt.NDArray[np.float64]:
    each = experts // ranks
    weights = np.outer(np.arange(1, ranks + 1) ** -power, np.arange(1, each + 1) ** -4.0).ravel()
    return weights / weights.sum()


def chance_of_choice(weights: npt.NDArray[np.float64], top_k: int) -> npt.NDArray[np.float64]:
    """Chance that each expert is among `top_k`: that its exponential clock rings before the time when k have rung."""
    low, high = 0.0, 1e9
    for _ in range(100):
        time = (low + high) / 2
        low, high = (time, high) if (1 - np.exp(-time * weights)).sum() < top_k else (low, time)
    return 1 - np.exp(-high * weights)


if __name__ == "__main__":
    main()
