"""Numbers and words of the tools that mean nothing: one sentence before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moezoo.deploy.produce import Request
from moezoo.errors import UserError
from tests.deploy.test_tools import command


@pytest.mark.parametrize("name", ["keep", "total", "calibration", "batch"])
@pytest.mark.parametrize("value", [0, -1])
def test_requests_of_nothing(name: str, value: int) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(UserError, match=f"--{name} is {value}; it must be at least 1"):
        Request(**given)


@pytest.mark.parametrize("usage", [-1.0, 101.0, float("nan")])
def test_shares_that_are_none(usage: float) -> None:
    with pytest.raises(UserError, match="it is a share"):
        Request(usage=usage)


@pytest.mark.parametrize(
    ("tool", "words", "says"),
    [
        ("export", ("--task", "depth", "--out", "out", "--batch", 0), "--batch is 0"),
        ("export", ("--task", "depth", "--out", "out", "--keep", 0), "--keep is 0"),
        ("export", ("--task", "depth", "--out", "out", "--json", "a"), "--json needs --compare"),
        ("export", ("--compare", "--out", "out"), "writes no export"),
        ("prune", ("--task", "depth", "--out", "out", "--keep", 0), "--keep is 0"),
        ("prune", ("--task", "depth", "--out", "out", "--total", -3), "--total is -3"),
        ("predict", ("photo.png", "--seconds", 0), "--seconds is 0"),
        ("predict", ("photo.png", "--seconds", "nan"), "--seconds is nan"),
        ("evaluate", ("--batch", 0), "--batch is 0"),
        ("evaluate", ("--examples", -5), "--examples is -5"),
        ("evaluate", ("--json", ""), "is empty: leave it out, or fill it in"),
        ("evaluate", ("--json", "/"), "Could not write /: it is a folder"),
        ("export", ("--compare", "--json", ""), "is empty: leave it out, or fill it in"),
        ("interference", ("--out", ""), "is empty: leave it out, or fill it in"),
        ("interference", ("--json", "/tmp"), "Could not write /tmp: it is a folder"),
        ("predict", ("photo.png", "--out", ""), "is empty: leave it out, or fill it in"),
        ("predict", ("photo.png", "--arrays", "/tmp"), "Could not write /tmp: it is a folder"),
    ],
)
def test_commands_refuse_them(
    tool: str, words: tuple[object, ...], says: str, tmp_path: Path, capsys: Any
) -> None:
    assert command(tool, tmp_path / "run", *words) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000], ids=["a name", "all of it"])
@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("evaluate", ("LONG",)),
        ("evaluate", ("run", "--json", "LONG")),
        ("export", ("LONG", "--task", "depth", "--out", "out")),
        ("export", ("run", "--task", "depth", "--out", "LONG")),
        ("prune", ("run", "--task", "depth", "--out", "LONG", "--keep", "2")),
        ("interference", ("run", "LONG")),
        ("predict", ("LONG", "photo.png")),
        ("predict", ("run", "photo.png", "--arrays", "LONG")),
        ("adapter", ("LONG", "--out", "out")),
        ("encoders", ("run", "--out", "LONG")),
        ("generate", ("LONG", "words")),
        ("bench", ("moe", "--json", "LONG")),
        ("plan", ("rooms/m3vit_tiny", "--topology", "v5p:2x2x1", "--json", "LONG")),
    ],
)
def test_paths_that_are_too_long(
    tool: str, words: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(tool, *(name if word == "LONG" else word for word in words)) == 2
    said = capsys.readouterr().err
    assert "too long" in said and said.count("\n") == 1, said
    assert list(tmp_path.iterdir()) == []
