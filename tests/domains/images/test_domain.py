"""Wrong data configurations are one clear sentence; sources and previews of right ones work."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moezoo.data.source import ArraySource, First, Info
from moezoo.domains.images.data.preview import Preview, colours, contact_sheet, main
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.domains.images.domain import DataConfig, open_source
from moezoo.errors import UserError
from tests.fixtures import ROOT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "room"}, "Unknown data set 'room': did you mean rooms"),
        ({"augment": ("flop",)}, "Unknown augmentation 'flop': did you mean flip"),
        ({"resolution": (4, 64)}, "at least 8"),
        ({"train": 0}, "at least 1"),
        ({"archive": "NYUDv2"}, "data.archive is given, but rooms is not"),
    ],
)
def test_wrong_fields(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_source(replace(DataConfig(), **change), "train")


def test_wrong_split() -> None:
    with pytest.raises(UserError, match="Unknown split 'trian': did you mean train"):
        open_source(DataConfig(), "trian")


def test_arrays_must_agree() -> None:
    info = Info("toy", "train", (2, 2), ("depth",), {}, kinds=KINDS)
    with pytest.raises(ValueError, match="differ in length"):
        ArraySource(info, {"image": np.zeros((3, 2, 2, 3)), "depth": np.zeros((2, 2, 2))})


def test_first_is_a_prefix(tiny: DataConfig) -> None:
    source = open_source(tiny, "train")
    short = First(source, 4)
    assert len(short) == 4 and short.info is source.info
    np.testing.assert_array_equal(short[3]["depth"], source[3]["depth"])
    with pytest.raises(IndexError):
        short[4]


def test_contact_sheet_shows_every_label(tiny: DataConfig, tmp_path: Path) -> None:
    source = open_source(tiny, "test")
    sheet = contact_sheet(source, range(3))
    assert sheet.shape == (3 * 16, 7 * 24, 3) and sheet.dtype == np.uint8
    panels = sheet.reshape(3, 16, 7, 24, 3)
    np.testing.assert_array_equal(panels[1, :, 0], source[1]["image"])
    for k in range(1, 7):
        assert len(np.unique(panels[:, :, k].reshape(-1, 3), axis=0)) >= 2
    out = tmp_path / "sheet.png"
    main(Preview(out=out, data=tiny, count=2))
    with Image.open(out) as picture:
        assert picture.size == (7 * 24 * 5, 2 * 16 * 5)
    with pytest.raises(UserError, match="Cannot write"):
        main(Preview(out=tmp_path / "missing" / "sheet.png", data=tiny, count=2))


def test_unknown_pixels_are_black(tiny: DataConfig) -> None:
    info = open_source(tiny, "test").info
    depth = np.array([[0.0, 1.0], [2.0, 4.0]], np.float32)
    shown = colours("depth", depth, info)
    assert not shown[0, 0].any() and shown[0, 1].any()
    assert not colours("semseg", np.full((1, 1), 255, np.uint8), info).any()
    assert not colours("edge", np.full((1, 1), 255, np.uint8), info).any()


def test_configurations_do_not_wait_for_tensorflow_datasets() -> None:
    code = "import sys, moezoo.domains.images.domain; print('tensorflow_datasets' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, "False\n"), told.stderr
