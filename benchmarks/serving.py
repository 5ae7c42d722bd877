"""Layouts for serving engines beside those of the engines' own planners, under their even split.

    python benchmarks/serving.py TRACE:DEVICES:SLOTS ... [--peers FOLDER] [--out FILE.json]

Plans are made from ten steps and judged on the one after them, every 20 steps. Peers are read from a folder with their
wheels unpacked (`pip download --no-deps sglang vllm`, then unzip); one that is not there is named. They may put two
replicas of an expert on one device, which gives them more freedom; `twice` counts such slots.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moeplan.planner.traces.trace import Trace
from moeplan.runtime_client.integrations.serving_policy import plan_slots
from moeplan.solvers.problem.arrays import Int64
from result_file import write_result

WINDOW, EVERY = 10, 20
Planner = Callable[[Int64, int, int], Int64]
"""From loads [steps, experts], slots and devices to the expert of each slot."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="+", metavar="TRACE:DEVICES:SLOTS")
    parser.add_argument("--peers", type=Path, help="folder with unpacked wheels of sglang and vllm")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    planners: dict[str, Planner | None] = {"moeplan": ours, **peers(arguments.peers)}
    rows: list[dict[str, Any]] = []
    for text in arguments.traces:
        path, devices, slots = text.rsplit(":", 2)
        rows += measure(Trace.open(path), Path(path).stem, int(devices), int(slots), planners)
    table = Table("trace", "planner", "on the window", "next step", "p95", "twice", "ms a layer")
    for row in rows:
        if row["next_step"] is None:
            table.add_row(row["trace"], row["planner"], "not there")
            continue
        numbers = [f"{row[key]:.4f}" for key in ("window", "next_step", "p95")]
        table.add_row(row["trace"], row["planner"], *numbers, f"{row['twice']:.1%}", f"{row['ms']:.1f}")
    Console().print(table)
    if arguments.out:
        write_result(arguments.out, rows)


def measure(
    trace: Trace, name: str, devices: int, slots: int, planners: dict[str, Planner | None]
) -> list[dict[str, Any]]:
    """A row per planner."""
    found: dict[str, list[tuple[float, float, float, float]]] = {each: [] for each in planners}
    windows = list(trace.windows(WINDOW, EVERY))
    for window in track(windows, name, transient=True):
        for layer in range(trace.layers):
            history, after = window.history[:, layer].sum(axis=1), window.next[layer].sum(axis=0)
            for each, planner in planners.items():
                if planner is None:
                    continue
                start = time.perf_counter()
                layout = planner(history, devices * slots, devices)
                seconds = time.perf_counter() - start
                twice = 1 - sum(len(set(row)) for row in layout.reshape(devices, -1).tolist()) / layout.size
                fitted = float(np.mean([imbalance(layout, step, devices) for step in history]))
                found[each].append((fitted, imbalance(layout, after, devices), twice, seconds))
    rows = []
    for each, values in found.items():
        row: dict[str, Any] = {"trace": name, "planner": each, "devices": devices, "slots": slots}
        if not values:
            rows.append({**row, "window": None, "next_step": None, "p95": None, "twice": None, "ms": None})
            continue
        window_, next_, twice_, seconds_ = np.array(values).T
        rows.append(
            {
                **row,
                "window": float(window_.mean()),
                "next_step": float(next_.mean()),
                "p95": float(np.quantile(next_, 0.95)),
                "twice": float(twice_.mean()),
                "ms": 1e3 * float(np.median(seconds_)),
            }
        )
    return rows


def imbalance(slots: Int64, loads: Int64, devices: int) -> float:
    """Largest load of a device over the mean, where an expert's replicas share its tokens evenly."""
    share = loads / np.bincount(slots, minlength=len(loads))
    of_device = share[slots].reshape(devices, -1).sum(axis=1)
    return float(of_device.max() / of_device.mean())


def ours(loads: Int64, slots: int, devices: int) -> Int64:
    """The layout that the plug-ins give."""
    return plan_slots(loads[:, np.newaxis], slots, devices, groups=1, nodes=1)[0]


def peers(folder: Path | None) -> dict[str, Planner | None]:
    """Planners of the engines, None where they are not there."""
    names = ("SGLang deepseek", "SGLang deepseek_vec", "vLLM default")
    if folder is None:
        return dict.fromkeys(names)
    for name in ("sglang", "sglang.srt", "sglang.srt.eplb", "vllm", "vllm.distributed", "vllm.distributed.eplb"):
        module = types.ModuleType(name)  # without the parts that need a GPU
        module.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = module
    sys.modules["vllm.config"] = types.ModuleType("vllm.config")
    parallel: Any = types.ModuleType("vllm.config.parallel")
    parallel.EPLBPolicyOption = typing.Literal["default"]
    sys.modules["vllm.config.parallel"] = parallel
    sglang: Any = importlib.import_module("sglang.srt.eplb.eplb_algorithms")
    vllm: Any = importlib.import_module("vllm.distributed.eplb.policy")

    def by_sglang(algorithm: Any) -> Planner:
        def plan(loads: Int64, slots: int, devices: int) -> Int64:
            counts = torch.from_numpy(loads[:, np.newaxis])
            physical, *_ = sglang.rebalance_experts(counts, slots, slots // devices, None, 1, algorithm)
            return np.asarray(physical[0], np.int64)

        return plan

    def by_vllm(loads: Int64, slots: int, devices: int) -> Int64:
        weight = torch.from_numpy(loads.sum(axis=0)[np.newaxis])
        return np.asarray(vllm.EPLB_POLICIES["default"].rebalance_experts(weight, slots, 1, 1, devices)[0], np.int64)

    algorithms = sglang.EplbAlgorithm
    return dict(zip(names, (by_sglang(algorithms.deepseek), by_sglang(algorithms.deepseek_vec), by_vllm), strict=True))


if __name__ == "__main__":
    main()
