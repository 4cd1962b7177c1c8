"""Exports: equal outputs in a process without moezoo, damage is found, nothing overwritten."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from moezoo.deploy import export
from moezoo.deploy.export import Content
from moezoo.deploy.manifest import Facts
from moezoo.deploy.runtime import load
from moezoo.deploy.runtime.load import ExportError, load_export
from moezoo.errors import UserError
from moezoo.tasks.painting import Probability
from tests.deploy.conftest import CLASSES, SIZE, Case
from tests.tasks.tables import IMAGES, build

NAMES = tuple(f"thing {i}" for i in range(CLASSES))
FACTS = Facts(labels=NAMES)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Reads the folder by the formats' own rules: no line of moezoo takes part.
ALONE = """
import importlib.abc, json, pathlib, sys
import numpy as np

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moezoo", "flax", "orbax", "safetensors", "einops"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
import jax
from jax import export

folder = pathlib.Path(sys.argv[1])
data = (folder / "model.safetensors").read_bytes()
size = int.from_bytes(data[:8], "little")
header = json.loads(data[8:8 + size])
header.pop("__metadata__")
weights = {}
for name, entry in header.items():
    assert entry["dtype"] == "F32"
    a, b = entry["data_offsets"]
    array = np.frombuffer(data[8 + size + a:8 + size + b], np.float32)
    weights[name] = array.reshape(entry["shape"])
exported = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
images = np.load(sys.argv[2])
results = {}
for rows in (1, len(images)):
    outputs = jax.jit(exported.call)(weights, images[:rows])
    results |= {f"{name}{rows}": np.asarray(value) for name, value in outputs.items()}
assert not [m for m in sys.modules if m.split(".")[0] in ("moezoo", "flax")]
np.savez(sys.argv[3], **results)
"""


def content(case: Case) -> Content:
    certificate = {"task": "semseg", "note": "made by a test"}
    return Content(case.cut, case.task, FACTS, {"name": "test"}, certificate, case.images[:2])


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory) -> Path:
    return export.write(tmp_path_factory.mktemp("export") / "out", content(case))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def predictor(folder: Path) -> load.Predictor:
    return load_export(folder)


def isolated(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that ignores the environment and the current folder."""
    command = [sys.executable, "-I", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_written_again_it_is_the_same_to_the_byte(case: Case, folder: Path, tmp_path: Path) -> None:
    again = export.write(tmp_path / "again", content(case))
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again).as_posix() for p in again.rglob("*") if p.is_file())
    differ = {n for n in names if (folder / n).read_bytes() != (again / n).read_bytes()}
    # What the clock says, and nothing else.
    assert differ <= {"manifest.json"}
    both = [json.loads((one / "manifest.json").read_text()) for one in (folder, again)]
    for manifest in both:
        assert manifest["versions"].pop("exported_at")
    assert both[0] == both[1]


