"""Training goes on, with the same losses, whatever happens to the planner or to a rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import small_training
from tests.support.daemon import DaemonProcess, Start, eventually, started
from tests.support.repository import ROOT
from tests.support.torchrun import torchrun

from moeplan.runtime_client.planning.planner_stream import PlannerStream

Launch = Callable[..., list[Any]]
Lines = list[dict[str, Any]]
EXAMPLE = ROOT / "examples" / "train_moe_lm.py"
RUN_S = 90.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    for starter in started(lambda: tmp_path_factory.mktemp("data")):
        yield starter().serving()


def train(folder: str, options: dict[str, Any]) -> Any:
    return small_training.train(folder, **options)


def run(ranks: Launch, folder: Path, **options: Any) -> tuple[list[Lines], list[Any]]:
    """Train on two ranks; the lines and the status of each."""
    folder.mkdir(exist_ok=True)
    status = ranks(2, train, str(folder), options, timeout_s=RUN_S)
    return [read(folder, rank) for rank in range(2)], status


def read(folder: Path, rank: int, restart: int = 0) -> Lines:
    """The whole lines so far."""
    path = folder / f"{restart}-{rank}.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def losses(lines: Lines) -> Any:
    return np.array([line["loss"] for line in lines])


def layouts(lines: Lines) -> list[Any]:
    """Version and layouts of each step."""
    return [(line["version"], line["layouts"]) for line in lines]


def switched(lines: Lines) -> list[int]:
    """Steps that were the first with their layouts."""
    return [
        line["step"] for line, before in zip(lines[1:], lines[:-1], strict=True) if line["version"] != before["version"]
    ]


def assert_undisturbed(ranks: Launch, folder: Path, disturbed: list[Lines]) -> None:
    """Equal to a run with the same layouts to the last bit, and to one that keeps its first up to rounding."""
    assert layouts(disturbed[0]) == layouts(disturbed[1])
    replay = {step: disturbed[0][step]["layouts"] for step in switched(disturbed[0])}
    same, _ = run(ranks, folder / "same", steps=len(disturbed[0]), replay=replay)
    first, _ = run(ranks, folder / "first", steps=len(disturbed[0]))
    for rank in range(2):
        assert losses(disturbed[rank]).tolist() == losses(same[rank]).tolist()
        np.testing.assert_allclose(losses(disturbed[rank]), losses(first[rank]), rtol=1e-9)


def test_a_planner_killed_in_the_middle_and_started_again(ranks: Launch, start: Start, tmp_path: Path) -> None:
    address, folder = f"unix:{tmp_path}/planner", tmp_path / "run"
    serve = partial(start, "--listen", address, data=tmp_path / "data")
    planner = serve().serving()
    folder.mkdir()
    hold = folder / small_training.HOLD
    hold.touch()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(run, ranks, folder, steps=20, address=address, job="killed", slow=0.05)
        try:

            def lines_when(condition: Callable[[Lines], bool]) -> Lines:
                def found() -> Lines | None:
                    assert not training.done(), training.result()
                    lines = read(folder, 0)
                    return lines if lines and condition(lines) else None

                lines: Lines = eventually(found, RUN_S)
                return lines

            before = len(lines_when(lambda lines: bool(switched(lines))))
            planner.kill()
            # The versions held by then may still come into force; none does after a few steps.
            alone = lines_when(lambda lines: len(lines) >= before + 10)
            serve().serving()
            lines_when(lambda lines: lines[-1]["version"] > alone[-1]["version"])
        finally:
            hold.unlink()
        disturbed, status = training.result(RUN_S)
    assert [line.connections for line in status] == [2, 2]
    assert_undisturbed(ranks, tmp_path, disturbed)


def test_a_planner_that_was_never_there(ranks: Launch, tmp_path: Path) -> None:
    alone, status = run(ranks, tmp_path / "alone", steps=30, address="127.0.0.1:1")
    assert [line.connections for line in status] == [0, 0]
    assert switched(alone[0]) == switched(alone[1]) == []
    assert_undisturbed(ranks, tmp_path, alone)
    assert losses(alone[0])[-6:].mean() < losses(alone[0])[:6].mean() / 2  # it does learn


def test_a_rank_that_is_slow_in_every_step(ranks: Launch, daemon: DaemonProcess, tmp_path: Path) -> None:
    run_of = {"steps": 20, "switches": 2, "address": daemon.address, "job": "slow-rank", "slow": 0.05}
    slowed, _ = run(ranks, tmp_path / "slow", **run_of)
    assert len(switched(slowed[0])) >= 2
    assert_undisturbed(ranks, tmp_path, slowed)


def test_a_rank_is_killed_and_torchrun_starts_the_group_again(
    ranks: Launch, daemon: DaemonProcess, tmp_path: Path
) -> None:
    job = "restarted"
    torchrun("--max-restarts", "1", small_training.__file__, str(tmp_path), daemon.address, job)
    killed, again = ([read(tmp_path, rank, start) for rank in range(2)] for start in range(2))
    assert switched(killed[0])
    # The second start takes over the layouts that were planned for the first, and then gets its own.
    taken, *_ = (again[0][step]["version"] for step in switched(again[0]))
    old, new = killed[0][-1]["version"], again[0][-1]["version"]
    assert 0 < old <= taken < new
    with daemon.client() as client:
        first, second = (client.plan(f"jobs/{job}/plans/{version}").incarnation for version in (old, new))
        assert 0 < first < second
        newest = client.job(f"jobs/{job}")
        assert newest.incarnation == second
        assert newest.status.connected_ranks == 0
        # A rank of the first start that is still there finds no planner any more.
        stream = PlannerStream(daemon.address, job, newest.spec, first, rank=0)
        try:
            stream.report(10**6, np.ones((small_training.LAYERS, 1, small_training.EXPERTS), np.int64))
            eventually(lambda: stream.status.error, 20)
        finally:
            stream.close()
        assert "incarnation" in stream.status.error
        assert (stream.status.connections, stream.status.sent, stream.newest) == (0, 0, 0)
        assert client.job(f"jobs/{job}").incarnation == second
    assert_undisturbed(ranks, tmp_path, again)
    shared = min(len(killed[0]), len(again[0]))
    np.testing.assert_allclose(losses(killed[0])[:shared], losses(again[0])[:shared], rtol=1e-9)


def run_example(out: Path, mode: str, *arguments: str) -> Any:
    """Four steps; the loss of each."""
    torchrun(
        str(EXAMPLE), "--mode", mode, "--device", "cpu", "--steps", "4", "--shift", "2", "--out", str(out), *arguments
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["imbalance"] >= 1 for line in lines)
    return losses(lines)


def test_the_example_learns_the_same_in_every_mode(daemon: DaemonProcess, tmp_path: Path) -> None:
    planner = ("--planner", daemon.address, "--job", "example")
    modes: dict[str, tuple[str, ...]] = {"static": (), "spill": (), "planned": planner}
    with ThreadPoolExecutor(len(modes)) as pool:  # at once, as most of their time is importing and waiting
        runs = {mode: pool.submit(run_example, tmp_path / mode, mode, *rest) for mode, rest in modes.items()}
    np.testing.assert_allclose(runs["spill"].result(), runs["static"].result(), rtol=1e-5)
    np.testing.assert_allclose(runs["planned"].result(), runs["static"].result(), rtol=1e-5)
    with daemon.client() as client:
        assert client.job("jobs/example").spec.layers == 2


@pytest.mark.slow
def test_the_example_learns_the_same_with_the_kinds_that_it_chooses(tmp_path: Path) -> None:
    chosen, static = (run_example(tmp_path / mode, mode) for mode in ("auto", "static"))
    np.testing.assert_allclose(chosen, static, rtol=1e-5)
