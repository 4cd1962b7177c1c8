"""The benchmark of conditional blocks: every row is there, and specialised blocks cost nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moezoo.deploy.bench_conditional import run
from moezoo.errors import UserError


@pytest.mark.parametrize("rows", ["1", "2"])
def test_rows_of_all_blocks(rows: str, tmp_path: Path, capsys) -> None:
    words = "--batch 2 --tokens 6 --width 8 --heads 2 --experts 4 --repeats 2 --rows".split()
    assert run([*words, rows, "--json", str(tmp_path / "b.json")]) == 0
    told = json.loads((tmp_path / "b.json").read_text())
    assert "jax" in told["versions"] and told["machine"]["cores"]
    found = {(row["block"], row["mode"]): row for row in told["rows"]}
    names = [
        ("specialised", "forward"),
        ("attribute MoE", "forward"),
        ("attribute MoE", "training"),
    ]
    assert list(found) == names
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in told["rows"])
    if rows == "1":  # with two, the copies that join both segments are counted
        assert found[names[0]]["flops_ratio"] == 1.0
    assert found[names[0]]["flops_ratio"] == pytest.approx(1.0, rel=1e-2)
    assert "against dense" in capsys.readouterr().out


def test_three_rows_are_refused() -> None:
    with pytest.raises(UserError, match="rows is 3"):
        run(["--rows", "3"])
