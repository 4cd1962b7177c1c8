"""From a folder of images and masks to exports, by the README's commands as they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from moezoo.cli.entry import COMMANDS
from tests.domains.images.data import coco_files, folders, table_files
from tests.fixtures import ROOT

PAGE = ROOT / "moezoo/domains/images/README.md"
SMALL = """--train.steps 2 --train.batch 8 --optimiser.warmup 0 --evaluate.pictures 1
    --evaluate.batch 8 --model.width 24 --model.head-channels 8 --model.depth 2 --model.stem patch
    --model.dispatch reference --data.resolution 16 24"""


def commands() -> list[list[str]]:
    """The words of each command of the section."""
    (block,) = re.findall(r"<!-- own folder -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.slow
def test_a_folder_is_checked_trained_pruned_and_exported_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folders.make(tmp_path / "plots", count=40, size=(24, 36))
    for first, command, *words in commands():
        assert first == "moezoo"
        words += SMALL.split() if command == "train" else []
        main = import_module(f"moezoo.cli.{COMMANDS[command]}").main
        assert not main(words, f"moezoo {command}"), command
    said = capsys.readouterr().out
    assert "40 images, 3" in said and "tasks semseg, depth" in said
    assert "folder, 3" in (tmp_path / "runs/plots/report.md").read_text()
    for name in ("semseg", "depth"):
        assert (tmp_path / f"exports/plots_{name}/manifest.json").is_file()
    for picture in ("sheet.png", "plot0_semseg.png"):
        with Image.open(tmp_path / picture, formats=["PNG"]) as image:
            assert min(image.size) >= 24


@pytest.mark.parametrize(
    ("make", "needs"),
    [
        pytest.param(coco_files.make, "pycocotools", marks=pytest.mark.slow, id="coco"),
        pytest.param(table_files.saved, "pyarrow", marks=pytest.mark.claims, id="tables"),
    ],
)
def test_annotations_of_others_are_trained_on_and_evaluated(
    make: Callable[[Path], Path],
    needs: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "plots")
    words = "rooms/m3vit_tiny --name plots --data.name folder --data.archive plots --tasks semseg"
    for command, given in (("check", "plots"), ("train", f"{words} {SMALL}"), ("evaluate", "")):
        main = import_module(f"moezoo.cli.{COMMANDS[command]}").main
        assert not main((given or "runs/plots").split(), f"moezoo {command}"), command
    said = capsys.readouterr().out
    assert "8 images, 6 train, 2 test" in said and "semseg" in said.split("report.md")[-1]
