"""Planners of other projects, run from their own code, which is never part of this repository.

- SGLang's `deepseek` and `deepseek_vec`: two pure-torch modules of its wheel, downloaded once into a folder of the
  system's for temporary files.
- Those of `--peers DIR`, as far as its files are there: `eplb.py` of DeepSeek EPLB, the folder `vllm` with the files of
  `vllm/distributed/eplb/policy`, and the folder `vllm_ascend` with those of `vllm_ascend/eplb/core/policy` (FlashLB and
  `DefaultEplb`).
- TensorRT-LLM's, if it is installed.

All of them plan one layer for even splits, and all but `deepseek_vec` may put two replicas of an expert on one device.
Those that know one load vector are given the sum of the steps.
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from moeplan.solvers.problem.arrays import Int64

__all__ = ["Peer", "even_imbalance", "load_peers", "sglang_planner"]

SGLANG = "0.5.23"
CACHE = Path(tempfile.gettempdir()) / f"moeplan-bench-sglang-{SGLANG}"

Peer = Callable[[Int64, int, int], Int64]
"""A planner: int64[steps, experts] tokens, devices and slots of each to int64[devices, slots]."""


def even_imbalance(layout: Int64, tokens: Int64) -> float:
    """Largest load of a device over the mean, where replicas share an expert's tokens evenly, on one device too.

    Args:
        layout: int64[devices, slots], -1 for empty slots.
        tokens: int64[experts].
    """
    share = tokens / np.bincount(layout[layout >= 0], minlength=len(tokens))
    return float(np.where(layout >= 0, share[layout], 0.0).sum(axis=1).max() / tokens.sum() * len(layout))


def load_peers(folder: Path | None, names: Sequence[str] = ()) -> tuple[dict[str, Peer], dict[str, str]]:
    """The planners that are there by name, all or those named, and why each other is not."""
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name in names or LOADERS:
        try:
            found[name] = LOADERS[name](folder)
        except Exception as error:  # whatever keeps other people's code from running is reported, not hidden
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def sglang_planner(name: str) -> ModuleType:
    """One planner module of SGLang's wheel."""
    path = CACHE / f"{name}.py"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        print(f"downloading sglang {SGLANG} (once, into {CACHE})", file=sys.stderr)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE), f"sglang=={SGLANG}"],
            check=True,
        )
        with zipfile.ZipFile(next(CACHE.glob("sglang-*.whl"))) as wheel:
            for source in ("deepseek", "deepseek_vec"):
                text = wheel.read(f"sglang/srt/eplb/eplb_algorithms/{source}.py")
                (CACHE / f"{source}.py").write_bytes(text)
    return _module(f"sglang_{name}", path)


def _deepseek_vec(folder: Path | None) -> Peer:
    import torch

    planner = sglang_planner("deepseek_vec")

    def plan(tokens: Int64, devices: int, slots: int) -> Int64:
        weight = torch.tensor(tokens, dtype=torch.float32)[:, None]
        layout: Int64 = planner.rebalance_experts(weight, devices * slots, slots, None, 1, False)[0].numpy()
        return layout.reshape(devices, slots)

    return plan


def _deepseek(folder: Path | None) -> Peer:
    import torch

    planner = sglang_planner("deepseek")

    def plan(tokens: Int64, devices: int, slots: int) -> Int64:
        weight = torch.tensor(tokens.sum(axis=0))[None]
        layout: Int64 = planner.rebalance_experts(weight, devices * slots, None, 1, devices, False)[0].numpy()
        return layout.reshape(devices, slots)

    return plan


def _eplb(folder: Path | None) -> Peer:
    return _in_one_call(_module("deepseek_eplb", _file(folder, "eplb.py")).rebalance_experts, lambda answer: answer[0])


def _vllm(folder: Path | None) -> Peer:
    planner = _of_package(folder, "vllm", "default").DefaultEplbPolicy
    return _in_one_call(planner.rebalance_experts, lambda answer: answer)


