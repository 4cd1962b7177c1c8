"""What the Python functions refuse, each in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moezoo
from moezoo.errors import UserError


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"domain": ["images"]}, r"domain is \['images'\]; it must be a name"),
        ({"task": 3}, "task is 3; it must be a name"),
        ({"pretrained": "yes"}, "pretrained is 'yes'; it must be True or False"),
    ],
)
def test_lists_of_models(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        moezoo.list_models(**given)


@pytest.mark.parametrize("path", [None, 7, b"rooms/m3vit_tiny"])
def test_what_is_loaded_is_a_folder_or_a_name(path: Any) -> None:
    with pytest.raises(UserError, match="What is to be loaded is .*; give a folder or a name"):
        moezoo.load(path)


def test_a_photo_is_not_painted_over(tmp_path: Path) -> None:
    model = moezoo.load("rooms/m3vit_tiny")
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"a photo")
    with pytest.raises(UserError, match="which is to be painted: name another"):
        model.picture(photo, tmp_path / "x" / ".." / "photo.png")
    assert photo.read_bytes() == b"a photo"
    with pytest.raises(UserError, match="The picture's file is 3; give a path"):
        model.picture(photo, 3)
