"""Command lines: values arrive typed, mistakes become one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from moezoo.command import parse
from moezoo.errors import UserError, unknown


@dataclass(frozen=True)
class Arguments:
    """Do something."""

    run: Annotated[Path, tyro.conf.Positional]
    """Where."""
    examples: int | None = None
    """How many."""


def test_values_are_typed() -> None:
    assert parse(Arguments, ["here", "--examples", "3"], "tool") == Arguments(Path("here"), 3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["here", "--exmples", "3"], "--examples"),
        ([], "PATH"),
        (["here", "--examples", "many"], "many"),
        (["here", "there"], "there"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        parse(Arguments, words, "tool")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "tool --help" in str(error.value)


def test_unknown_names_the_nearest() -> None:
    assert "did you mean depth?" in str(unknown("task", "dept", ["depth", "edge"]))
    assert "known: depth, edge." in str(unknown("task", "xyz", ["depth", "edge"]))


def test_user_errors_end_commands_with_code_2() -> None:
    code = (
        "from moezoo.errors import UserError, run_command\n"
        "def main():\n    raise UserError('No such thing.')\n"
        "run_command(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: No such thing.\n"


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
def test_a_restart_keeps_process_and_arguments_and_happens_once(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys\n"
        "from moezoo.command import restart_with_huge_pages\n"
        "print(os.getpid(), 'GLIBC_TUNABLES' in os.environ, sys.argv[1:], flush=True)\n"
        "restart_with_huge_pages()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, str(script), "--name", "a b"],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    first, second = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert first.split()[1] == "False" and second == first.replace("False", "True")
    assert first.endswith("['--name', 'a b']")
