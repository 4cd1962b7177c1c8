"""The script for a GPU, tried without one: stages leave files, run once, and failures are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moezoo.bench import gpu, kernels
from moezoo.errors import UserError


@pytest.mark.slow
def test_stages_leave_files_and_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path), "--small", "--only", "values", "tiles"]
    assert gpu.run(words) == 0
    said = capsys.readouterr().out
    assert "values: " in said and "tiles: " in said and "left: nothing" in said
    for row in json.loads((tmp_path / "values.json").read_text())["rows"]:
        assert max(row["apart"].values()) < kernels.LIMITS[row["dtype"]]
    rows = json.loads((tmp_path / "tiles.json").read_text())["rows"]
    timed = [row for row in rows if row.get("kernels") == "triton"]
    assert {row["product"] for row in timed} == {"plain", "gated"}
    assert all(row["forward"] > 0 and row["both"] > 0 for row in timed)
    assert gpu.run(words) == 0
    assert "values" not in capsys.readouterr().out


def test_a_stage_that_fails_or_has_no_time_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: Path) -> None:
        raise UserError("no such thing")

    def slow(small: bool, runs: Path | None) -> list[gpu.Stage]:
        return [gpu.Stage("one", 1, broken), gpu.Stage("two", 1e6, broken)]

    monkeypatch.setattr(gpu, "stages", slow)
    assert gpu.run(["--out", str(tmp_path), "--small"]) == 1
    said = capsys.readouterr().out
    assert "one failed: no such thing" in said and "left: two; failed: one" in said


def test_without_a_gpu_and_unknown_stages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no GPU here: add --small"):
        gpu.run(["--out", str(tmp_path)])
    with pytest.raises(UserError, match="Unknown stage 'valeus'.*values"):
        gpu.run(["--out", str(tmp_path), "--small", "--only", "valeus"])
    assert not list(tmp_path.iterdir())
