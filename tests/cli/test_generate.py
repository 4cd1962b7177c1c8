"""Prompts on standard input: a line each, or a JSON string where they have lines themselves."""

from __future__ import annotations

import pytest

from moezoo.cli.generate import answerers, lines_of, prompt_of
from moezoo.errors import UserError


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("stutter kasu", "stutter kasu"),
        ('"stutter\\nkasu"', "stutter\nkasu"),
        ('"a" or "b" or', '"a" or "b" or'),
        ('"', '"'),
        ('"\\u00e9"', "é"),
    ],
)
def test_a_line(line: str, prompt: str) -> None:
    assert prompt_of(line) == prompt


def test_quotes_that_hold_no_string() -> None:
    with pytest.raises(UserError, match='"a" or "b" is no JSON string'):
        prompt_of('"a" or "b"')


def test_only_line_feeds_end_a_line() -> None:
    text = '\ufeffa\u2028b\x0cc\r\n\n"d\\ne"\nlast\x85'
    assert lines_of(text.encode()) == ("a\u2028b\x0cc", "d\ne", "last\x85")


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(UserError, match="Line 2 of standard input is no text in UTF-8"):
        lines_of(b"fine\n\xff\n")


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ((("sort", 1.0),), "sort"),
        ((("sort", 0.7), ("double", 0.3)), "sort 0.70, double 0.30"),
        (tuple((name, 0.2) for name in "abcde"), "a 0.20, b 0.20, c 0.20 and 2 more"),
    ],
)
def test_who_answered(by: tuple[tuple[str, float], ...], said: str) -> None:
    assert answerers(by) == said
