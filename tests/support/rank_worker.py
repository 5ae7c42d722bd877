"""A rank of the tests: waits for tasks on its standard input, and runs each in a process group of its own.

Importing torch takes seconds, so ranks are kept between tests; see `ranks` in conftest.py.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints must not mix with the answers
    modules: dict[Path, ModuleType] = {}
    while True:
        try:
            path, name, rank, size, store, timeout_s, arguments = pickle.load(tasks)
        except EOFError:
            return
        try:
            if path not in modules:
                modules[path] = load(path)
            limit = timedelta(seconds=timeout_s)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=size,
                timeout=limit,
            )
            try:
                answer = (True, getattr(modules[path], name)(*arguments))
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
