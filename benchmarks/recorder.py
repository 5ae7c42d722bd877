"""What recording costs a training step of a real model: transformers' Qwen3-MoE of about a billion parameters.

    python benchmarks/recorder.py          # one GPU, bf16, random weights
    python benchmarks/recorder.py --tiny   # a toy on the CPU, to try the program

Blocks of steps (forward, backward, AdamW) with and without the recorder take turns, so that drifts of the machine meet
both alike. A block is timed as a whole, the device idle at its start and end. On a GPU the recorder's own code runs
under ``torch.cuda.set_sync_debug_mode("error")`` once before, and raises if it makes the host wait for the device
other than for the step before.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor

from moeplan.runtime_client.recording.recorder import Recorder, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each kind")
    parser.add_argument("--steps", type=int, default=5, help="steps in a block")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.tiny else "cuda")
    model = make_model(arguments.tiny, device)
    batch = torch.randint(model.config.vocab_size, (2, 16) if arguments.tiny else (4, 2048), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def train() -> None:
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        train()
    check(model, batch, train)
    times: dict[bool, list[float]] = {False: [], True: []}
    for block in range(2 * arguments.blocks):
        recorded = block % 4 in (1, 2)  # off, on, on, off: neither always comes first
        times[recorded].append(time_block(model, train, arguments.steps, recorded))
    parameters = sum(weight.numel() for weight in model.parameters())
    without, with_it = (1e3 * statistics.median(times[recorded]) for recorded in (False, True))
    ratios = [on / off for on, off in zip(times[True], times[False], strict=True)]
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"{parameters / 1e9:.2f} B parameters, {model.config.num_hidden_layers} layers, {batch.numel()} tokens a step"
    )
    print(f"step without recorder {without:.2f} ms, with {with_it:.2f} ms (medians of {arguments.blocks} blocks)")
    print(f"ratio of medians {with_it / without:.4f}, median of pairs {statistics.median(ratios):.4f}")


def make_model(tiny: bool, device: torch.device) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 32_000, "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "num_experts": 64, "num_experts_per_tok": 8,
        "moe_intermediate_size": 288,
    }  # fmt: skip
    if tiny:
        sizes |= {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 16}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen3_moe", **sizes)
    make: Callable[..., Any] = transformers.AutoModelForCausalLM.from_config
    model = make(config, experts_implementation="eager" if tiny else "grouped_mm", dtype=torch.bfloat16)
    for layer in model.model.layers:  # zeros in a fresh model: every token would go one way
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.02)
    return model.to(device).train()


def check(model: Any, batch: Tensor, train: Callable[[], None]) -> None:
    """Counts are complete, and the recorder's own code makes no synchronising call."""

    def strictly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not batch.is_cuda:
                return function(*arguments, **named)
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*arguments, **named)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return call

    add = Recorder._add
    Recorder._add = strictly(add)  # type: ignore[method-assign]  # the model's own code may synchronise
    try:
        with record(model) as recorder:
            step = strictly(recorder.step)
            got = []
            for _ in range(3):
                train()
                got.append(step())
            got.append(recorder.finish())
    finally:
        Recorder._add = add  # type: ignore[method-assign]
    pairs = batch.numel() * model.config.num_experts_per_tok
    for counts in got[1:]:
        assert counts is not None
        assert (counts.sum(axis=1) == pairs).all(), "counts are not complete"
    print(f"{len(recorder.layers)} layers, {pairs} (token, choice) pairs each in every step: all counted")


def time_block(model: Any, train: Callable[[], None], steps: int, recorded: bool) -> float:
    """Seconds of one step."""
    recorder = record(model) if recorded else None
    train()
    if recorder is not None:
        recorder.step()
    synchronize()
    start = perf_counter()
    for _ in range(steps):
        train()
        if recorder is not None:
            recorder.step()
    synchronize()
    taken = perf_counter() - start
    if recorder is not None:
        recorder.close()
    return taken / steps


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
