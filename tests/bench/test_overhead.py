"""The benchmark of the trainer: its windows, its sentence, its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moezoo.bench.overhead import OverheadArguments, run
from moezoo.errors import UserError

SMALL = (
    "data.train=16 data.test=8 data.resolution=16 16 tasks=depth model.depth=1 model.moe_every=1 "
    "model.width=16 model.heads=2 train.batch=8 evaluate.batch=8 evaluate.pictures=1"
)


def test_too_few_windows() -> None:
    with pytest.raises(UserError, match="at least 4 --windows"):
        OverheadArguments(windows=3)


def test_a_file_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write"):
        run(["rooms/m3vit_tiny", "--json", str(tmp_path / "file" / "x.json")])


@pytest.mark.slow
@pytest.mark.claims
def test_all_numbers(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "overhead.json"
    words = ["rooms/m3vit_tiny", "--options", SMALL]
    assert run([*words, "--windows", "4", "--pairs", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert len(found["trainer_over_bare"]) == len(found["saving_over_trainer"]) == 1
    assert all(seconds > 0 for part in found["step_seconds"].values() for seconds in part)
    assert found["start_seconds"]["warm"] > 0
    assert "ms in a bare loop" in capsys.readouterr().out
