"""What the Python functions refuse, each in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moezoo
from moezoo.cli import bench
from moezoo.errors import UserError
from moezoo.front import card
from tests.weights import libraries


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


def test_a_name_that_is_like_no_model_lists_none(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="Unknown model 'exports': moezoo list shows all; a run"
    ) as e:
        card.of("exports")
    assert "tiny" not in str(e.value)


def test_a_library_of_adapters_has_a_card(tmp_path: Path) -> None:
    folder = libraries.library(tmp_path / "lib").folder
    shown = card.of(folder)
    assert ("members", "3: a0, a1, a2") in shown.lines and ("base", "tiny") in shown.lines
    assert shown.about.endswith(f"moezoo library list {folder}")


def test_a_lora_is_called_one_with_its_base_and_its_data() -> None:
    lines = dict(card.to_print("text/library_member").lines)
    assert "plain LoRA of rank 8" in lines["what it is"] and "paper" not in lines
    assert (lines["begins with"], lines["data"]) == ("text/skills_tiny", "instructions: sort")


def test_every_benchmark_has_a_line() -> None:
    shown = bench.usage()
    assert all(f"  {name} " in shown for name in bench.BENCHMARKS)
    assert "Every route over a library of adapters" in shown
