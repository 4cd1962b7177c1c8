"""The benchmark of skipped tokens: every row is measured and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moezoo.bench.skipping import run
from moezoo.errors import UserError


@pytest.mark.slow
def test_rows_of_all_ways(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = "--images 1 --side 16 --width 8 --depth 1 --heads 2 --patch 8 --repeats 2".split()
    assert run([*words, "--rooms", "0.5", "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["masked", "gathered, 0.5"]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
    assert "1 images of 5 tokens" in capsys.readouterr().out


def test_senseless_options() -> None:
    with pytest.raises(UserError, match="--rooms"):
        run(["--rooms", "0", "1"])
    with pytest.raises(UserError, match="--images is 0"):
        run(["--images", "0"])
