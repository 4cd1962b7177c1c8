"""List the models of the zoo, with their tasks, and which of them have weights.

Example: moezoo list --task depth
"""

from __future__ import annotations

from dataclasses import dataclass

from moezoo.command import parse


@dataclass(frozen=True)
class CatalogueCommand:
    """List the models of the zoo, with their tasks, and which of them have weights.

    Example: moezoo list --task depth
    """

    domain: str | None = None
    """Only models that read images, text, audio or pairs."""
    task: str | None = None
    """Only models that are trained on this task."""
    pretrained: bool = False
    """Only models whose weights come with the package."""


def main(words: list[str], prog: str) -> None:
    """Print a table."""
    given = parse(CatalogueCommand, words, prog=prog)
    from moezoo.front import catalogue

    names = catalogue.list_models(given.domain, given.task, given.pretrained)
    if not names:
        return print("There is no such model.")
    # No table: a name that is broken at the edge of a terminal can be copied by nobody.
    rows = [("NAME", "WEIGHTS", "READS", "TASKS"), *(catalogue.row(name) for name in names)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3])))
    print(
        "`moezoo info NAME` says more of one; `moezoo predict NAME FILE` asks one with weights, "
        "`moezoo generate NAME PROMPT` one of text."
    )
