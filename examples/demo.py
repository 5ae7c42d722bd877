"""The demo: the same model trained with static expert parallelism and with moeplan, on two ranks of this machine.

    python examples/demo.py [--steps N]

It starts a planner's daemon with its embedded store, runs ``train_moe_lm.py`` under torchrun, once as usual and twice
with moeplan, and ends with a table and a picture, ``moeplan-demo.png``, in the folder where it was started.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

TRAIN = Path(__file__).with_name("train_moe_lm.py")
PICTURE = Path("moeplan-demo.png")
PAGE = Path("moeplan-demo.html")
RANKS, SHIFT, START_S, RUN_S = 2, 20, 180, 600
WAYS = {
    "static": "static experts",
    "spill": "moeplan: spilling",
    "planned": "moeplan: planned",
}
CONSOLE = Console()
Line = dict[str, float]


def main() -> None:
    """Train three times, then show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=80)
    steps = parser.parse_args().steps
    runs: dict[str, list[Line]] = {}
    with tempfile.TemporaryDirectory() as folder:
        started = planner(Path(folder))
        with CONSOLE.status("starting the planner (the first time, its kernels are compiled)"):
            address = next(started)
        print(f"$ moeplan serve        listening on {address}\n")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=CONSOLE) as progress:
            for mode, name in WAYS.items():
                task = progress.add_task(f"{name:<26}", total=steps, note="")
                runs[mode] = []
                for line in train(mode, steps, address, Path(folder)):
                    runs[mode].append(line)
                    note = f"loss {line['loss']:.3f}  imbalance {line['imbalance']:.2f}"
                    progress.update(task, completed=line["step"] + 1, note=note)
        started.close()
        view(Path(folder) / "static.npz", PAGE)
    show(runs)
    draw(runs, PICTURE)
    print(f"\n{PICTURE} shows imbalance, loss and time of every step.")
    print(f"{PAGE.resolve()} shows its routing: open it in a browser.")


@contextmanager
def stopping(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """End a process, whatever happens."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def planner(folder: Path) -> Generator[str, None, None]:
    """Run a daemon; its address."""
    command = [sys.executable, "-m", "moeplan.planner.commands.main", "serve", "--data", str(folder / "planner")]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    with stopping(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)) as process:
        assert process.stderr is not None
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        address = ""
        for text in process.stderr:
            event = json.loads(text)
            address = event.get("address", address) if event.get("event") == "serving" else address
            if event.get("event") == "workers ready":
                break
        else:
            raise SystemExit(f"the planner did not start within {START_S} s")
        watchdog.cancel()
        threading.Thread(target=process.stderr.read, daemon=True).start()  # so that its log never fills the pipe
        yield address


def train(mode: str, steps: int, address: str, folder: Path) -> Iterator[Line]:
    """Run the example; its lines as they come."""
    out = folder / f"{mode}.jsonl"
    out.touch()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += [str(TRAIN), "--mode", mode, "--device", "cpu", "--out", str(out)]
    command += ["--steps", str(steps), "--shift", str(SHIFT)]
    command += ["--trace", str(folder / f"{mode}.npz")]
    if mode == "planned":
        command += ["--planner", address]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / f"{mode}.log").open("w+") as log, out.open() as lines:
        run: Any = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)
        with stopping(run) as process:
            end, part = time.monotonic() + RUN_S, ""
            while True:
                over = process.poll() is not None
                part += lines.read()
                *whole, part = part.split("\n")
                yield from map(json.loads, whole)
                if over:
                    break
                if time.monotonic() > end:
                    raise SystemExit(f"training took more than {RUN_S} s")
                time.sleep(0.1)
        if process.returncode:
            log.seek(0)
            raise SystemExit(log.read())


def view(trace: Path, page: Path) -> None:
    """Make the page of what static experts were asked for, and what plans would have made of it."""
    command = [sys.executable, "-m", "moeplan.planner.commands.main", "view", str(trace), "-o", str(page)]
    with CONSOLE.status("making a page of the routing"):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=RUN_S)


def show(runs: dict[str, list[Line]]) -> None:
    """The table, and what it means."""
    later = {mode: lines[len(lines) // 2 :] for mode, lines in runs.items()}
    imbalance = {mode: statistics.mean(line["imbalance"] for line in lines) for mode, lines in later.items()}
    seconds = {mode: statistics.median(line["seconds"] for line in lines) for mode, lines in later.items()}
    table = Table(
        title=f"the same model and text on {RANKS} ranks, second half of the steps",
        title_justify="left",
        caption="imbalance: largest load of a rank over the mean; ms and tokens: medians",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("", "imbalance", "worst", "ms/step", "tokens/s", "layouts", "loss"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for mode, lines in later.items():
        speed = statistics.median(line["tokens_per_second"] for line in lines)
        table.add_row(
            WAYS[mode],
            f"{imbalance[mode]:.3f}",
            f"{max(line['imbalance'] for line in lines):.3f}",
            f"{seconds[mode] * 1e3:.0f}",
            f"{speed:,.0f}",
            f"{lines[-1]['version']:.0f}",
            f"{lines[-1]['loss']:.4f}",
        )
    CONSOLE.print(table)
    losses = [[line["loss"] for line in lines] for lines in runs.values()]
    apart = max(max(step) - min(step) for step in zip(*losses, strict=True))
    before, *after = imbalance.values()
    less = [f"{1 - value / seconds['static']:+.0%}" for mode, value in seconds.items() if mode != "static"]
    print(
        f"With static expert parallelism the busier rank computes {before:.2f} times the average, with moeplan "
        f"{after[0]:.2f} and {after[1]:.2f} times.\n"
        f"Where an expert is computed does not change what it learns: the losses are within {apart:.0e}.\n"
        f"Time saved per step here, on cores that ranks and planner share: {less[0]} by spilling, {less[1]} by fully "
        "sharded\nexperts, which also spread the optimizer state, and gather weights in every pass for it."
    )


def draw(runs: dict[str, list[Line]], path: Path) -> None:
    """Imbalance, loss and time of a step, one above the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for axis, (key, label) in zip(
        axes, [("imbalance", "max / mean load"), ("loss", "loss"), ("seconds", "seconds per step")], strict=True
    ):
        for (mode, lines), style in zip(runs.items(), ("-", ":", "--"), strict=True):
            axis.plot([line["step"] for line in lines], [line[key] for line in lines], style, label=WAYS[mode])
        for shift in range(SHIFT, len(runs["static"]), SHIFT):
            axis.axvline(shift, color="0.85", zorder=0)
        axis.set_ylabel(label)
    axes[2].set_ylim(0, 2 * statistics.median(line["seconds"] for lines in runs.values() for line in lines))
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(runs),
        title=f"grey: the kind of text changes (every {SHIFT} steps)",
    )
    axes[2].set_xlabel("step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
