"""The table of systems in README.md, made from the cards of their configurations.

python -m moezoo.models.table            # print it
python -m moezoo.models.table README.md  # write it between the two marks of that file
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moezoo.errors import UserError, run_command
from moezoo.registry import SYSTEMS

BEGIN, END = "<!-- systems: python -m moezoo.models.table README.md -->", "<!-- /systems -->"
COLUMNS = ("system", "paper", "what it is", "reads", "parity with", "trained", "measured")


def rows() -> list[tuple[str, ...]]:
    """A row per system that has a card, in the order of the registry."""
    found = []
    for name in SYSTEMS.places:
        kind: Any = SYSTEMS.by_name(name)
        folder = "/".join(SYSTEMS.places[name].split(".")[:-1])
        card = kind.card
        trained = ", ".join(f"`{config}`" for config in card.trained) or "no"
        link = f"[{card.title}](moezoo/{folder}/README.md)"
        words = (link, card.paper or "–", card.kind, kind.reads, card.parity, trained)
        found.append((*words, card.headline))
    return found


def markdown() -> str:
    """The table between its marks."""
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows())]
    return "\n".join((BEGIN, *lines, END))


def written(text: str) -> str:
    """A document with the table of today between its marks; UserError where it has none."""
    if BEGIN not in text or END not in text:
        raise UserError(f"There is no line '{BEGIN}' followed by '{END}': add them.")
    before, rest = text.split(BEGIN, 1)
    return before + markdown() + rest.split(END, 1)[1]


def main() -> None:
    """Print the table, or write it into the file that is named."""
    if len(sys.argv) == 1:
        return print(markdown())
    path = Path(sys.argv[1])
    path.write_text(written(path.read_text()))


if __name__ == "__main__":
    run_command(main)
