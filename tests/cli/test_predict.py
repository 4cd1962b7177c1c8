"""`moezoo predict`, `list`, `info` and `save` as people call them."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moezoo.cli.entry import COMMANDS, usage
from moezoo.errors import run_command
from tests.fixtures import ROOT

PHOTO = ROOT / ".github/pictures/room.png"
MODEL = "rooms/m3vit_tiny"


def command(name: str, *words: object) -> int:
    main = import_module(f"moezoo.cli.{COMMANDS[name]}").main
    with pytest.raises(SystemExit) as end:
        run_command(partial(main, [*map(str, words)], f"moezoo {name}"))
    return int(end.value.code or 0)


def test_one_task_is_a_picture_of_the_photos_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, arrays = tmp_path / "depth.png", tmp_path / "depth.npz"
    words = [MODEL, PHOTO, "--task", "depth", "--plain", "--out", out, "--arrays", arrays]
    assert command("predict", *words) == 0
    assert Image.open(out, formats=["PNG"]).size == Image.open(PHOTO, formats=["PNG"]).size
    assert np.load(arrays)["depth"].shape == (1, 64, 64)
    assert "(metres)" in capsys.readouterr().out


@pytest.mark.slow
def test_experts_from_the_file_give_the_same_prediction(tmp_path: Path) -> None:
    found = []
    for name, more in (("whole", ()), ("streamed", ("--stream",))):
        arrays = tmp_path / f"{name}.npz"
        words = [MODEL, PHOTO, "--task", "depth", "--out", tmp_path / "x.png", "--arrays", arrays]
        assert command("predict", *words, *more) == 0
        found.append(np.load(arrays)["depth"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_several_files_and_tasks_are_a_sheet(tmp_path: Path) -> None:
    small = tmp_path / "small.jpg"
    Image.open(PHOTO, formats=["PNG"]).convert("RGB").resize((90, 50)).save(small)
    assert command("predict", MODEL, PHOTO, small, "--out", tmp_path / "sheet.png") == 0
    width, height = Image.open(tmp_path / "sheet.png", formats=["PNG"]).size
    assert width > 600 and height > 300


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([MODEL, "missing.png"], "missing.png cannot be read"),
        ([MODEL], "Missing from moezoo predict"),
        (["rooms/m3vit_tny", PHOTO], "did you mean rooms/m3vit_tiny"),
        (["rooms/mlore_tiny", PHOTO], "No weights come with rooms/mlore_tiny: train it (moezoo"),
        (["rooms/vit_dense_tiny", PHOTO, "--stream"], "has no MoE layer: nothing can be streamed"),
        ([MODEL, PHOTO, "--plain"], "--plain is for one file and one task"),
        (["text/smora_tiny", PHOTO], "room.png' is no text"),
        ([MODEL, PHOTO, "--task", "dept"], "Unknown task of this model 'dept'"),
        ([MODEL, PHOTO, "--out", PHOTO], "which is to be predicted: name another file"),
        ([MODEL, ROOT / "README.md"], "README.md cannot be read"),
        (["text/smora_tiny", ROOT / "README.md"], "A model of text gives no pictures"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    words: list[object], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = [] if "--out" in words else ["--out", tmp_path / "out.png"]
    assert command("predict", *words, *out) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.startswith("error: ") and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_list_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("list", "--task", "event") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert "sounds/ast_tiny" in names and "sounds/soft_moa_urbansound8k" in names
    assert command("info", MODEL, "--tensors") == 0
    told = capsys.readouterr().out
    for part in ("Fan et al.", "644,923", "moezoo train rooms/m3vit_tiny", "blocks/1/mlp"):
        assert part in told
    assert command("info", "m3vit_tny") == 2
    assert "did you mean" in capsys.readouterr().err


def test_the_command_by_itself() -> None:
    run = partial(subprocess.run, capture_output=True, text=True, cwd=ROOT)
    for words, code, part in (
        (["--help"], 0, "predict"),
        ([], 2, "usage: moezoo COMMAND"),
        (["predit"], 2, "Unknown command 'predit': did you mean predict?"),
        (["--version"], 0, "moezoo 0."),
        (["prune", "--help"], 0, "moezoo prune"),
    ):
        done = run([sys.executable, "-m", "moezoo", *words])
        assert done.returncode == code, done
        assert part in done.stdout + done.stderr
    assert all(f"  {name}" in usage() for name in COMMANDS)
