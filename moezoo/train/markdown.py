"""Names of people's own in Markdown: no sign of theirs is taken for markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

MARKS = re.compile(r"[\\`*\[\]<>|~$&]|^[#+-](?=\s)|(?<!\w)_|_(?!\w)")


def escaped(text: object) -> str:
    """A text on one line that Markdown shows as it is, in a table's cell as well."""
    return MARKS.sub(lambda found: "\\" + found.group(), " ".join(str(text).split()))


def code(text: str) -> str:
    """A text as code, in a table's cell as well; ends of lines are shown as " / "."""
    lines = " / ".join(text.strip().splitlines())
    return "`" + lines.replace("|", "\\|").replace("`", "'") + "`"


def row(cells: Sequence[object]) -> str:
    """A line of a table; the cells' texts are escaped."""
    return f"| {' | '.join(escaped(cell) for cell in cells)} |"
