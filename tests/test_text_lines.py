"""Lines end at line feeds and nowhere else."""

from __future__ import annotations

import pytest

from moezoo.text_lines import lines


def test_only_line_feeds_end_a_line() -> None:
    content = "\ufeffone\u2028still one\r\ntwo\x0cstill two\n\nfour".encode()
    assert lines(content) == ["one\u2028still one", "two\x0cstill two", "", "four"]


def test_what_is_no_text_is_told() -> None:
    with pytest.raises(UnicodeDecodeError):
        lines(b"\xff")
