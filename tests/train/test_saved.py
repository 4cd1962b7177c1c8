"""Saved models: what comes back, and what is said of damaged folders and those of others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import jax
import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.train import mesh as meshes
from moezoo.train import placement, restore, saved, setup, start, zoo
from moezoo.train.config_file import load
from moezoo.train.domain import Classes
from moezoo.train.schema import Config, MeshConfig
from moezoo.weights.tensor_file import TensorFile
from tests.fixtures import devices

WORDS = "--model.width 24 --model.heads 2 --model.head_channels 8 --data.resolution 16 16".split()
CLASSES = Classes(
    {"semseg": 14, "parts": 17, "scene": 5},
    {"semseg": tuple(f"thing {i}" for i in range(14))},
    None,
    {"semseg": np.arange(42, dtype=np.uint8).reshape(14, 3)},
)
ABOUT = zoo.About(7, "here", CLASSES, {"depth": {"rmse": 0.5}}, {"command": "none"})


@pytest.fixture(scope="module")
def config() -> Config:
    return load("rooms/m3vit_tiny", WORDS)


@pytest.fixture(scope="module")
def parts(config: Config) -> module.ModuleParts:
    return module.create(setup.make_builder(config, setup.make_tasks(config, CLASSES)))


@pytest.fixture(scope="module")
def written(
    config: Config, parts: module.ModuleParts, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    return saved.write(folder, config, parts.params, parts.stats, ABOUT)


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def flat(parts: module.ModuleParts) -> dict[str, np.ndarray]:
    return module.flatten({"params": parts.params, "stats": parts.stats})


def test_everything_comes_back(written: Path, config: Config, parts: module.ModuleParts) -> None:
    about = zoo.read_about(written)
    assert about[:2] == (7, "here") and about.scores == ABOUT.scores and about.facts == ABOUT.facts
    assert about.classes.counts == CLASSES.counts and about.classes.names == CLASSES.names
    np.testing.assert_array_equal(about.classes.colours["semseg"], CLASSES.colours["semseg"])
    assert restore.read_config(written) == config
    loaded = setup.load_run(written)
    assert loaded.step == 7 and [task.name for task in loaded.tasks][0] == "semseg"
    found = flat(module.split(loaded.model))
    for name, array in flat(parts).items():
        assert found[name].dtype == array.dtype
        wanted = np.asarray(array)
        if array.ndim > 1:  # matrices are stored as bfloat16, vectors as they are
            wanted = wanted.astype(jax.numpy.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found[name], wanted, name)


@pytest.mark.parametrize("sizes", [{"data": 1}, {"fsdp": 2, "data": 1}, {"expert": 4, "data": 1}])
def test_arrays_go_straight_to_their_devices(
    sizes: dict[str, int], written: Path, parts: module.ModuleParts
) -> None:
    mesh = meshes.make_mesh(MeshConfig(**sizes), devices(int(np.prod(list(sizes.values())))))
    tree = {"params": parts.params, "stats": parts.stats}
    places = placement.shardings(mesh, tree)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places
    )
    found = restore.load_params(written, target)
    assert found["step"] == 7
    alone = saved.read_arrays(written)
    for name, array in module.flatten({g: found[g] for g in saved.GROUPS}).items():
        assert array.sharding == module.flatten(places)[name]
        np.testing.assert_array_equal(array, module.flatten(alone)[name])


def test_a_run_can_begin_with_it(written: Path, config: Config, parts: module.ModuleParts) -> None:
    start.check(written, config)
    start.check_fits(written, config)
    state = {"params": parts.params, "stats": parts.stats}
    begun, told = start.started(written, config, state)
    assert f"{len(flat(parts))} of {len(flat(parts))} arrays taken over" in told
    for name, array in module.flatten(begun["params"]).items():
        assert array.dtype == np.float32, name
    other = load("rooms/m3vit_tiny", [*WORDS, "--model.heads", "3"])
    with pytest.raises(UserError, match="model.heads is 3, but the model in .* has 2"):
        start.check_fits(written, other)


def test_not_finite_is_refused_and_leaves_nothing(
    config: Config, parts: module.ModuleParts, tmp_path: Path
) -> None:
    broken = jax.tree.map(lambda x: x.at[...].set(np.nan) if x.ndim == 1 else x, parts.params)
    with pytest.raises(UserError, match="is not finite, the run had diverged"):
        saved.write(tmp_path / "out", config, broken, parts.stats, ABOUT)
    assert list(tmp_path.iterdir()) == []


def change(folder: Path, edit: Callable[[dict], None]) -> None:
    file = folder / zoo.ABOUT
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda d: d.update(format=99), "has format 99, this version of moezoo reads 1: update it"),
        (lambda d: d.pop("step"), "is damaged .step is missing"),
        (lambda d: d.update(steps=1), "is damaged .steps is not known"),
        (lambda d: d.update(origin="a\nb"), "origin is .* printable characters only"),
        (lambda d: d["colours"].update(semseg=["red"]), "colours.semseg.0. is 'red'"),
        (lambda d: d["class_names"].update(semseg=["a"]), "semseg has 1 entries, there are 14"),
        (lambda d: d["colours"].update(semseg=["#000000"]), "colours.semseg has 1 entries"),
        (lambda d: d.update(groups=["a"]), "it has 1 groups, the model 4"),
        (lambda d: d["sha256"].update({zoo.WEIGHTS: "0" * 64}), "wrong checksum"),
    ],
)
def test_damage_is_one_sentence(edit: Callable[[dict], None], sentence: str, copy: Path) -> None:
    change(copy, edit)
    with pytest.raises(UserError, match=sentence) as error:
        setup.load_run(copy)
    assert str(copy) in str(error.value) and str(error.value).endswith(".")


def test_weights_that_are_not_finite_are_no_model(copy: Path) -> None:
    """Of a folder that was not written here: its checksums are right."""
    file = copy / zoo.WEIGHTS
    content = bytearray(file.read_bytes())
    entry = TensorFile(file).entries["params/blocks/1/mlp/router/kernel"]
    content[entry.start : entry.end] = b"\xff\xff" * ((entry.end - entry.start) // 2)
    file.write_bytes(content)
    change(copy, lambda d: d["sha256"].update({zoo.WEIGHTS: sha256(content).hexdigest()}))
    for read in (setup.load_run, saved.read_arrays):
        with pytest.raises(
            UserError, match="is no model: params/blocks/1/mlp/router/kernel is not"
        ):
            read(copy)


def test_a_truncated_file_is_told(copy: Path) -> None:
    file = copy / zoo.WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="is damaged .wrong checksum.: save it again"):
        setup.load_run(copy)
    (copy / zoo.ABOUT).write_bytes(b"{")
    with pytest.raises(UserError, match="is damaged .it is not JSON"):
        setup.load_run(copy)


def test_weights_of_another_model_are_named(
    config: Config, parts: module.ModuleParts, tmp_path: Path
) -> None:
    params = module.flatten(parts.params)
    name, array = next(iter(params.items()))
    several = {
        "has no": {n: a for n, a in params.items() if n != name},
        "it has params/more, too": {**params, "more": array},
        f"{name} is": {**params, name: np.zeros((1, *array.shape), np.float32)},
    }
    for number, (sentence, other) in enumerate(several.items()):
        folder = tmp_path / str(number)
        saved.write(folder, config, module.unflatten(other), parts.stats, ABOUT)
        with pytest.raises(UserError, match=f"is of another model: .*{sentence.split()[-1]}"):
            setup.load_run(folder)


def test_a_folder_here_goes_before_a_name_of_the_packages(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "zoo"
    shutil.copytree(written, own / "rooms/one")
    monkeypatch.setattr(zoo, "ZOO", own)
    assert zoo.names() == ("rooms/one",)
    monkeypatch.chdir(tmp_path)
    assert zoo.located("rooms/one") == own / "rooms/one"
    (tmp_path / "rooms/one").mkdir(parents=True)
    assert zoo.located("rooms/one") == Path("rooms/one")
    assert zoo.located("rooms/two") == Path("rooms/two")
    assert not zoo.holds("rooms/one")