@pytest.mark.slow
def test_fresh_process_without_moezoo(case: Case, folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", case.images)
    (tmp_path / "alone.py").write_text(ALONE)
    arguments = (tmp_path / "alone.py", folder, tmp_path / "images.npy", tmp_path / "out.npz")
    done = isolated(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = case.prediction
    with np.load(tmp_path / "out.npz") as results:
        for rows in (1, len(case.images)):
            logits = results[f"logits{rows}"]
            np.testing.assert_allclose(logits, expected.logits[:rows], rtol=0, atol=1e-5)
            violations = results[f"violations{rows}"]
            np.testing.assert_array_equal(violations, expected.violations_B[:rows])
            np.testing.assert_array_equal(results[f"prediction{rows}"], logits.argmax(-1))


@pytest.mark.slow
def test_own_command_of_the_folder(folder: Path, predictor: load.Predictor, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    done = isolated(folder / "predict.py", "photo.png", "--out", "picture.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (folder / "__pycache__").exists()
    with Image.open(tmp_path / "picture.png") as picture:
        shown = np.asarray(picture)
    assert shown.shape == (21, 34, 3)
    prediction = predictor(pixels[None])["prediction"][0]
    np.testing.assert_array_equal(shown, predictor.picture(prediction, (21, 34)))


def test_loader_equals_the_path(case: Case, predictor: load.Predictor) -> None:
    expected = case.prediction
    outputs = predictor(case.images[:3])  # padded to four rows inside
    np.testing.assert_allclose(outputs["logits"], expected.logits[:3], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(outputs["violations"], expected.violations_B[:3])
    assert predictor.self_check() <= 1e-5


def test_photos_are_prepared_as_the_manifest_says(predictor: load.Predictor) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 40, 30, 3), np.uint8)
    small = [Image.fromarray(p).resize(SIZE[::-1], Image.Resampling.BILINEAR) for p in pixels]
    scaled = np.stack([np.asarray(s) for s in small]) / 255.0
    expected = (scaled - np.array(MEAN)) / np.array(STD)
    found = predictor.prepare(pixels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((1, 8, 9, 3), np.float32),
        np.zeros((1, *SIZE, 3), np.float64),
    ],
)
def test_other_arrays_are_refused(predictor: load.Predictor, images: np.ndarray) -> None:
    with pytest.raises(ExportError, match="Images must be"):
        predictor(images)


def test_manifest_says_what_it_is(case: Case, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["task"]["name"] == "semseg" and manifest["task"]["labels"] == list(NAMES)
    assert manifest["inputs"]["image"]["shape"] == ["b", *SIZE, 3]
    assert manifest["outputs"]["logits"]["shape"] == ["b", *SIZE, CLASSES]
    assert manifest["path"]["kind"] == "pruned"
    assert manifest["path"]["parameters"] == sum(w.size for w in case.cut.weights.values())
    assert manifest["versions"]["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["certificate"] == {"task": "semseg", "note": "made by a test"}
    assert set(manifest["files"]) == {f.name for f in folder.iterdir()} - {"manifest.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["name"] == "test" and config["path"]["plan"]["kept"] == {
        name: list(ids) for name, ids in case.plan.kept.items()
    }


def test_weights_are_ordinary_safetensors(case: Case, folder: Path) -> None:
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    assert arrays.keys() == case.cut.weights.keys()
    for name, array in load.read_tensors(folder / "model.safetensors").items():
        np.testing.assert_array_equal(array, arrays[name])
        np.testing.assert_array_equal(array, case.cut.weights[name])


def test_arrays_in_any_memory_order_are_stored_right(tmp_path: Path) -> None:
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {
        "t": a.T,
        "f": np.asfortranarray(a),
        "s": a[::2, ::3],
        "e": a[:0],
        "i": np.int32([[7]]),
    }
    export.save_tensors(tmp_path / "a.safetensors", arrays)
    backwards = dict(reversed(arrays.items()))
    export.save_tensors(tmp_path / "b.safetensors", backwards)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = load.read_tensors(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_nothing_tells_where_it_was_made(case: Case, folder: Path) -> None:
    program = (folder / "model.stablehlo").read_bytes()
    root = str(Path(__file__).resolve().parents[2]).encode()
    assert root not in program and b".py" not in program and b"/usr" not in program
    again = export.lower(case.cut, case.task).serialize()
    assert bytes(again) == program


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(copy: Path) -> None:
        manifest = json.loads((copy / "manifest.json").read_text())
        change(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: flip(c / "model.safetensors"), "model.safetensors is damaged"),
        (lambda c: flip(c / "model.stablehlo"), "model.stablehlo is damaged"),
        (lambda c: flip(c / "golden.safetensors"), "golden.safetensors is damaged"),
        (lambda c: (c / "config.json").unlink(), "config.json is missing"),
        (lambda c: (c / "manifest.json").unlink(), "not an exported folder"),
        (lambda c: (c / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (edit(lambda m: m.update(schema=99)), "schema 99"),
        (edit(lambda m: m.pop("versions")), "manifest.json is damaged"),
        (edit(lambda m: m["versions"].update(jax="99.0.0")), "written by jax 99.0.0"),
        (edit(lambda m: m["versions"].update(calling_convention=1)), "export it again"),
    ],
)
def test_damage_is_found(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ExportError, match=message):
        load_export(copy)


def sign(copy: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    digest = hashlib.sha256((copy / name).read_bytes()).hexdigest()
    edit(lambda m: m["files"].update({name: digest}))(copy)


def test_program_that_jax_cannot_read(copy: Path) -> None:
    (copy / "model.stablehlo").write_bytes(b"not a program")
    sign(copy, "model.stablehlo")
    with pytest.raises(ExportError, match="cannot read"):
        load_export(copy)


def test_wrong_outputs_fail_the_self_check(copy: Path) -> None:
    golden = load.read_tensors(copy / "golden.safetensors")
    export.save_tensors(copy / "golden.safetensors", golden | {"logits": golden["logits"] + 1e-3})
    sign(copy, "golden.safetensors")
    with pytest.raises(ExportError, match="off the stored ones"):
        load_export(copy).self_check()


def test_nothing_is_overwritten_unasked(case: Case, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--replace"):
        export.write(copy, content(case))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no export"):
        export.write(tmp_path / "thesis", content(case), replace=True)
    (copy / "old").write_text("")
    export.write(copy, content(case), replace=True)
    assert not (copy / "old").exists() and load_export(copy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "thesis"]


def test_failure_leaves_nothing_behind(case: Case, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write"):
        export.write(tmp_path / "file" / "out", content(case))

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        export.write(tmp_path / "out", content(case), more=fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", [n for n in IMAGES if n != "scene"])
def test_pictures_equal_the_tasks_own(predictor: load.Predictor, name: str) -> None:
    settings = {"classes": CLASSES} if name in ("semseg", "parts") else {}
    task = build(name, **settings)
    logits = np.random.default_rng(0).normal(size=(1, 8, 9, task.channels)).astype(np.float32)
    prediction = np.asarray(jax.jit(task.postprocess)(3 * logits))[0]
    painted = load.Predictor.picture
    shown = type("Shown", (), {"manifest": {"picture": task.painting()}})()
    found = painted(shown, prediction).astype(int)
    # Exports show probabilities of edges themselves; thinning them needs files that do not travel.
    paint = Probability() if name == "edge" else task.picture
    assert np.abs(found - paint(prediction)).max() <= 3


def test_words_say_what_a_prediction_holds() -> None:
    classes = {"picture": {"kind": "classes", "colours": [[0, 0, 0]] * 3}}
    classes["task"] = {"labels": ["wall", "floor", "bed"], "unit": "class index"}
    assert load.words(classes, np.array([[1, 1], [1, 0]])) == "floor 75 %, wall 25 %"
    metres = {"picture": {"kind": "range", "colours": []}, "task": {"unit": "metres"}}
    assert load.words(metres, np.array([[1.234, 3.5]])) == "1.23 to 3.5 (metres)"
    label = {"picture": {"kind": "label", "colours": [[0, 0, 0]] * 2}, "task": {"unit": ""}}
    assert load.words(label, np.asarray(1)) == "class 1"
