"""The parent of the ranks of tests, on whose standard input ranks are asked for, and the ranks.

A rank waits for tasks on its socket, and runs each in a process group of its own; see `ranks` in conftest.py. The
parent has imported torch and has one thread, so that forking it is safe and takes milliseconds.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pickle
import socket
import sys
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

SHARED = ("layers.sharded", "layers.resident", "planning.session")
"""What most tests of ranks import, as slowly as torch."""


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Fork a rank for each message, which brings its socket."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for module in SHARED:
        importlib.import_module(f"moeplan.runtime_client.{module}")
    control = socket.socket(fileno=0)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            break
        if os.fork() == 0:
            control.close()
            with Connection(descriptors[0]) as tasks:
                serve(tasks)
            return
        os.close(descriptors[0])
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def serve(tasks: Connection[Any, Any]) -> None:
    """Run tasks, one after the other, and answer."""
    modules: dict[Path, ModuleType] = {}
    while True:
        try:
            path, name, rank, size, store, timeout_s, arguments = pickle.loads(tasks.recv_bytes())
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
            dist.barrier()  # a task that ends at once would close connections that others are still making
            try:
                answer = (True, getattr(modules[path], name)(*arguments))
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = (False, traceback.format_exc())
        tasks.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
