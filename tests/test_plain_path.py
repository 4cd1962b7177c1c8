"""Folders whose names would be read as patterns are refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moezoo import plain_path
from moezoo.domains.images.domain import DataConfig, open_source
from moezoo.errors import UserError
from moezoo.train import loop
from moezoo.train.checkpoint import FOLDER, Checkpointer, load_params
from tests.train import tiny

PATTERNS = ("run[1]", "a[!b]", "lr*2", "what?", "a\\b", "**", "x[")
PLAIN = ("{a,b}", "100 %", "%s", "$HOME", "~me", "ü漢", "-x", "a#b@2:c", "a]b", " a ", ".a", "a\nb")


@pytest.mark.parametrize("name", [*PATTERNS, "\ud800"])
def test_a_pattern_is_refused_wherever_it_stands(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(UserError, match="choose another --name"):
            plain_path.check(path, "--name")


def test_also_in_the_folder_one_stands_in(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "[old]").mkdir()
    monkeypatch.chdir(tmp_path / "[old]")
    with pytest.raises(UserError, match=r"'.*\[old\]/runs' has the character \["):
        plain_path.check("runs", "--directory")


@pytest.mark.parametrize("where", ["name", "directory"])
def test_a_run_is_refused_before_there_is_anything_of_it(tmp_path: Path, where: str) -> None:
    data = DataConfig(resolution=(16, 16), train=1, test=1, data_dir=str(tmp_path / "data"))
    made = tiny.config(str(tmp_path / "runs"), data=data)
    made = tiny.config(str(tmp_path / "[runs]")) if where == "directory" else made
    made = replace(made, name="lr[3]") if where == "name" else made
    with pytest.raises(UserError, match="take for a pattern of names: choose another --name"):
        loop.train(made)
    assert not list(tmp_path.iterdir())


def test_so_is_a_folder_of_data(tmp_path: Path) -> None:
    data = DataConfig(resolution=(16, 16), train=1, test=1, data_dir=str(tmp_path / "a*"))
    with pytest.raises(UserError, match="choose another --data.data-dir"):
        open_source(data, "train")


STATE = {"params": {"k": np.arange(6.0, dtype=np.float32)}, "stats": {}}


@pytest.mark.parametrize("name", PLAIN)
def test_other_names_hold_what_was_written(tmp_path: Path, name: str) -> None:
    with Checkpointer(tmp_path / name / FOLDER, "{}") as checkpoints:
        checkpoints.save(1, STATE)
    found = load_params(tmp_path / name, STATE)["params"]["k"]
    np.testing.assert_array_equal(found, STATE["params"]["k"])


def test_no_checkpoint_is_valid_that_was_not_read_back(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(plain_path, "check", lambda path, option: None)
    with pytest.raises(UserError, match="was written but cannot be read back .params/k"):
        with Checkpointer(tmp_path / "[a]" / FOLDER, "{}") as checkpoints:
            checkpoints.save(1, STATE)
    assert not list((tmp_path / "[a]" / FOLDER).iterdir())


def test_a_folder_that_was_renamed_later_is_read(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "a" / FOLDER, "{}") as checkpoints:
        checkpoints.save(1, STATE)
    (tmp_path / "a").rename(tmp_path / "[a]")
    found = load_params(tmp_path / "[a]", STATE)["params"]["k"]
    np.testing.assert_array_equal(found, STATE["params"]["k"])
