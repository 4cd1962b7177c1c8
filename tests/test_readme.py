"""README.md is one page, what is generated in it is up to date, links lead somewhere, and every
command in a fenced block of any README is one that its tool understands."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from moezoo import command
from moezoo.cli.entry import COMMANDS
from moezoo.models import table
from moezoo.train import config_file
from tests.fixtures import ROOT, tool

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs/README.md"]
    + list((ROOT / "moezoo").rglob("README.md"))
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
PARSED = (
    "adapter",
    "encoders",
    "evaluate",
    "export",
    "generate",
    "interference",
    "predict",
    "prune",
)


def blocks(page: Path, kind: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text()) if found == kind]


def commands(page: Path) -> list[list[str]]:
    """The words of every command line, also of those in the quotes of another (gcloud, ssh)."""
    found: list[list[str]] = []
    for block in blocks(page, "bash"):
        lines = block.replace("\\\n", " ").splitlines()
        while lines:
            words = shlex.split(lines.pop(0), comments=True)
            lines += [word for word in words if "python " in word]
            while "&&" in words:
                found.append(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            found.append(words)
    return found


def after_python(words: list[str]) -> list[str]:
    """What follows `python` in a command, [] where it runs something else."""
    return words[words.index("python") + 1 :] if "python" in words else []


def check_command(words: list[str]) -> None:
    """`moezoo` understands what follows it."""
    name, rest = words[0], words[1:]
    assert name in COMMANDS, name
    module = import_module(f"moezoo.cli.{COMMANDS[name]}")
    kind = getattr(module, f"{COMMANDS[name].capitalize()}Command", None)
    if "--help" in rest or "--resume" in rest:
        return
    if name == "train":
        named = [word for word in rest[:1] if not word.startswith("--")]
        config_file.load(named[0] if named else "rooms/m3vit_tiny", rest[len(named) :])
    elif kind is not None:
        assert dataclasses.is_dataclass(command.parse(kind, rest, prog=name))


def check_tool(name: str, words: list[str]) -> None:
    """The tool's own arguments accept these words."""
    given = command.parse(getattr(tool(name), f"{name.capitalize()}Command"), words, prog=name)
    assert dataclasses.is_dataclass(given)


def test_the_first_page_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "moezoo/models/README.md"])
def test_the_tables_of_systems_are_those_of_the_cards(page: str) -> None:
    text = (ROOT / page).read_text()
    assert table.written(text) == text, table.BEGIN


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_understood(page: Path) -> None:
    for words in commands(page):
        rest = after_python(words)
        if words[:1] == ["moezoo"]:
            check_command(words[1:])
        elif rest[:1] == ["train.py"]:
            check_command(["train", *rest[1:]])
        elif rest and rest[0].startswith("tools/"):
            name = Path(rest[0]).stem
            assert (ROOT / rest[0]).exists(), rest[0]
            if name in PARSED:
                check_tool(name, rest[1:])
        elif rest[:1] == ["-m"]:
            assert importlib.util.find_spec(rest[1]) is not None, rest[1]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_is_python_and_imports_what_there_is(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
        lines = [line for line in code.splitlines() if line.startswith(("import ", "from "))]
        exec("\n".join(lines), {})  # noqa: S102
