"""The tab key, in a real bash and, where there is one, in a real zsh."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from moezoo.cli import bench, completion
from moezoo.cli.entry import COMMANDS
from moezoo.front import catalogue
from tests.cli.test_predict import command

ASK = {
    "bash": (
        "source {script}; complete -p moezoo | grep -q -- '-o default.* -F _tyro' || exit 1; "
        "COMP_WORDS=({words}); COMP_CWORD={at}; _tyro_moezoo; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    ),
    # What zsh's own functions would draw: the words before their descriptions, or files.
    "zsh": (
        "_describe() {{ printf '%s\\n' \"${{(@P)2%%:*}}\"; }}; _files() {{ echo FILES; }}; "
        "words=({words}); CURRENT=$(({at} + 1)); source {script}"
    ),
}


@pytest.fixture(scope="module", params=["bash", "zsh"])
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script in a file, which has its shell's name."""
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param} here")
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as written:
        completion.main([request.param], "moezoo completion")
    file = tmp_path_factory.mktemp("shell") / request.param
    file.write_text(written.getvalue())
    return file


@pytest.fixture(scope="module")
def tab(shell: Path):
    """What the tab key offers behind these words, of which the last is being typed."""

    @cache
    def offered(*words: str) -> frozenset[str]:
        typed = " ".join(map(shlex.quote, ("moezoo", *words)))
        asked = ASK[shell.name].format(words=typed, at=len(words), script=shell)
        start = ["zsh", "-f", "-c"] if shell.name == "zsh" else ["bash", "--norc", "-c"]
        done = subprocess.run([*start, asked], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return frozenset(line.strip() for line in done.stdout.splitlines() if line.strip())

    return offered


def test_commands_are_completed(tab) -> None:
    assert tab("") == set(COMMANDS)
    assert tab("pr") == {"predict", "prune"}


def test_names_of_models_are_completed(tab) -> None:
    every, held = catalogue.list_models(), catalogue.list_models(pretrained=True)
    for name in ("info", "train", "plan"):
        assert tab(name, "") == set(every), name
    for name in ("predict", "evaluate", "prune", "export", "save", "generate", "adapter"):
        assert tab(name, "") == set(held), name
    assert tab("info", "rooms/vm") == {"rooms/vmoe_tiny"}
    assert tab("bench", "steps", "sounds/ast") == {"sounds/ast_tiny"}


def test_options_are_completed_before_and_behind_a_name(tab) -> None:
    assert tab("predict", "--ar") == tab("predict", "rooms/m3vit_tiny", "--ar") == {"--arrays"}
    assert tab("train", "rooms/m3vit_tiny", "--model.experts") == {"--model.experts"}
    assert tab("prune", "runs/mine", "--ke") == {"--keep"}


def test_plan_has_its_own_options_and_those_of_train(tab) -> None:
    assert tab("plan", "rooms/m3vit_tiny", "--topo") == {"--topology"}
    assert "--mesh.expert" in tab("plan", "rooms/m3vit_tiny", "--mesh.")


def test_benchmarks_and_their_options_are_completed(tab) -> None:
    assert tab("bench", "") == set(bench.BENCHMARKS) == set(bench.ARGUMENTS)
    assert "--picture" in tab("bench", "moe", "--pic")
    assert "--topology" in tab("bench", "pod", "--")


def test_files_are_left_to_the_shell(tab, shell: Path) -> None:
    nothing = {"bash": set(), "zsh": {"FILES"}}[shell.name]
    for words in (("predict", "rooms/m3vit_tiny", ""), ("predict", "runs/"), ("check", "")):
        assert tab(*words) == nothing, words


def test_a_shell_that_there_is_none_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("completion", "tcsh") == 2
    assert "tcsh" in capsys.readouterr().err
