"""Paths for LiteRT: what the file gives, that it is always the same, and refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.deploy import litert_file, onnx_file
from moezoo.deploy.deliver import check_formats
from moezoo.deploy.produce import Request
from moezoo.deploy.runtime import other_forms
from moezoo.errors import UserError
from tests.deploy.conftest import Case


@pytest.fixture
def interpreter() -> Any:
    pytest.importorskip("litert_converter", reason=litert_file.MISSING)
    return pytest.importorskip("ai_edge_litert.interpreter", reason=litert_file.MISSING)


def test_a_file_gives_what_the_path_gives(case: Case, tmp_path: Path, interpreter: Any) -> None:
    said = litert_file.write(tmp_path, case.cut, case.task, case.images[:3])
    assert said["batch"] == 1 and said["largest_difference"] <= other_forms.OFF
    file = tmp_path / litert_file.NAME
    run = interpreter.Interpreter(model_path=str(file)).get_signature_runner()
    found = run(**{case.cut.input.name: case.images[3:4]})
    wanted = case.cut(case.images[3:4])
    np.testing.assert_allclose(found["logits"], wanted.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["violations"], wanted.violations_B)
    # Nothing of this machine is inside, and the same path is the same file.
    content = file.read_bytes()
    assert content == litert_file.converted(case.cut, case.task)
    assert b".py" not in content and str(Path.cwd()).encode() not in content


def test_what_cannot_be_is_refused(
    case: Case, tmp_path: Path, interpreter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for weights in ("int8", "bfloat16"):
        with pytest.raises(UserError, match=f"writes {weights} weights back as float32"):
            check_formats(["litert"], Request(weights=weights))
    litert_file.write(tmp_path, case.cut, case.task, case.images[:2])
    with pytest.raises(UserError, match="What litert makes of the semseg path is not what JAX d"):
        onnx_file.compared("litert", tmp_path, case.whole, case.task, case.images[:2])
    monkeypatch.setattr(litert_file, "LARGEST", 10)
    with pytest.raises(UserError, match="bytes of weights, a LiteRT file has room for 10: leave"):
        litert_file.converted(case.cut, case.task)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litert_converter", None)
    with pytest.raises(UserError, match="pip install --no-deps litert-converter"):
        check_formats(["litert"], Request())
