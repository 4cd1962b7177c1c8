"""Command lines: values arrive typed, mistakes become one sentence."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from moezoo.command import parse
from moezoo.early import quiet_interrupts
from moezoo.errors import UserError, run_command, unknown
from tests import fixtures
from tests.fixtures import ROOT


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


def test_mistakes_have_no_frame_on_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with pytest.raises(UserError) as error:
        parse(Arguments, ["here", "--examples", "many"], "tool")
    assert not set("│╭─|") & set(str(error.value)) and "----" not in str(error.value)


def test_an_empty_argument_is_no_folder() -> None:
    with pytest.raises(UserError, match="An argument of tool is empty"):
        parse(Arguments, [""], "tool")


@dataclass(frozen=True)
class Several:
    """Do something with several."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Which."""
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """How."""


def test_a_needed_list_is_not_empty() -> None:
    assert parse(Several, ["a"], "tool").runs == (Path("a"),)
    with pytest.raises(UserError, match=r"Missing from tool: one or more runs \(see tool --help\)"):
        parse(Several, [], "tool")


@dataclass(frozen=True)
class Needed:
    """Do something."""

    shell: Annotated[str, tyro.conf.Positional]
    """The shell that will read it."""
    out: Path
    """Folder to write; it must not exist, and here its help is so long that it takes two lines."""


def test_what_is_missing_is_told_apart_from_its_help() -> None:
    with pytest.raises(UserError) as told:
        parse(Needed, [], "tool")
    assert str(told.value) == (
        "Missing from tool: STR (the shell that will read it); --out PATH (folder to write; it "
        "must not exist, and here its help is so long that it takes two lines) (see tool --help)"
    )


CLI = sorted((ROOT / "moezoo/cli").glob("[a-z]*.py"))
SCRIPTS = [ROOT / "train.py", *sorted((ROOT / "tools").glob("*.py")), *CLI]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_says_how_it_is_used(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments: what is missing, code 2; with --help: everything, code 0."""
    module = fixtures.tool(tool)
    for words, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as end:
            run_command(partial(module.main, words, f"tools/{tool}.py"))
        printed = capsys.readouterr()
        assert end.value.code == code, printed.err
        assert "usage" in printed.out or f"tools/{tool}.py --help" in printed.err


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
        "from moezoo.early import restart_with_huge_pages\n"
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


def interrupted(script: str, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """A program whose import of tyro is the moment of a Ctrl-C."""
    (folder / "tyro.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    environment.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, script, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", ["tools/evaluate.py", "tools/export.py"])
def test_ctrl_c_while_a_command_is_imported_has_no_traceback(script: str, tmp_path: Path) -> None:
    done = interrupted(str(ROOT / script), tmp_path, "--help")
    assert done.returncode in (-signal.SIGINT, 130), done
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1


def test_ctrl_c_during_a_restart_is_answered_after_it() -> None:
    code = (
        "import os, signal\n"
        "from moezoo.errors import run_command\n"
        "from moezoo.early import hold_interrupts\n"
        "hold_interrupts()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "run_command(lambda: print('went on'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_waits_for_the_end_of_an_import(tmp_path: Path) -> None:
    """In the middle of one it would leave compiled modules half made."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\n"
        "print('imported', flush=True)\n"
    )
    code = (
        "import time\nfrom moezoo.errors import run_command\n"
        "def main():\n    import slow\n    time.sleep(20)\n    print('went on')\n"
        "run_command(main)"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=15
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "imported\n", "interrupted\n")


@pytest.mark.parametrize(
    "script", [ROOT / "train.py", *sorted((ROOT / "tools").glob("*.py")), *CLI]
)
def test_commands_import_nothing_heavy_where_ctrl_c_is_not_caught(script: Path) -> None:
    light = {*sys.stdlib_module_names, "moezoo.command", "moezoo.early", "moezoo.errors"}
    light |= {"moezoo.cli.entry"}
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= light, script
        if isinstance(node, ast.ImportFrom):
            assert {node.module, str(node.module).partition(".")[0]} & light, script


def test_interrupts_are_pythons_own_again_after_the_imports() -> None:
    with quiet_interrupts():
        assert signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_goes_is_no_traceback() -> None:
    """As in `tools/evaluate.py --help | head -1`."""
    code = (
        "from moezoo.errors import run_command\n"
        "run_command(lambda: [print('x' * 1000) for _ in range(1000)] and None)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
