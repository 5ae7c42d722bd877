"""Training scripts under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys

LIMIT_S = 90.0


def torchrun(*arguments: str, ranks: int = 2) -> str:
    """Run ranks to their end; what they wrote."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *arguments,
    ]
    paths = os.pathsep.join(filter(None, sys.path))
    # A store that torchrun keeps over restarts still has the gloo addresses of dead ranks (torch 2.13's dynamic
    # rendezvous makes one store for all rounds, pytorch#135712), and the second start then connects to those.
    environment = os.environ | {"PYTHONPATH": paths, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its ranks, which are in sessions of their own
            process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output
