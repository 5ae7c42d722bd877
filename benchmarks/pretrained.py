"""Memory of ranks that load and save a Hugging Face checkpoint, against transformers and `replace_experts` on each.

    torchrun --nproc-per-node 4 benchmarks/pretrained.py

Makes a random Qwen3-MoE of 64 experts a layer in a temporary folder. Memory is the peak of a process's anonymous pages
(what it allocates, without mapped files) above those before, sampled each millisecond; of the rank with most.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moeplan.runtime_client import (
    ExpertGroup,
    FullyShardedExperts,
    ResidentExperts,
    load_pretrained,
    replace_experts,
    save_pretrained,
)
from result_file import write_result

RESULT = Path(__file__).parent / "results/pretrained-4-ranks.json"


def anonymous_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(line.split()[1])


def peak_of(work: Callable[[], Any]) -> tuple[int, Any]:
    """Growth of the memory while something runs, and what it returns."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what an earlier work has freed would be there for this one
    before, over, samples = anonymous_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.001):
            samples.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    over.set()
    watcher.join()
    return max(samples) - before, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    dist.init_process_group("gloo")
    group = ExpertGroup.create()
    assert group is not None
    folder = [tempfile.mkdtemp()] if group.rank == 0 else [""]
    dist.broadcast_object_list(folder)
    source = Path(folder[0]) / "source"
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=8192, hidden_size=1024,
        moe_intermediate_size=512, num_experts=64, num_experts_per_tok=8,
        num_hidden_layers=arguments.layers, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    if group.rank == 0:
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    dist.barrier()
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))

    def whole() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        replace_experts(model, partial(ResidentExperts, group=group))
        return model

    def ours(kind: Any) -> Any:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        replace_experts(model, partial(kind, group=group))
        load_pretrained(model, source)
        return model

    peaks: dict[str, int] = {}
    for name, kind in [("load, resident", ResidentExperts), ("load, sharded", FullyShardedExperts)]:
        peaks[name], model = peak_of(partial(ours, kind))
        peaks[name.replace("load", "save")], _ = peak_of(partial(save_pretrained, model, source.with_name("saved")))
        del model
    peaks["from_pretrained and replace_experts"], _ = peak_of(whole)
    told: list[dict[str, int]] = [{}] * group.size
    dist.all_gather_object(told, peaks)
    if group.rank == 0:
        rows = [
            {"what": name, "ranks": group.size, "peak_over_checkpoint": max(rank[name] for rank in told) / size}
            for name in peaks
        ]
        for row in rows:
            print(f"{row['what']:40s} {row['peak_over_checkpoint']:.2f} of {size / 2**30:.2f} GiB")
        write_result(RESULT, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
