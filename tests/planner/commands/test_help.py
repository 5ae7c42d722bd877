"""Help texts, word for word: each is read over before it changes.

After a change that is meant, write the files again with ``python -m tests.planner.commands.test_help``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeplan.planner.commands.main import app

FOLDER = Path(__file__).parent / "help"
COMMANDS = (
    "",
    *(
        "trace",
        "trace generate",
        "trace import",
        "trace info",
        "plan",
        "export",
        "evaluate",
        "policies",
        "compare",
        "affinity",
        "replay",
        "view",
        "serve",
    ),
    *("jobs", "jobs list", "jobs show", "jobs watch", "jobs delete"),
    *("admin", *(f"admin {name}" for name in ("servers", "move", "drain", "backup", "restore", "compact"))),
)
PANELS = {"Arguments", "Options", "Commands", "Cluster", "Problem", "Search", "Daemon", "Output"}
OWN_PANELS = {
    "compare": {"Known counts, with --known-counts"},
    "replay": {"Model of time"},
    "serve": {"Security"},
    "view": {"Model of time"},
    "evaluate": {"Model of time"},
    "trace generate": {"Routing"},
    "trace import": {"Routing"},
}
ENVIRONMENT = {"COLUMNS": "100", "_TYPER_FORCE_DISABLE_TERMINAL": "1", "NO_COLOR": "1"}


def help_of(command: str) -> str:
    """The help text of a command on a terminal of 100 columns."""
    done = CliRunner(env=ENVIRONMENT).invoke(app, [*command.split(), "--help"], prog_name="moeplan")
    assert done.exit_code == 0
    return "".join(line.rstrip() + "\n" for line in done.stdout.splitlines())


def file_of(command: str) -> Path:
    """Where the text is kept."""
    return FOLDER / f"{' '.join(['moeplan', command]).strip().replace(' ', '-')}.txt"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_it_was_read_over(command: str) -> None:
    assert help_of(command) == file_of(command).read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_options_stand_in_panels(command: str) -> None:
    titles = {line.strip("╭─╮").strip() for line in help_of(command).splitlines() if line.startswith("╭─ ")}
    assert titles <= PANELS | OWN_PANELS.get(command, set())
    if command:
        (only_help,) = (part for part in help_of(command).split("╭─ ") if part.startswith("Options "))
        assert only_help.count("--") == 1 or command in ("trace", "jobs")


def test_brackets_are_kept() -> None:
    for command in ("plan", "compare", "replay", "trace info"):
        assert "counts[step, layer, source, expert]" in " ".join(help_of(command).split())


def test_every_command_has_a_file() -> None:
    assert sorted(FOLDER.iterdir()) == sorted(map(file_of, COMMANDS))


if __name__ == "__main__":
    for each in COMMANDS:
        file_of(each).write_text(help_of(each))
