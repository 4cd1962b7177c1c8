"""The benchmark of conditional blocks: every row is there, and specialised blocks cost nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moezoo.bench.conditional import run
from moezoo.errors import UserError


@pytest.mark.slow
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
    own = found[names[0]]
    extra = own["flops"] * (1 - 1 / own["flops_ratio"])
    # Joining two segments costs operations per output of the four maps, no further products.
    outputs = 2 * 6 * (3 * 8 + 8 + 4 * 8 + 8)
    assert own["flops_ratio"] == 1.0 if rows == "1" else 0 <= extra < 2 * outputs
    assert "against dense" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--rows 3", "rows is 3"),
        ("--heads 3", "heads is 3; it must divide the width 256"),
        ("--top_k 9", "top_k is 9; it must be between 1 and experts, 8"),
        ("--batch 0", "batch is 0"),
    ],
)
def test_sizes_that_make_no_block_are_refused(words: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(words.split())