def _in_one_call(rebalance: Callable[..., Any], layout_of: Callable[[Any], Any]) -> Peer:
    """A planner that is called as DeepSeek's is, with what its layout is in the answer."""
    import torch

    def plan(tokens: Int64, devices: int, slots: int) -> Int64:
        answer = rebalance(torch.tensor(tokens.sum(axis=0))[None], devices * slots, 1, 1, devices)
        layout: Int64 = layout_of(answer)[0].numpy().astype(np.int64)
        return layout.reshape(devices, slots)

    return plan


def _flashlb(folder: Path | None) -> Peer:
    with _stubs():
        planner = _of_package(folder, "vllm_ascend", "policy_flashlb")

    def plan(tokens: Int64, devices: int, slots: int) -> Int64:
        tree = planner.FlashTree(tokens.astype(np.float32), devices * slots, devices, planner.FlashLBConfig.z_score)
        layout: Int64 = tree.optimize_balanceness()[0].astype(np.int64)
        if (layout < 0).any():
            raise ValueError("FlashLB left slots empty, where its program keeps the layout in force")
        return layout

    return plan


def _ascend_default(folder: Path | None) -> Peer:
    planner = _of_package(folder, "vllm_ascend", "policy_default_eplb").DefaultEplb()

    def plan(tokens: Int64, devices: int, slots: int) -> Int64:
        total = tokens.sum(axis=0)
        current = np.resize(np.arange(len(total)), devices * slots)  # every slot in use, as the program expects
        each = total[current] / np.bincount(current)[current]
        shape = (1, devices, slots)
        return np.array(planner.rebalance_experts(current.reshape(shape), each.reshape(shape))[2][0], np.int64)

    return plan


def _tensorrt(folder: Path | None) -> Peer:
    runtime: Any = importlib.import_module("tensorrt_llm.bindings.internal.runtime")

    def plan(tokens: Int64, devices: int, slots: int) -> Int64:
        total = tokens.sum(axis=0)
        meta, placement = runtime.MoeLoadBalanceMetaInfo(), runtime.MoePlacementCpuInfo()
        meta.expert_count, meta.top_k, meta.ep_rank = len(total), 1, 0
        meta.ep_size, meta.slot_count_per_rank = devices, slots
        placement.rank_expert_ids = np.zeros((devices, slots), np.int64).tolist()
        runtime.do_replication(meta, total.astype(float).tolist(), placement)
        runtime.do_placement(meta, total.astype(float).tolist(), placement)
        return np.array(placement.rank_expert_ids, np.int64)

    return plan


LOADERS: dict[str, Callable[[Path | None], Peer]] = {
    "DeepSeek EPLB": _eplb,
    "SGLang deepseek": _deepseek,
    "SGLang deepseek_vec": _deepseek_vec,
    "TensorRT-LLM": _tensorrt,
    "vLLM default": _vllm,
    "FlashLB": _flashlb,
    "vllm-ascend default": _ascend_default,
}


def _file(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise FileNotFoundError("needs --peers DIR")
    return folder / name


def _module(name: str, path: Path) -> ModuleType:
    if not path.exists():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _of_package(folder: Path | None, package: str, name: str) -> ModuleType:
    """A module of a folder of `folder`, which its relative imports take for a package."""
    path = _file(folder, package) / f"{name}.py"
    parent = sys.modules.setdefault(f"peer_{package}", ModuleType(f"peer_{package}"))
    parent.__path__ = [str(path.parent)]
    return _module(f"peer_{package}.{name}", path)


@contextmanager
def _stubs() -> Iterator[None]:
    """Empty stand-ins for what FlashLB imports but its search never calls: vLLM's logger and its process groups."""
    stand_ins: dict[str, Any] = {
        "vllm": ModuleType("vllm"),
        "vllm.logger": SimpleNamespace(logger=logging.getLogger("vllm")),
        "vllm_ascend": ModuleType("vllm_ascend"),
        "vllm_ascend.distributed": ModuleType("vllm_ascend.distributed"),
        "vllm_ascend.distributed.parallel_state": SimpleNamespace(get_dynamic_eplb_group=None),
    }
    added = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
