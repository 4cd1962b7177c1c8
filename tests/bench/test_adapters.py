"""The benchmark of adapters: every row is measured and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moezoo.bench.adapters import run
from moezoo.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("around", [pytest.param("block", marks=pytest.mark.slow), "nothing"])
def test_rows_of_all_pairs(around: str, tmp_path: Path, capsys) -> None:
    words = "--clips 1 --tokens 6 --width 8 --hidden 12 --heads 2 --bottleneck 2".split()
    words += "--experts 2 --more 3 --repeats 2".split()
    assert run([*words, "--around", around, "--json", str(tmp_path / "b.json")]) == 0
    told = json.loads((tmp_path / "b.json").read_text())
    assert "jax" in told["versions"] and told["machine"]["cores"]
    # Soft: 2 (2*8*2 + 2 + 8) + 8*2 parameters; one adapter of 5 units has 2*8*5 + 5 + 8.
    names = ["soft 2 x 1 / one of 5 units", "soft 3 x 2 / soft 2 x 3", "dense 2 / folded, 4 units"]
    for mode in ("forward", "forward+backward"):
        rows = [row for row in told["rows"] if row["mode"] == mode]
        assert [row["pair"] for row in rows] == names
        assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
        assert all(row["milliseconds"] > 0 < row["base_milliseconds"] for row in rows)
    assert "1 x 6 tokens" in capsys.readouterr().out


def test_nothing_to_time() -> None:
    with pytest.raises(UserError, match="--repeats is 0"):
        run(["--repeats", "0"])
