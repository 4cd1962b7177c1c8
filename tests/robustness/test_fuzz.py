"""The fuzzers' own tool: it tells the ways apart in which a try ends."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from moezoo.errors import UserError
from tests.robustness import fuzz


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("attempt", "kind"),
    [
        (lambda: None, "accepted"),
        (lambda: _raise(UserError("No such file.")), "refused"),
        (lambda: _raise(UserError("Two\nlines.")), "sentence"),
        (lambda: _raise(UserError("")), "sentence"),
        (lambda: _raise(AssertionError("3 is not 4")), "wrong"),
        (lambda: _raise(KeyError("files")), "traceback"),
        (lambda: _raise(SystemExit(0)), "traceback"),
        (lambda: _raise(RecursionError()), "traceback"),
        (lambda: time.sleep(2), "hang"),
    ],
)
def test_outcomes(attempt: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    assert fuzz.attempted(attempt).kind == kind


def test_counts_are_printed_and_bad_cases_listed(capsys: pytest.CaptureFixture[str]) -> None:
    def case(chance: random.Random) -> fuzz.Case:
        number = chance.randrange(3)
        errors = [UserError("No."), KeyError("k")]
        return f"of {number}", lambda: _raise(errors[number]) if number < 2 else None

    with pytest.raises(AssertionError, match="case .* traceback: KeyError"):
        fuzz.run("things", case, 30)
    assert "things: 30 cases" in capsys.readouterr().out


def test_mutations_change_one_thing_and_are_repeatable() -> None:
    value = {"a": [1, 2, {"b": None}], "c": "text"}
    whole = json.dumps(value)
    for number in range(200):
        first = fuzz.mutate_json(random.Random(number), value)
        assert repr(first) == repr(fuzz.mutate_json(random.Random(number), value))
        assert fuzz.mutate_bytes(random.Random(number), whole.encode()) == fuzz.mutate_bytes(
            random.Random(number), whole.encode()
        )
    assert json.dumps(value) == whole
    assert fuzz.mutate_bytes(random.Random(1), b"")[1] is not None
