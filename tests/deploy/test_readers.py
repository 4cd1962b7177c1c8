"""Inputs of a kind that moezoo has never heard of: exported, reloaded, refused where unknown."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from moezoo import registry
from moezoo.deploy import export
from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.manifest import Facts
from moezoo.deploy.runtime.load import ExportError, load_export
from moezoo.deploy.task_path import task_path
from moezoo.errors import UserError
from moezoo.label import ROWS
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.tasks.base import Metric, State, Task
from moezoo.tasks.output import NUMBER
from moezoo.tasks.painting import Probability
from tests.deploy import row

READS = InputSpec(
    "row",
    "rows",
    (3,),
    "numbers",
    preprocess=({"step": "divide", "by": 2.0},),
    files={"row.py": row},
)


class Sums(nnx.Module):
    """The sum of a row, and its mean for another task."""

    tasks = ("sum", "mean")

    def __init__(self):
        self.sum, self.mean = nnx.Param(jnp.ones((3, 1))), nnx.Param(jnp.full((3, 1), 1 / 3))

    def __call__(self, x_BF: jax.Array, tasks: Sequence[str] | None = None) -> MultiTaskOutput:
        named = {"sum": self.sum, "mean": self.mean}
        found = {name: x_BF @ named[name].get_value() for name in tasks or self.tasks}
        return MultiTaskOutput(found, {}, {})


class Nothing(Metric):
    """No score."""

    def init(self) -> State:
        return {}

    def count(self, logits_BHWC: jax.Array, label: jax.Array, valid_B: object = None) -> State:
        return {}

    def compute(self, state: State) -> dict[str, float]:
        return {"error": float("nan")}


SUM = Task(
    name="sum",
    channels=1,
    loss=lambda logits, label, valid_B=None: jnp.mean((logits[:, 0] - label) ** 2),
    metric=Nothing(),
    headline="error",
    lower_is_better=True,
    weight=1.0,
    postprocess=lambda logits_BC: logits_BC[:, 0],
    picture=Probability(),
    label=ROWS,
    output=NUMBER,
)


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may have made readers known, too."""
    ours = {name: registry.READERS[name] for name in ("image", "audio")}
    monkeypatch.setattr(registry, "READERS", ours)


@pytest.fixture
def known(unknown: None) -> None:
    registry.learn_reader("row", "tests.deploy.row")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = task_path(Sums(), "sum", READS)
    assert list(path.weights) == ["sum"]
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = export.Content(path, SUM, Facts(), {"name": "test"}, {}, given)
    return export.write(tmp_path_factory.mktemp("rows") / "sum", content)


