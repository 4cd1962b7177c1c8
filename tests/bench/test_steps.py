"""The benchmark of training steps: variants, their numbers, wrong words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moezoo.bench.steps import kinds, overrides, run
from moezoo.errors import UserError

SMALL = "data.train=40 data.test=20 train.batch=8 model.targets=layers/0/mlp/up"


def test_overrides_are_train_pys():
    assert overrides("model.update=lora data.only=copy") == [
        "--model.update",
        "lora",
        "--data.only",
        "copy",
    ]
    assert overrides("as_is") == []
    assert overrides("data.size=16 8") == ["--data.size", "16", "8"]
    assert overrides("data.archive='my pictures'") == ["--data.archive", "my pictures"]
    with pytest.raises(UserError, match="'fast' is no override"):
        overrides("fast model.update=lora")
    with pytest.raises(UserError, match="does not close it"):
        overrides("model.update='lora")


def test_a_file_that_cannot_be_written_is_told_before_the_measurement(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write"):
        run(["text/nothing", "as_is", "as_is", "--json", str(tmp_path / "file" / "x.json")])


def test_one_variant_is_none():
    with pytest.raises(UserError, match="at least two variants"):
        run(["text/smora_tiny", "as_is"])


def test_kinds_of_batches_are_told_by_their_names():
    first, second = {"scene": 1}, {"mlm": 2}
    assert kinds([first, {"scene": 3}, second]) == [first, second]
    assert kinds([{"image": 1, "depth": 2}] * 3) == [{"image": 1, "depth": 2}]


@pytest.mark.slow
def test_variants_are_measured_side_by_side(tmp_path: Path) -> None:
    lora = f"{SMALL} model.update=lora model.ranks=8"
    words = ["text/smora_tiny", lora, SMALL, "--repeats", "2", "--json", str(tmp_path / "x.json")]
    assert run(words) == 0
    first, second = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert (first["variant"], first["ratio"]) == (lora, 1.0)
    assert second["parameters"] > first["parameters"] > 0
    assert min(first["bytes"], second["bytes"]) > 4 * first["parameters"]
    assert second["low"] <= second["ratio"] <= second["high"]
