"""Names of people's own do not become markup."""

from __future__ import annotations

import pytest

from moezoo.train import report as markdown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("depth", "depth"),
        ("text_scene", "text_scene"),
        ("a|b", r"a\|b"),
        ("mmlu[/easy]", r"mmlu\[/easy\]"),
        ("*x* `y` <b>", r"\*x\* \`y\` \<b\>"),
        ("_x_", r"\_x\_"),
        ("a\\b", r"a\\b"),
        ("two\nlines", "two lines"),
        ("# x", r"\# x"),
        ("- x", r"\- x"),
        ("-", "-"),
        ("&amp;", r"\&amp;"),
        ("$5", r"\$5"),
    ],
)
def test_escaped(text: str, shown: str) -> None:
    assert markdown.escaped(text) == shown


def test_a_row_has_its_cells() -> None:
    assert markdown.row(("a|b", 0.5, "x\r\ny")) == r"| a\|b | 0.5 | x y |"


def test_code_stays_on_one_line_of_a_table() -> None:
    assert markdown.code("a|b\r\nc`d\u2028e ") == r"`a\|b / c'd / e`"
