"""The benchmark of low-rank updates: every row is measured and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moezoo.bench.lowrank import run
from moezoo.errors import UserError


@pytest.mark.slow
def test_rows_of_all_updates(tmp_path: Path, capsys) -> None:
    words = "--tokens 8 --width 16 --ranks 4 --active 2 --repeats 2".split()
    assert run([*words, "--json", str(tmp_path / "b.json")]) == 0
    told = json.loads((tmp_path / "b.json").read_text())
    assert "jax" in told["versions"] and told["machine"]["cores"]
    names = ["smora 4/2", "smora, blocks of 2", "mixture 2 x 2, top 1", "mixture 2 x 2, soft"]
    for mode in ("forward", "forward+backward"):
        rows = [row for row in told["rows"] if row["mode"] == mode]
        assert [row["update"] for row in rows] == names
        assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
        assert all(row["milliseconds"] > 0 for row in rows)
    assert "against plain LoRA of 4 ranks" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokens", "width", "active", "repeats"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_counts_below_one_are_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"--{name} is {value}; it must be at least 1"):
        run([f"--{name}", value])
