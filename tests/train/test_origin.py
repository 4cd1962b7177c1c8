"""Runs of a model, data or tasks that only a configuration file defines are read again."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moezoo.domains.images import domain as image_data
from moezoo.errors import UserError
from moezoo.front import release
from moezoo.registry import SYSTEMS
from moezoo.train import config_file, origin, restore, run_folder, saved, zoo
from moezoo.train.checkpoint import FOLDER, Checkpointer
from moezoo.train.config import from_json, to_json
from moezoo.train.domain import Classes
from tests.train import tiny

MODEL = """
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from helper_beside_it import WIDTH
from moezoo.models.m3vit.model import M3ViTConfig
from tests.train import tiny


@dataclass(frozen=True)
class Mine(M3ViTConfig):
    taste: Literal["sweet", "sour"] = "sweet"


config = replace(tiny.config("runs"), model=Mine(width=WIDTH, heads=2, taste="sour"))
"""
DATA = """
from dataclasses import replace

from moezoo.domains.images import domain as data
from moezoo.domains.images.data.oxford_pets import BY_BREED
from tests.train import tiny

data.learn(replace(BY_BREED, name="my_pets"))
config = tiny.config("runs", data=data.DataConfig(name="my_pets"))
"""
STATE = {"params": {"k": np.ones(2, np.float32)}, "stats": {}}


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test, and what follows `forget`, begins as a new process would."""
    monkeypatch.setattr(SYSTEMS, "learned", dict(SYSTEMS.learned))
    monkeypatch.setattr(image_data, "MAPPED", dict(image_data.MAPPED))
    monkeypatch.setattr(image_data, "_OPENERS", dict(image_data._OPENERS))
    monkeypatch.setattr(sys, "path", list(sys.path))


def forget() -> None:
    SYSTEMS.learned.pop("Mine", None)
    image_data.MAPPED.pop("my_pets", None)
    image_data._OPENERS.pop("my_pets", None)
    for name in [n for n in sys.modules if n.startswith(("moezoo_config_mine", "helper_beside"))]:
        del sys.modules[name]


def a_run(tmp_path: Path, code: str) -> tuple[Path, Path]:
    """A configuration file and the folder of a run that came from it, in a new process."""
    file, run = tmp_path / "mine.py", tmp_path / "runs" / "a"
    file.write_text(code)
    (tmp_path / "helper_beside_it.py").write_text("WIDTH = 16\n")
    config = config_file.load(str(file))
    run_folder.write_config(run, config)
    origin.record(run, file)
    with Checkpointer(run / FOLDER, to_json(config)) as checkpoints:
        checkpoints.save(1, STATE)
    forget()
    return file, run


@pytest.mark.parametrize("read", [restore.read_config, run_folder.load_config])
def test_a_model_of_ones_own(tmp_path: Path, capsys, read) -> None:
    file, run = a_run(tmp_path, MODEL)
    found = read(run).model
    assert type(found).__name__ == "Mine" and dataclasses.asdict(found)["taste"] == "sour"
    said = capsys.readouterr().err
    assert f"{run} is made of what {file} defines: running that file." in said


def test_a_checkpoint_of_such_a_run(tmp_path: Path) -> None:
    _, run = a_run(tmp_path, MODEL)
    assert restore.read_config(run / FOLDER / "1").model.width == 16  # type: ignore[attr-defined]


def test_a_saved_model_of_such_a_run(tmp_path: Path) -> None:
    """Its own code lies beside it, too, and is read as a run's is."""
    _, run = a_run(tmp_path, MODEL)
    config, folder = restore.read_config(run), tmp_path / "elsewhere" / "model"
    about = zoo.About(1, "a run", Classes())
    saved.write(folder, config, STATE["params"], {}, about, release._own_code(run / FOLDER / "1"))
    forget()
    assert (folder / origin.COPY).read_text() == MODEL
    assert restore.read_config(folder).model.width == 16  # type: ignore[attr-defined]
    assert release._own_code(folder).keys() == {origin.ORIGIN, origin.COPY}


def test_a_data_set_of_ones_own(tmp_path: Path) -> None:
    _, run = a_run(tmp_path, DATA)
    assert restore.read_config(run).data.name == "my_pets"
    assert "my_pets" in image_data.DataConfig.names()


@pytest.mark.parametrize("state", ["is not here", "has changed since"])
def test_code_that_came_with_a_run_is_not_run_unasked(tmp_path: Path, monkeypatch, state) -> None:
    file, run = a_run(tmp_path, MODEL)
    traced = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    copy = run / origin.COPY
    copy.write_text(copy.read_text() + traced)
    file.unlink() if state == "is not here" else file.write_text(MODEL + traced)
    with pytest.raises(UserError, match=f"uses the model Mine, which .*mine.py .* {state}"):
        restore.read_config(run)
    assert not list(tmp_path.rglob("ran"))
    monkeypatch.setenv(origin.OWN_CODE, str(copy))
    assert restore.read_config(run).model.width == 16  # type: ignore[attr-defined]
    assert [found.parent for found in tmp_path.rglob("ran")] == [run]


@pytest.mark.parametrize("where", ["inside", "no configuration"])
def test_a_stranger_cannot_name_any_file(tmp_path: Path, where: str) -> None:
    _, run = a_run(tmp_path, MODEL)
    file = run / "x.py" if where == "inside" else tmp_path / "script.py"
    ends = "config = 1\n" if where == "inside" else ""
    file.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n" + ends)
    origin.record(run, file)
    with pytest.raises(UserError, match="is not here|is no configuration"):
        restore.read_config(run)
    assert not list(tmp_path.rglob("ran"))


def test_no_code_runs_where_nothing_is_unknown(tmp_path: Path, capsys) -> None:
    file, run = a_run(tmp_path, "from tests.train import tiny\nconfig = tiny.config('runs')\n")
    file.unlink()
    assert restore.read_config(run).name == "tiny"
    assert capsys.readouterr().err == ""


def test_without_an_origin_the_sentence_says_what_to_do(tmp_path: Path) -> None:
    _, run = a_run(tmp_path, MODEL)
    for damage in ("{}", "[" * 100_000, None):
        (run / origin.ORIGIN).write_text(damage) if damage else (run / origin.ORIGIN).unlink()
        with pytest.raises(UserError, match="the model Mine, which nobody here knows: to run"):
            restore.read_config(run)


def test_a_name_of_the_zoo_is_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        MODEL.replace("Mine", "MLoREConfig").replace("from helper_beside_it import", "#")
    )
    file.write_text(file.read_text().replace("width=WIDTH", "width=16"))
    with pytest.raises(UserError, match="is called MLoREConfig, as one of the zoo is"):
        config_file.load(str(file))
    file.write_text(DATA.replace("my_pets", "rooms"))
    with pytest.raises(UserError, match="data set rooms comes with this project"):
        config_file.load(str(file))


def test_a_file_that_changes_under_a_run_is_told(tmp_path: Path) -> None:
    file, run = a_run(tmp_path, MODEL)
    assert origin.record(run, file) is None
    file.write_text(MODEL + "\n# other\n")
    assert "has changed since" in (origin.record(run, file) or "")


@pytest.mark.parametrize("tasks", [[["depth"]], [{}], [3, None], {"depth": 1}, 7])
def test_tasks_that_are_no_names_are_refused_by_the_reader_of_configurations(tasks) -> None:
    values = json.loads(to_json(tiny.config("runs"))) | {"tasks": tasks}
    origin.prepare(Path("unused"), json.dumps(values))
    with pytest.raises(UserError, match="tasks"):
        from_json(json.dumps(values))
