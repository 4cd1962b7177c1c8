"""Models by name, from folders and from training: the four functions of `import moezoo`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moezoo
from moezoo.errors import UserError
from moezoo.front import card
from moezoo.front.catalogue import full_name
from moezoo.front.model import ZooModel
from moezoo.train import restore
from moezoo.train.config_file import FOLDERS

SMALL = {"width": 24, "depth": 2, "heads": 2, "head_channels": 8}
TASKS = {"depth": 1, "semseg": 5}


def small(**options) -> ZooModel:
    return moezoo.create(
        "rooms/m3vit_tiny", **{"tasks": TASKS, "image_size": (32, 48), "model": SMALL} | options
    )


@pytest.fixture(scope="module")
def model() -> ZooModel:
    return small()


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), np.uint8)


def test_the_package_shows_four_functions_and_is_imported_at_once() -> None:
    code = (
        "import time, sys; start = time.perf_counter(); import moezoo; "
        "print(time.perf_counter() - start, 'jax' in sys.modules, dir(moezoo))"
    )
    words = [sys.executable, "-c", code]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    seconds, rest = told.split(" ", 1)
    assert float(seconds) < 0.3
    assert rest.strip() == "False ['create', 'list_models', 'load', 'streamed', 'train']"


@pytest.mark.parametrize("first", ["import moezoo.train.loop", "import moezoo.front.build", "pass"])
def test_train_is_a_function_and_a_package_whatever_was_imported_first(first: str) -> None:
    code = f"{first}\nimport moezoo, moezoo.train.schema\nassert callable(moezoo.train)\n"
    code += "assert moezoo.train.schema.Config"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_are_listed_by_domain_and_task() -> None:
    everything = moezoo.list_models()
    assert len(everything) == len(set(everything)) == len(list(FOLDERS[-1].rglob("[a-z]*.py")))
    sounds = moezoo.list_models(domain="audio")
    assert sounds and all(name.startswith("sounds/") for name in sounds)
    assert "rooms/m3vit_tiny" in moezoo.list_models(task="depth")
    assert "rooms/m3vit_tiny" not in moezoo.list_models(task="scene")
    with pytest.raises(UserError, match="Unknown task 'dept': did you mean depth"):
        moezoo.list_models(task="dept")
    with pytest.raises(UserError, match="Unknown domain 'image': did you mean images"):
        moezoo.list_models(domain="image")


def test_a_name_is_found_by_its_tasks() -> None:
    assert full_name("m3vit_small", ["depth", "semseg"]) == "nyud/m3vit_small"
    assert full_name("m3vit_small", ["semseg", "normals", "edge", "depth"]) == "rooms/m3vit_small"
    assert full_name("m3vit_small", ["parts"]) == "pascal/m3vit_small"
    with pytest.raises(UserError, match="'m3vit_small' may be nyud/m3vit_small or pascal"):
        full_name("m3vit_small")
    with pytest.raises(UserError, match="may be nyud/m3vit_small or rooms/m3vit_small: give"):
        full_name("m3vit_small", ["depth"])
    with pytest.raises(UserError, match="Unknown model 'm3vit_smal': did you mean m3vit_small"):
        full_name("m3vit_smal")


def test_what_is_asked_for_is_what_is_there(model: ZooModel, photos: np.ndarray) -> None:
    found = model(photos)
    assert set(found) == set(TASKS)
    assert found["depth"].shape == (3, 32, 48) and found["semseg"].shape == (3, 32, 48)
    assert np.asarray(found["semseg"]).max() < 5
    only = model(photos, ["depth"])
    assert set(only) == {"depth"}
    np.testing.assert_allclose(only["depth"], found["depth"], rtol=1e-4, atol=1e-5)


def test_examples_may_be_files_of_several_sizes(
    model: ZooModel, photos: np.ndarray, tmp_path: Path
) -> None:
    file = tmp_path / "photo.png"
    Image.fromarray(photos[0]).save(file)
    mixed = model([str(file), photos[1], photos[2][:30]], "depth")["depth"]
    alone = model(photos[:2], "depth")["depth"]
    assert mixed.shape == (3, 32, 48)
    np.testing.assert_allclose(mixed[:2], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="missing.png cannot be read"):
        model(["missing.png"])
    with pytest.raises(UserError, match="keep is 9, but every layer has 8 experts"):
        model.task_path("depth", keep=9)
    with pytest.raises(UserError, match="Unknown task of this model 'dept'"):
        model.labels("dept")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tasks": {"depth": 3}}, "Task depth has 1 output channels, not 3"),
        ({"tasks": ["dept"]}, "Unknown model|Unknown task 'dept'"),
        ({"image_size": (30, 30)}, "multiples of the patch"),
        ({"model": {"widht": 4}}, "Unknown field of the configuration 'model.widht'.*model.width"),
        ({"model": {"width": "x"}}, "model.width is 'x'; expected a whole number"),
        ({"modle": {}}, "Unknown field of the configuration 'modle': did you mean model"),
        ({"pretrained": "atlantis"}, "pretrained is 'atlantis', which is no folder or file here"),
        ({"seed": -1}, "seed is -1; it must be"),
        ({"start_from": "runs/x"}, "name what a model begins with as `pretrained`"),
        ({"tasks": [None]}, "tasks.* is None; expected"),
        ({"tasks": 3}, "tasks is 3; expected words"),
        ({"image_size": 100}, "image_size is 100; give height and width"),
        ({"pretrained": True}, "pretrained is True; give the name of data"),
    ],
)
def test_what_cannot_be_is_one_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        small(**options)


def test_a_seed_decides_and_lists_are_tuples(model: ZooModel, photos: np.ndarray) -> None:
    same, other = small(), small(seed=1, data={"augment": ["flip"]})
    first = model(photos)["depth"]
    np.testing.assert_array_equal(first, same(photos)["depth"])
    assert np.any(first != other(photos)["depth"])
    assert other.config.data.augment == ("flip",) and other.config.seed == 1  # type: ignore[attr-defined]


def test_saved_and_loaded_it_is_the_same_but_for_rounding(
    model: ZooModel, photos: np.ndarray, tmp_path: Path
) -> None:
    folder = model.save(tmp_path / "saved")
    again = moezoo.load(folder)
    assert isinstance(again, ZooModel) and again.tasks == model.tasks
    before, after = model(photos)["depth"], again(photos)["depth"]
    np.testing.assert_allclose(after, before, rtol=0.05, atol=0.05)
    twice = moezoo.load(again.save(tmp_path / "twice"))  # rounding happens once
    np.testing.assert_array_equal(twice(photos)["depth"], after)
    with pytest.raises(UserError, match="exists already"):
        model.save(tmp_path / "saved")


def test_weights_begin_another_model(model: ZooModel, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "saved")
    # A third task: the trunk is taken over, its head and routers' rows are fresh.
    wider = small(tasks=["depth", "semseg", "edge"], pretrained=folder)
    assert "arrays taken over" in wider.about.origin
    with pytest.raises(UserError, match="model.heads is 3"):
        small(model=SMALL | {"heads": 3}, pretrained=folder)


def test_a_folder_of_nothing_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is nothing at"):
        moezoo.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not an exported folder, a run, a saved model"):
        moezoo.load(tmp_path)
    (tmp_path / "words").write_text("no weights")
    with pytest.raises(UserError, match="words' is no file of weights that can be read here"):
        moezoo.load(tmp_path / "words")
    for read in (moezoo.load, restore.read_config, restore.find):
        with pytest.raises(UserError, match="^No weights come with rooms/mlore_tiny: train it"):
            read("rooms/mlore_tiny")


@pytest.mark.slow
def test_train_load_cut_export(tmp_path: Path, photos: np.ndarray) -> None:
    trained = moezoo.train(
        "rooms/m3vit_tiny",
        name="small",
        directory=str(tmp_path),
        tasks=["depth", "semseg"],
        model=SMALL,
        data={"train": 16, "test": 8, "resolution": (32, 32)},
        train={"steps": 2, "batch": 8, "weights": {}},
        optimiser={"warmup": 0},
        evaluate={"batch": 8, "pictures": 1},
    )
    assert set(trained.about.scores) == {"depth", "semseg"}
    told = dict(card.of(tmp_path / "small").lines)
    assert told["weights"] == "step 2 of this run"
    assert "test: depth" in told and "test: semseg" in told
    again = moezoo.load(tmp_path / "small")
    assert isinstance(again, ZooModel)
    np.testing.assert_array_equal(again(photos)["depth"], trained(photos)["depth"])
    whole, cut = again.task_path("depth"), again.task_path("depth", keep=2, calibration=4)
    np.testing.assert_allclose(whole(photos), again(photos)["depth"], rtol=1e-4, atol=1e-4)
    assert cut.certificate["kind"] == "pruned" and "parameters" in cut._repr_html_()
    folder = cut.export(tmp_path / "export")
    exported = moezoo.load(folder)
    np.testing.assert_allclose(exported(photos)["prediction"], cut(photos), rtol=1e-4, atol=1e-4)
    assert np.asarray(cut.violations(photos)).shape == (3,)
    assert "<th>path</th><td>pruned</td>" in exported._repr_html_()
    shown = card.of(folder)
    lines = dict(shown.lines)
    assert lines["task"] == "depth (metres)" and "whole model" in lines["test: rmse"]
    assert shown.tensors and "Removed experts" in shown.about


def test_an_own_configuration_is_trained_as_it_is(tmp_path: Path) -> None:
    config = replace(small().config, name="../out", directory=str(tmp_path))
    with pytest.raises(UserError, match="name is"):
        moezoo.train(config)
