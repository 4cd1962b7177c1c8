"""Tables of formats: what fits passes, everything else is one bounded sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from moezoo import schema_check as sc
from moezoo.errors import UserError
from moezoo.structured import LARGEST, read_object

FORM = sc.table(
    {
        "depth": sc.whole(1, 1000),
        "rate": sc.maybe(sc.number(0)),
        "bias": sc.flag,
        "kind": sc.one_of("a", 1),
        "name": sc.text(5, r"\w+"),
        "size": sc.either(sc.whole(), sc.list_of(sc.whole(), 2, 2)),
        "files": sc.map_of(sc.relative),
        "inner": sc.table({"x": sc.flag}, others=sc.refused),
    },
    required=("depth",),
)


def test_what_fits() -> None:
    FORM({"depth": 1, "rate": None, "bias": True, "kind": 1, "name": "abc", "new": [1]}, "")
    FORM({"depth": 1, "size": 3, "files": {"a": "b/c.txt"}, "inner": {"x": False}}, "")
    FORM({"depth": 1, "size": [3, 4], "rate": 0.5, "kind": "a"}, "")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "it is [], it must be an object"),
        ({}, "depth is missing"),
        ({"depth": 1.0}, "depth is 1.0, it must be a whole number"),
        ({"depth": True}, "depth is True, it must be a whole number"),
        ({"depth": 10**6}, "depth is 1000000, it must be from 1 to 1,000"),
        ({"depth": 1, "rate": float("nan")}, "rate is nan, it must be a finite number"),
        ({"depth": 1, "rate": 10**400}, "it must be a finite number"),
        ({"depth": 1, "rate": -0.5}, "rate is -0.5, it must be from 0 to inf"),
        ({"depth": 1, "rate": "1e-3"}, "rate is '1e-3', it must be a number"),
        ({"depth": 1, "bias": 1}, "bias is 1, it must be true or false"),
        ({"depth": 1, "kind": True}, "kind is True, it must be one of 'a', 1"),
        ({"depth": 1, "kind": []}, "kind is [], it must be one of 'a', 1"),
        ({"depth": 1, "name": "abcdef"}, "name has 6 characters, where at most 5 may be"),
        ({"depth": 1, "name": "a b"}, "name is 'a b', which is no such name"),
        ({"depth": 1, "size": [1]}, "size has 1 entries, it must have from 2 to 2"),
        ({"depth": 1, "size": [1, -1]}, r"size[1] is -1, it must be from 0 to"),
        ({"depth": 1, "inner": {"y": 1}}, "inner.y is not known"),
        ({"depth": 1, "files": ["a"]}, "files is ['a'], it must be an object"),
    ],
)
def test_what_does_not(values: Any, words: str) -> None:
    with pytest.raises(sc.FormatFault) as raised:
        FORM(values, "")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["../a", "/a", "a/../b", "C:\\a", "\\\\host\\a", "a\\..\\b", "", "a//b", "a\nb", "./../a"],
)
def test_paths_that_leave_the_folder(name: str) -> None:
    with pytest.raises(sc.FormatFault, match="no file inside this folder"):
        sc.relative(name, "file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "nested too deep"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        (b"[1]", "holds no JSON object"),
        (b'{"depth": "x"}', "depth is 'x', it must be a whole number"),
        (b" " * 2000 + b'{"depth": 1}', "and at most 0.0 MB are read"),
    ],
)
def test_damaged_files(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    largest = 1000 if content.startswith(b" ") else LARGEST
    with pytest.raises(UserError, match=words) as raised:
        read_object(path, FORM, largest=largest)
    assert str(path) in str(raised.value) and len(str(raised.value)) < len(str(path)) + 300
    path.write_bytes(b'{"depth": 3}')
    assert read_object(path, FORM) == {"depth": 3}


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no .*x.json: name another folder"):
        read_object(tmp_path / "x.json", absent="name another folder")
    os.mkfifo(tmp_path / "pipe")  # reading it would never end
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="not a (regular )?file"):
            read_object(path)


def test_values_are_shown_in_bounds() -> None:
    for value in ("a" * 10**6, ["a" * 1000], {"a": "b" * 1000}, list(range(1000)), "a\nb"):
        assert len(sc.shown(value)) <= sc.SHOWN and "\n" not in sc.shown(value)