def test_the_manifest_says_what_is_read(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["inputs"] == {
        "row": {
            "dtype": "float32",
            "shape": ["b", 3],
            "layout": "numbers",
            "range": "after `preprocess`",
        }
    }
    assert manifest["picture"] == {"kind": "number"} and "row.py" in manifest["files"]
    assert not {"photo.py", "sound.py"} & set(manifest["files"])


def test_a_reader_that_is_known_reads(known: None, folder: Path, tmp_path: Path) -> None:
    predictor = load_export(folder)
    assert predictor.self_check() <= 1e-6
    np.testing.assert_allclose(predictor([[2.0, 4.0, 6.0]])["prediction"], [6.0])
    with pytest.raises(ExportError, match="must have 3 numbers"):
        predictor([[1.0, 2.0]])
    with pytest.raises(UserError, match="give yours another name"):
        registry.learn_reader("row", "somebody.elses")


def test_the_folder_reads_by_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "row.txt").write_text("2 4 6")
    block = tmp_path / "alone.py"
    block.write_text(
        "import runpy, sys\n"
        "sys.modules['moezoo'] = sys.modules['flax'] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], None, '__main__')"
    )
    words = [sys.executable, "-I", block, folder / "predict.py", "row.txt", "--out", "picture.png"]
    done = subprocess.run(
        [str(word) for word in words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "6 (value)" in done.stdout, done.stderr
    assert np.asarray(Image.open(tmp_path / "picture.png")).max() > 0


def test_a_strangers_reader_is_never_run(folder: Path, tmp_path: Path) -> None:
    """moezoo's own loader takes no code out of a folder, not even for inputs it does not know."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "row.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    before = list(sys.path)
    with pytest.raises(ExportError, match="copy reads inputs called row, .* if you trust"):
        load_export(copy)
    assert not (tmp_path / "ran").exists() and sys.path == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("os", "reads inputs called os, which only the program of its author knows"),
        ("photo", "reads inputs called photo, which"),
        ("../row", "is damaged .*inputs"),
        ("Row", "is damaged .*inputs"),
        ("a" * 41, "is damaged .*inputs"),
    ],
)
def test_inputs_of_other_names_are_refused(
    known: None, folder: Path, tmp_path: Path, name: str, says: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["inputs"] = {name: manifest["inputs"]["row"]}
    file.write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=says):
        load_export(tmp_path / "copy")


@pytest.mark.parametrize("name", ["json", "folder", "forms"])
def test_a_folders_own_program_takes_no_other_module_for_a_reader(
    folder: Path, tmp_path: Path, name: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    if name == "json":  # the standard library's is there already
        shutil.copy(copy / "row.py", copy / "json.py")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["inputs"] = {name: manifest["inputs"]["row"]}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    words = [sys.executable, "-I", str(copy / "predict.py"), "row.txt"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert f"inputs.{name} needs a reader, which {name}.py is not" in done.stderr


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "two\nlines", "\u202eright to left"])
def test_a_manifest_says_nothing_that_steers_a_terminal(
    known: None, folder: Path, tmp_path: Path, text: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for place in (("task", "name"), ("task", "unit"), ("source",)):
        manifest = json.loads((folder / "manifest.json").read_text())
        inner = manifest[place[0]] if place[1:] else manifest
        inner[place[-1]] = text
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ExportError, match=r"must have printable characters") as refused:
            load_export(copy)
        assert str(refused.value).isprintable()


class Halves(types.ModuleType):
    """A reader that lacks half of its answers."""

    STEPS, read = row.STEPS, row.read


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "json"}, "cannot be called 'json', as a module"),
        ({"name": "folder"}, "cannot be called 'folder'"),
        ({"name": "numpy"}, "cannot be called 'numpy'"),
        ({"name": "a row"}, "cannot be called 'a row'"),
        ({"name": "halves"}, "halves, which is to read inputs called halves, has no fits, prepare"),
        ({"name": "absent"}, "tests.absent, which is to read inputs called absent, cannot be imp"),
        ({"name": "rows"}, "Unknown kind of input 'rows': did you mean row"),
        ({"preprocess": ()}, "row does not read what the InputSpec row says: preprocess has 0"),
        ({"shape": (3, 1)}, "InputSpec row says: inputs.row.shape is no row's"),
    ],
)
def test_an_input_that_nothing_reads_is_told_before_the_work(
    known: None, monkeypatch: pytest.MonkeyPatch, changes: dict, says: str
) -> None:
    export.check_input(READS)
    monkeypatch.setitem(sys.modules, "tests.halves", Halves("tests.halves"))
    registry.learn_reader("halves", "tests.halves")
    registry.learn_reader("absent", "tests.absent")
    with pytest.raises(UserError, match=says):
        export.check_input(replace(READS, **changes))


def test_only_exports_are_replaced(tmp_path: Path) -> None:
    """Checkpoints and programs of others have a manifest.json, too."""
    for name in ("arrays", "predict.py"):
        other = tmp_path / name
        other.mkdir()
        (other / "manifest.json").write_text("{}")
        (other / name).write_text("")
    with pytest.raises(UserError, match="arrays exists and is no export: choose another folder"):
        export.check_free(tmp_path / "arrays", replace=True)
    export.check_free(tmp_path / "predict.py", replace=True)
    (tmp_path / "link").symlink_to(tmp_path / "predict.py")
    with pytest.raises(UserError, match="link is a link: name the folder itself"):
        export.check_free(tmp_path / "link", replace=True)


def test_an_export_that_cannot_be_read_back_leaves_nothing(known: None, tmp_path: Path) -> None:
    path = task_path(Sums(), "sum", READS)
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    task = replace(SUM, name="two\nlines")
    content = export.Content(path, task, Facts(), {"name": "test"}, {}, given)

    def check(folder: Path) -> None:
        export.read_back(folder, tmp_path / "sum", load_export)

    with pytest.raises(UserError, match="sum was written but cannot be used: .*/sum/manifest.json"):
        export.write(tmp_path / "sum", content, check=check)
    assert not list(tmp_path.iterdir())


def test_the_shape_must_be_the_readers(known: None, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["inputs"]["row"]["shape"] = ["b", 3, 1]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="inputs.row.shape is no row's"):
        load_export(tmp_path / "copy")
