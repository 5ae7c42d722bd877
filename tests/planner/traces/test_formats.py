"""Recordings of every format: what their programs write goes in, and the counts come out."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from moeplan.planner.commands.main import main
from moeplan.planner.commands.trace import RecordedBy
from moeplan.planner.traces.formats import json_array
from moeplan.planner.traces.formats.opening import FORMATS, open_recording
from moeplan.planner.traces.trace import Trace, TraceError
from moeplan.planner.traces.writer import write_recording
from moeplan.solvers.problem.arrays import Int64

STEPS, LAYERS, RANKS, EXPERTS, FIRST = 5, 3, 2, 6, 20
DENSE = 2
"""Dense layers before the first MoE layer, in formats that count them."""
SLOTS = [0, 1, 2, 3, 4, 5, 0, 3]
"""Expert of each physical slot."""
COUNTS: Int64 = np.random.default_rng(0).integers(1, 50, (STEPS, LAYERS, RANKS, EXPERTS))

Written = tuple[list[Path], Int64, list[int]]
"""Files, the counts that they hold, and the numbers of the layers."""


def physical(counts: Int64) -> Int64:
    """Counts of slots: an expert's tokens go to its first replica, but for one that goes to the last."""
    slots = np.zeros((*counts.shape[:-1], len(SLOTS)), np.int64)
    for expert in range(EXPERTS):
        places = [slot for slot, held in enumerate(SLOTS) if held == expert]
        slots[..., places[0]] += counts[..., expert] - (len(places) > 1)
        slots[..., places[-1]] += len(places) > 1
    return slots


def sglang_stat(folder: Path) -> Written:
    merged = COUNTS.sum(axis=2)
    rows = np.zeros((STEPS + 2, DENSE + LAYERS, EXPERTS), np.int32)  # two rows of the buffer were never written
    rows[:STEPS, DENSE:] = merged
    path = folder / "expert_distribution_recorder_1700000000.0.pt"
    torch.save({"rank": 0, "logical_count": torch.from_numpy(rows), "average_utilization_rate_over_window": None}, path)
    return [path], merged[:, :, None], [2, 3, 4]


def sglang_json(folder: Path) -> Written:
    merged = COUNTS.sum(axis=2)
    path = folder / "counts.json"
    path.write_text(json.dumps({"logical_count": merged.tolist()}))
    return [path], merged[:, :, None], [0, 1, 2]


def sglang_per_pass(folder: Path) -> Written:
    paths = []
    for rank in range(RANKS):
        slots = np.zeros((STEPS, DENSE + LAYERS, len(SLOTS)), np.int32)
        slots[:, DENSE:] = physical(COUNTS[:, :, rank])
        records = [
            {
                "forward_pass_id": 10 + step,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.from_numpy(slots[step]),
            }
            for step in range(STEPS)
        ]
        paths.append(folder / f"expert_distribution_recorder_1700000000.0_{rank}.pt")
        p2l = torch.tensor([SLOTS] * (DENSE + LAYERS))
        torch.save({"records": records, "last_physical_to_logical_map": p2l}, paths[-1])
    return paths, COUNTS, [2, 3, 4]


def sglang_dumps(folder: Path) -> Written:
    """A ``stat`` file for each dump."""
    paths = [folder / f"expert_distribution_recorder_170000000{step}.0.pt" for step in range(STEPS)]
    for path, loads in zip(paths, COUNTS.sum(axis=2), strict=True):
        rows = torch.zeros((2, DENSE + LAYERS, EXPERTS), dtype=torch.int32)
        rows[0, DENSE:] = torch.from_numpy(loads)
        torch.save({"rank": 0, "logical_count": rows, "average_utilization_rate_over_window": None}, path)
    return paths, COUNTS.sum(axis=2)[:, :, None], [2, 3, 4]


