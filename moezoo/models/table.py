"""The systems in README.md and in moezoo/models/README.md, from the cards of their configurations.

python -m moezoo.models.table                                    # print both
python -m moezoo.models.table README.md moezoo/models/README.md  # write them between their marks
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moezoo.errors import UserError, run_command
from moezoo.registry import SYSTEMS

BEGIN = "<!-- systems{}: python -m moezoo.models.table README.md moezoo/models/README.md -->"
END = "<!-- /systems -->"
COLUMNS = ("system", "paper", "what it is", "reads", "parity with", "trained", "measured")


def rows() -> list[tuple[str, ...]]:
    """A row per system that has a card, in the order of the registry; links begin at its folder."""
    found = []
    for name in SYSTEMS.places:
        kind: Any = SYSTEMS.by_name(name)
        card = kind.card
        trained = ", ".join(f"`{config}`" for config in card.trained) or "no"
        link = f"[{card.title}]({SYSTEMS.places[name].split('.')[-2]}/README.md)"
        words = (link, card.paper or "–", card.kind, kind.reads, card.parity, trained)
        found.append((*words, card.headline))
    return found


def by_domain() -> list[tuple[str, str]]:
    """What is read, and links to the systems that read it, from the project's folder."""
    found: dict[str, list[str]] = {}
    for link, _, _, reads, *_ in rows():
        found.setdefault(reads, []).append(link.replace("](", "](moezoo/models/"))
    return [(reads, ", ".join(links)) for reads, links in found.items()]


def table(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """In Markdown."""
    cells = (columns, ("---",) * len(columns), *lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def forms() -> dict[str, str]:
    """Both tables, by the mark in front of each."""
    return {
        BEGIN.format(""): table(COLUMNS, rows()),
        BEGIN.format(" by what they read"): table(("reads", "systems"), [*by_domain()]),
    }


def written(text: str) -> str:
    """A document with the table of today behind its mark; UserError where it has none."""
    for mark, lines in forms().items():
        if mark in text and END in text:
            before, rest = text.split(mark, 1)
            return "".join((before, f"{mark}\n{lines}\n", END, rest.split(END, 1)[1]))
    raise UserError(f"There is no line '{BEGIN.format('')}' followed by '{END}': add them.")


def main() -> None:
    """Print the tables, or write them into the files that are named."""
    if len(sys.argv) == 1:
        return print("\n\n".join(forms().values()))
    for path in map(Path, sys.argv[1:]):
        path.write_text(written(path.read_text()))


if __name__ == "__main__":
    run_command(main)
