"""The weights that come with the package: there, whole, documented, and as good as they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moezoo
from moezoo.front import card, catalogue
from moezoo.front.model import ZooModel
from moezoo.train import saved, zoo
from tests.fixtures import ROOT

NAMES = zoo.names()
MOST = 15_000_000  # bytes of all of them
PHOTO = ROOT / ".github/pictures/room.png"


def test_there_are_some_and_they_are_small() -> None:
    assert "rooms/m3vit_tiny" in NAMES
    files = [file for name in NAMES for file in (zoo.ZOO / name).iterdir()]
    assert sum(file.stat().st_size for file in files) < MOST


@pytest.mark.parametrize("name", NAMES)
def test_each_has_its_card(name: str) -> None:
    folder = zoo.ZOO / name
    about = zoo.read_about(folder)
    saved.verify(folder)
    assert {"command", "seed", "hardware", "data"} <= set(about.facts)
    assert name in about.facts["command"]
    config = saved.read_config(folder)
    for task in config.tasks:
        assert about.scores[task], task
    tasks = moezoo.load(name).tasks
    assert tasks and set(tasks) <= set(config.tasks)
    lines = dict(card.of(name).lines)
    assert lines["weights"] == about.origin and about.facts["command"] in lines.values()
    readme = (ROOT / "moezoo/front/README.md").read_text()
    assert f"| `{name}` |" in readme
    assert name in catalogue.list_models(pretrained=True)


def test_a_prediction_from_a_photo() -> None:
    model = moezoo.load("rooms/m3vit_tiny")
    assert isinstance(model, ZooModel)
    found = model([model.read(PHOTO)])
    metres = np.asarray(found["depth"])
    assert 1.0 < metres.min() < metres.max() < 8.0  # a room
    names = model.labels("semseg")
    bed = np.mean(np.asarray(found["semseg"]) == names.index("bed"))
    assert bed > 0.05  # there is one


@pytest.mark.claims
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_weights(name: str, tmp_path: Path) -> None:
    """By the command, with one device: some scores are among the examples of a batch."""
    file = tmp_path / "scores.json"
    words = [sys.executable, "-m", "moezoo", "evaluate", name, "--json", str(file)]
    subprocess.run(words, check=True, cwd=ROOT, capture_output=True)
    stored = zoo.read_about(zoo.ZOO / name).scores
    found = json.loads(file.read_text())["scores"]
    assert found.keys() == stored.keys()
    for task, scores in found.items():
        for metric, value in scores.items():
            # Another compiler rounds otherwise, and a class that nearly won may win.
            np.testing.assert_allclose(stored[task][metric], value, rtol=5e-3, atol=2e-3)
