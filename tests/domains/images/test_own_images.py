"""The README's way to one's own images, run as it stands there on a handful of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fixtures import ROOT
from tests.growth.test_growth import run

PAGE = ROOT / "moezoo/domains/images/README.md"


def fields(folder: Path) -> Path:
    """Six photos of soil beside crop with their masks, and the configuration file of the README."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[:1]
    for kind in ("photos", "masks"):
        (folder / "fields" / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        mask = np.zeros((40, 52), np.uint8)
        mask[:, rng.integers(10, 40) :] = 1
        photo = np.where(mask[..., None], (40, 160, 60), (120, 80, 40)).astype(np.uint8)
        Image.fromarray(mask).save(folder / f"fields/masks/{i}.png")
        Image.fromarray(photo).save(folder / f"fields/photos/{i}.png")
    (folder / "fields.py").write_text(code)
    return folder / "fields.py"


@pytest.mark.slow
@pytest.mark.claims  # a folder of one's own is trained by test_own_folder
def test_own_images_are_trained_and_used_as_the_readme_says(tmp_path: Path) -> None:
    steps = "--train.steps 2 --train.batch 2 --optimiser.warmup 0 --evaluate.pictures 1".split()
    run("train.py", fields(tmp_path), "--directory", tmp_path / "runs", *steps)
    trained = tmp_path / "runs/fields"
    assert "mIoU" in (trained / "report.md").read_text()
    run("tools/export.py", trained, "--task", "semseg", "--out", tmp_path / "export")
    photo = tmp_path / "fields/photos/0.png"
    said = run("tools/predict.py", tmp_path / "export", photo, "--out", tmp_path / "out.png")
    assert "crop" in said and "soil" in said and Image.open(tmp_path / "out.png").size[0] > 0