def sglang_per_pass_dumps(folder: Path) -> Written:
    """Two dumps of every rank, between which experts changed their slots."""
    (folder / "later").mkdir()
    paths, _, _ = sglang_per_pass(folder)
    later, _, _ = sglang_per_pass(folder / "later")
    for path in later:
        content = torch.load(path)
        moved = torch.arange(len(SLOTS)).flip(0)
        content["last_physical_to_logical_map"] = content["last_physical_to_logical_map"][:, moved]
        for record in content["records"]:
            record["forward_pass_id"] += STEPS
            record["global_physical_count"] = record["global_physical_count"][:, moved]
        torch.save(content, path)
    return [*later, *paths], np.concatenate([COUNTS, COUNTS]), [2, 3, 4]


def vllm(folder: Path) -> Written:
    merged = COUNTS.sum(axis=2)
    path = folder / "loads.jsonl"
    lines = [
        {
            "record_type": "eplb_load_stats",
            "version": 1,
            "step": FIRST + step,
            "num_ranks": RANKS,
            "expert_load": physical(merged)[step].tolist(),
            "p2l_map": [SLOTS] * LAYERS,
        }
        for step in range(STEPS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [path], merged[:, :, None], [0, 1, 2]


def vllm_history(folder: Path) -> Written:
    merged = COUNTS.sum(axis=2)
    path = folder / "expert-load.json"
    path.write_text(json.dumps({"load_history": [{"logical_expert_load": load.tolist()} for load in merged]}))
    return [path], merged[:, :, None], [0, 1, 2]


def tensorrt_llm(folder: Path) -> Written:
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": 2}))
    for rank in range(RANKS):
        tensors = {
            f"{FIRST + step}_{DENSE + layer}": np.ascontiguousarray(COUNTS[step, layer, rank])
            for step in range(STEPS)
            for layer in range(LAYERS)
        }
        save_file(tensors, folder / f"rank{rank}.safetensors")
    return [folder], COUNTS, [2, 3, 4]


def vllm_ascend(folder: Path) -> Written:
    merged = COUNTS.sum(axis=2)
    paths = [folder / f"{step}.pt" for step in range(STEPS)]
    for path, loads in zip(paths, merged, strict=True):
        torch.save(torch.from_numpy(loads), path)
    return paths, merged[:, :, None], [0, 1, 2]


def megatron(folder: Path) -> Written:
    paths = []
    for rank in range(RANKS):
        lines = []
        for step in range(STEPS):
            for layer in range(LAYERS):
                chosen = np.repeat(np.arange(EXPERTS), COUNTS[step, layer, rank])
                lines += [
                    {
                        "step": FIRST + step,
                        "block": "decoder",
                        "layer": DENSE + layer,
                        "rank": rank,
                        "num_tokens": len(part),
                        "topk": 1,
                        "top_indices": part[:, None].tolist(),
                    }
                    for part in np.array_split(chosen, 2)  # two micro-batches
                ]
            lines.append({**lines[-1], "block": "mtp", "mtp_idx": 0, "layer": 0})
        paths.append(folder / f"router_trace_rank{rank}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths[::-1], COUNTS, [2, 3, 4]


def slime(folder: Path) -> Written:
    rng = np.random.default_rng(1)
    counts = np.zeros((STEPS, LAYERS, 1, EXPERTS), np.int64)
    paths = [folder / f"{FIRST + step}.pt" for step in range(STEPS)]
    for path, step in zip(paths, counts, strict=True):
        samples = []
        for tokens in (5, 40, 17):
            routes = np.zeros((tokens, DENSE + LAYERS, 2), np.int32)  # dense layers stay zero
            routes[:, DENSE:] = rng.random((tokens, LAYERS, EXPERTS)).argsort(axis=2)[..., :2]
            np.add.at(step[:, 0], (np.arange(LAYERS)[:, None], routes[:, DENSE:]), 1)
            samples.append({"tokens": [1] * (tokens + 1), "rollout_routed_experts": torch.from_numpy(routes)})
        torch.save({"rollout_id": int(path.stem), "samples": samples}, path)
    return paths[::-1], counts, [2, 3, 4]


def ultraep(folder: Path) -> Written:
    merged = COUNTS.sum(axis=2)
    name = "epg0_gr0_r0_1700000000000"
    facts = {"schema": "ultra_ep_trace_v1", "trace_id": name, "chunks": 2, "dropped_records": 0}
    (folder / f"{name}.manifest.json").write_text(json.dumps(facts))
    order = [(step, layer) for step in range(STEPS) for layer in range(LAYERS)]
    for chunk, part in enumerate((order[:4], order[4:])):
        np.savez(
            folder / f"{name}.chunk{chunk:06d}.npz",
            metadata=np.asarray("{}"),
            layers=np.array([DENSE + layer for _, layer in part], np.int32),
            virtual_layers=np.array([layer for _, layer in part], np.int32),
            microbatches=np.array([FIRST + step for step, _ in part], np.int64),
            pre_logical_loads=np.array([merged[step, layer] for step, layer in part], np.int32),
            post_physical_loads=np.zeros((len(part), len(SLOTS)), np.int32),
        )
    return [folder], merged[:, :, None], [2, 3, 4]


def harmoeny(folder: Path) -> Written:
    for rank in range(RANKS):
        (folder / str(rank)).mkdir()
        for layer in range(LAYERS):
            with (folder / str(rank) / f"moe_layer-{layer}.csv").open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["iteration", "expert distribution"])
                rows.writerows([step, str(COUNTS[step, layer, rank].tolist())] for step in range(STEPS))
    return [folder], COUNTS, [0, 1, 2]


def table(folder: Path) -> Written:
    path = folder / "counts.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "layer", "source", "expert", "tokens"])
        rows.writerows(
            [FIRST + step, DENSE + layer, source, expert, tokens]
            for (step, layer, source, expert), tokens in np.ndenumerate(COUNTS)
        )
    return [path], COUNTS, [2, 3, 4]


WRITERS: dict[Callable[[Path], Written], str] = {
    sglang_stat: "sglang",
    sglang_json: "sglang",
    sglang_per_pass: "sglang",
    sglang_dumps: "sglang",
    sglang_per_pass_dumps: "sglang",
    vllm: "vllm",
    vllm_history: "vllm",
    tensorrt_llm: "tensorrt-llm",
    vllm_ascend: "vllm-ascend",
    megatron: "megatron",
    slime: "slime",
    ultraep: "ultraep",
    harmoeny: "harmoeny",
    table: "csv",
}


def taken_over(paths: list[Path], folder: Path) -> tuple[str, Trace, list[str]]:
    name, recording = open_recording(paths)
    write_recording(folder / "trace.npz", recording)
    return name, Trace.open(folder / "trace.npz"), recording.dropped


def counts_of(trace: Trace) -> Int64:
    return np.stack(list(trace.read()))


def test_every_format_is_tried_and_can_be_named() -> None:
    assert set(WRITERS.values()) == set(FORMATS) == set(RecordedBy)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_counts_come_out_as_they_were(write: Callable[[Path], Written], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    paths, counts, numbers = write(tmp_path / "in")
    name, trace, _ = taken_over(paths, tmp_path)
    assert name == WRITERS[write]
    assert np.array_equal(counts_of(trace), counts)
    assert list(trace.layer_numbers or ()) == numbers


CUT: dict[Callable[[Path], Written], str] = {
    vllm: "line 5, which was cut off",
    vllm_history: "load_history[4], which was cut off",
    megatron: "1 steps that not all of 2 ranks recorded",
    ultraep: "which was cut off or is broken",
    harmoeny: "rows at the end that not every rank and layer has",
    tensorrt_llm: "rank1.safetensors, which was cut off: 2 of 15 counts",
}


@pytest.mark.parametrize("write", CUT, ids=lambda write: write.__name__)
def test_what_is_whole_is_taken_of_a_recording_that_was_cut_off(
    write: Callable[[Path], Written], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    paths, counts, _ = write(tmp_path / "in")
    last = sorted(path for path in (tmp_path / "in").rglob("*") if path.is_file() and "manifest" not in path.name)[-1]
    data = last.read_bytes()
    end = data.rindex(b"\n", 0, -2) + 1 if write is harmoeny else len(data) - len(data) // 20 - 2
    last.write_bytes(data[:end])
    _, trace, dropped = taken_over(paths, tmp_path)
    assert 1 <= trace.steps < STEPS
    assert np.array_equal(counts_of(trace), counts[: trace.steps])
    assert any(CUT[write] in line for line in dropped), dropped


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("notes.txt", b"hello", "is no recording that is known; name its format with --from: sglang, vllm,"),
        ("cut.pt", b"PK\x03\x04logical_count", "is no file of tensors that torch.load(weights_only=True) reads"),
        ("a.json", b'{"logical_count": [[[1.5]]]}', "logical_count = float64(1, 1, 1): must be whole numbers"),
        ("b.json", b'{"logical_count": [[[0, 0]]]}', "no layer has routed a token"),
        ("c.json", b'{"logical_count": [[[-1, 0]]]}', "logical_count = -1: must be at least 0"),
        ("d.csv", b"step,layer,expert,tokens\n0,0,0,many\n", "line 2 does not hold whole numbers"),
        ("e.csv", b"step,layer,expert,tokens\n1,0,0,1\n0,0,0,1\n", "step 0 stands after step 1; sort the rows by step"),
        ("f.jsonl", b'{"record_type":"eplb_load_stats","expert_load":[[1]]}\n', "p2l_map = object(): must be whole"),
        (
            "h.json",
            b'{"load_history": [{"logical_expert_load": [[1, 2], [3]]}]}',
            "logical_expert_load = object(): must",
        ),
        (
            "i.json",
            b'{"load_history": [{"logical_expert_load": [[1, 2]]}; ' + b" " * 99 + b"]}",
            "is no JSON at load_history[1] (",
        ),
        ("j.json", b'{"load_history": []}', "holds no whole element in load_history"),
        ("g.jsonl", b'{"top_indices": [[0]], "step": 0}\n', "a line is none of Megatron's routing trace"),
    ],
)
def test_foreign_and_broken_files_are_refused_in_one_line(
    name: str, content: bytes, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moeplan", "trace", "import", name, "-o", "trace.npz"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"moeplan: {name}: ")
    assert line in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


PASS = {"forward_pass_id": 1, "rank": 0, "global_physical_count": [[1, 2]]}
STATISTICS = {"record_type": "eplb_load_stats", "expert_load": [[1, 2]], "p2l_map": [[0, 1]]}
NO_NUMBERS: list[dict[str, object]] = [
    {"rank": "x"},
    {"rank": []},
    {"forward_pass_id": None},
    {"forward_pass_id": 0.5},
]
TRACED = {"step": 1, "block": "decoder", "layer": 1, "rank": 0, "top_indices": [[0, 1]]}


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("sglang", {"records": 5, "last_physical_to_logical_map": [[0, 1]]}),
        *[
            ("sglang", {"records": [{**PASS, **wrong}], "last_physical_to_logical_map": [[0, 1]]})
            for wrong in NO_NUMBERS
        ],
        ("sglang", {"records": [PASS], "last_physical_to_logical_map": [[2**62, 1]]}),
        ("vllm", {**STATISTICS, "p2l_map": [[0, 2**62]]}),
        ("vllm", {**STATISTICS, "step": 10**30}),
        *[("megatron", {**TRACED, "top_indices": [[wrong]]}) for wrong in (1.5, 2**62, 10**30, float("inf"))],
        ("megatron", {**TRACED, "layer": 10**30}),
        ("megatron", {**TRACED, "step": float("inf")}),
    ],
    ids=str,
)
def test_numbers_that_no_recorder_writes_are_refused(kind: str, content: object, tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    path.write_text(json.dumps(content))
    with pytest.raises(TraceError):
        write_recording(tmp_path / "trace.npz", open_recording([path], kind)[1])


@pytest.mark.parametrize("kind", ["sglang", "vllm", "megatron"])
def test_brackets_without_an_end_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    for start in ("", '{"load_history": ', '{"logical_count": '):
        path.write_text(start + "[" * 100_000)
        with pytest.raises(TraceError):
            open_recording([path], kind)


@pytest.mark.parametrize("shape", [[-1, -2], [2**32, 2**32]])
def test_a_tensor_whose_shape_is_none_is_refused(shape: list[int], tmp_path: Path) -> None:
    (tmp_path / "meta_info.json").write_text('{"num_experts": 2}')
    head = json.dumps({"0_1": {"dtype": "I64", "shape": shape, "data_offsets": [0, 16 * (shape[0] < 0)]}}).encode()
    (tmp_path / "rank0.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(16))
    with pytest.raises(TraceError, match="must have the bytes of shape"):
        write_recording(tmp_path / "trace.npz", open_recording([tmp_path])[1])
    (tmp_path / "meta_info.json").write_text('{"num_experts": -1}')
    with pytest.raises(TraceError, match="num_experts = -1: must be 1 to"):
        open_recording([tmp_path])


def test_tensors_that_are_no_counts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "saved.pt"
    for routes in (torch.zeros(3, 2, 2, requires_grad=True), torch.zeros(3, 2, 2, dtype=torch.bfloat16), "routes"):
        torch.save({"rollout_id": 1, "samples": [{"rollout_routed_experts": routes}]}, path)
        with pytest.raises(TraceError, match=r"rollout_routed_experts = .*: must be whole numbers"):
            open_recording([path], "slime")
    torch.save({1: torch.zeros(2)}, path)
    with pytest.raises(TraceError, match="but 1"):
        open_recording([path], "sglang")
    torch.save(torch.zeros(0, 4, dtype=torch.int64), path)
    with pytest.raises(TraceError, match="must have layers"):
        write_recording(tmp_path / "trace.npz", open_recording([path], "vllm-ascend")[1])


def test_rollouts_of_another_model_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "1.pt", tmp_path / "2.pt"]
    for path, layers in zip(paths, (3, 2), strict=True):
        routes = torch.arange(6 * layers).reshape(3, layers, 2)
        torch.save({"rollout_id": layers, "samples": [{"rollout_routed_experts": routes}]}, path)
    with pytest.raises(TraceError, match=r"2\.pt: rollout_routed_experts = 2: must have 3 layers, as "):
        open_recording(paths, "slime")


def test_runs_of_the_engine_are_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    paths, _, _ = sglang_per_pass(tmp_path)
    again, _, _ = sglang_per_pass(tmp_path / "again")
    with pytest.raises(TraceError, match=r"forward_pass_id = 10: is of rank 0, as one in .* is; import each run"):
        open_recording([*paths, *again])


def test_a_long_history_is_read_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, counts, _ = vllm_history(tmp_path)
    for block in range(40, 80):  # every place where a block can end
        monkeypatch.setattr(json_array, "BLOCK", block)
        steps = open_recording(paths)[1].steps
        assert np.array_equal(np.stack(list(steps)), counts)


def test_rollouts_without_routes_say_how_to_record_them(tmp_path: Path) -> None:
    path = tmp_path / "7.pt"
    torch.save({"rollout_id": 7, "samples": [{"tokens": [1, 2], "rollout_routed_experts": None}]}, path)
    with pytest.raises(TraceError, match="run slime with --use-rollout-routing-replay"):
        open_recording([path])


def test_nothing_in_a_saved_file_is_executed(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'harm')!r}, 'w')",))

    torch.save({"logical_count": Harmful()}, tmp_path / "harm.pt")
    with pytest.raises(TraceError, match="weights_only"):
        open_recording([tmp_path / "harm.pt"])
    assert not (tmp_path / "harm").exists()
