"""Rendered views that several tests look at, and a tiny stored data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from moezoo.domains.images.data.rooms.render import View, render
from moezoo.domains.images.data.rooms.scene import Scene, sample
from moezoo.domains.images.domain import DataConfig
from tests.domains.images.data import pets


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    """Scenes of the training split."""
    return [sample(0, "train", index) for index in range(24)]


@pytest.fixture(scope="session")
def views(scenes: list[Scene]) -> list[View]:
    """The same scenes at 64x64."""
    return [render(scene, 64, 64) for scene in scenes]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A stored data set of 18 + 7 scenes of 16x24 pixels."""
    where: Path = tmp_path_factory.mktemp("data")
    return DataConfig(resolution=(16, 24), train=18, test=7, data_dir=str(where))


@pytest.fixture(scope="session")
def pets_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked archives of the pets; one picture is no JPEG."""
    where = pets.make_pets(tmp_path_factory.mktemp("pets"))
    pets.disguise(where / "images/beagle_2.jpg")
    return where


@pytest.fixture(scope="session")
def pets_config(pets_place: Path) -> DataConfig:
    """The pets at 24x40."""
    return DataConfig(
        name="oxford_iiit_pet",
        resolution=(24, 40),
        archive=str(pets_place),
        data_dir=str(pets_place / "data"),
        augment=(),
    )
