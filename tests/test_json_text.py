"""What we write as JSON is JSON."""

from __future__ import annotations

import ast
import json

import pytest

from moezoo.json_text import json_text
from tests.fixtures import ROOT

# Below deploy/ and cli/, and these: everything that writes what was measured.
MEASURING = ("moezoo/train/log.py", "moezoo/train/scoring.py", "moezoo/train/report.py")
# Whole numbers and names only.
PLAIN = ("moezoo/deploy/calibrate.py", "moezoo/deploy/plan.py", "moezoo/deploy/splits.py")
PLAIN += (
    "moezoo/deploy/runtime/programs.py",  # words between two processes; travels without moezoo
    "moezoo/deploy/runtime/verify.py",  # a plan's hash; travels, too
    "moezoo/deploy/runtime/other_forms.py",  # travels; what two processes say to each other
)


def test_numbers_that_are_none_become_null() -> None:
    value = {"a": [float("nan"), 1.5, (float("-inf"), {"b": float("inf")})], "c": None, "d": "NaN"}
    text = json_text(value, indent=1, sort_keys=True)
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read == {"a": [None, 1.5, [None, {"b": None}]], "c": None, "d": "NaN"}
    assert text.endswith("}\n") and json_text([1], None) == "[1]\n"


def test_measurements_are_written_in_no_other_way() -> None:
    files = [*(ROOT / "moezoo/deploy").rglob("*.py"), *(ROOT / "moezoo/cli").glob("*.py")]
    for path in [*files, *(ROOT / name for name in MEASURING)]:
        name = path.relative_to(ROOT).as_posix()
        calls = {ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if _attribute(n)}
        assert name in PLAIN or not calls & {"json.dumps", "json.dump"}, name


def _attribute(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute)
