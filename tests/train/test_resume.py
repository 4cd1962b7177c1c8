"""Which configuration a run's folder belongs to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moezoo.errors import UserError
from moezoo.train.config import CheckpointConfig, to_json
from moezoo.train.resume import check_same_run
from tests.train import tiny


def test_a_run_that_failed_before_training_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    first = tiny.config(str(tmp_path), start_from="runs/mistyped")
    second = replace(first, start_from=None)
    check_same_run(first, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    never = replace(second, checkpoint=CheckpointConfig(resume="never"))
    for config in (never, second):
        check_same_run(config, tmp_path)
        assert (tmp_path / "config.json").read_text() == to_json(config)


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/2"])
def test_a_run_that_has_trained_keeps_its_folder(tmp_path: Path, left: str) -> None:
    first = tiny.config(str(tmp_path))
    check_same_run(first, tmp_path)
    (tmp_path / left).mkdir(parents=True)
    check_same_run(first, tmp_path)
    with pytest.raises(UserError, match="holds a run with seed = 0, not 5"):
        check_same_run(replace(first, seed=5), tmp_path)
    assert (tmp_path / "config.json").read_text() == to_json(first)


def test_fields_that_the_folder_does_not_know_have_their_defaults(tmp_path: Path) -> None:
    config = tiny.config(str(tmp_path))
    old = to_json(config).replace('"start_from": null,', "")
    assert old != to_json(config)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.json").write_text(old)
    check_same_run(config, tmp_path)
    with pytest.raises(UserError, match="start_from = None, not elsewhere"):
        check_same_run(replace(config, start_from="elsewhere"), tmp_path)
