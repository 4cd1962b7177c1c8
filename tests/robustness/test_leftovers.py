"""Writing that fails leaves nothing behind, and says why it failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moezoo.deploy.runtime import drawing
from moezoo.domains.images.data import preview
from moezoo.errors import UserError
from tests.fixtures import tool


def write_picture(path: Path) -> None:
    drawing.write_image(path, np.zeros((2, 2, 3), np.uint8))


def write_arrays(path: Path) -> None:
    tool("predict").write_arrays(path, {"depth": np.zeros((2, 2), np.float32)})


def write_preview(path: Path) -> None:
    preview.main(preview.Preview(out=path))


@pytest.fixture(autouse=True)
def one_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contact sheet without any data set."""
    monkeypatch.setattr(preview, "open_source", lambda data, split: [])
    monkeypatch.setattr(preview, "contact_sheet", lambda s, i: np.zeros((2, 64, 3), np.uint8))


WRITERS = [write_picture, write_arrays, write_preview]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_where_a_folder_should_be(write: Callable[[Path], None], tmp_path: Path) -> None:
    """Cleaning up fails as well there, which must not hide the reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, drawing.ExportError), match="Not a directory|File exists"):
        write(tmp_path / "file" / "out.png")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **words: Any) -> None:
        if given and isinstance(given[0], Image.Image):
            Path(given[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "out.png").write_bytes(b"older")
    with pytest.raises((UserError, drawing.ExportError), match="No space left on device"):
        write(tmp_path / "out.png")
    assert os.listdir(tmp_path) == ["out.png"]
    assert (tmp_path / "out.png").read_bytes() == b"older"


def test_arrays_go_to_the_very_file_that_is_named(tmp_path: Path) -> None:
    write_arrays(tmp_path / "numbers")
    assert os.listdir(tmp_path) == ["numbers"]
    with np.load(tmp_path / "numbers", allow_pickle=False) as found:
        assert found["depth"].shape == (2, 2)
    with pytest.raises(UserError, match=f"Could not write {tmp_path}"):
        write_arrays(tmp_path)
    assert os.listdir(tmp_path) == ["numbers"]
