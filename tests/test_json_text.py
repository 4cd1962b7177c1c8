"""What we write as JSON is JSON."""

from __future__ import annotations

import ast
import json

import pytest

from moezoo.json_text import json_text
from tests.fixtures import ROOT

# Texts without numbers of measurements, or that refuse what is no number.
PLAIN = {
    "moezoo/json_text.py",
    "moezoo/train/config_json.py",  # allow_nan=False: a configuration is checked before
    "moezoo/train/sealed.py",  # checksums of shapes and files
    "moezoo/data/rooms/workers.py",  # whole numbers for a process of ours
    "moezoo/data/text/tokenizer_files.py",
    "moezoo/deploy/calibrate.py",
    "moezoo/deploy/plan.py",
    "moezoo/deploy/splits.py",
    "moezoo/weights/hf.py",
    "moezoo/weights/peft.py",
    "moezoo/weights/tensor_file.py",
}


def test_numbers_that_are_none_become_null() -> None:
    value = {"a": [float("nan"), 1.5, (float("-inf"), {"b": float("inf")})], "c": None, "d": "NaN"}
    text = json_text(value, indent=1, sort_keys=True)
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read == {"a": [None, 1.5, [None, {"b": None}]], "c": None, "d": "NaN"}
    assert text.endswith("}\n") and json_text([1], None) == "[1]\n"


def test_measurements_are_written_in_no_other_way() -> None:
    calls = set()
    for path in [*(ROOT / "moezoo").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump"):
                calls.add(path.relative_to(ROOT).as_posix())
    assert calls <= PLAIN
