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
    from moezoo.front import card
    from moezoo.front.catalogue import list_models
    from moezoo.train.console import Console

    names = list_models(given.domain, given.task, given.pretrained)
    console = Console()
    if not names:
        return console.say("There is no such model.")
    columns = ("name", "system", "reads", "tasks", "weights")
    console.table(f"{len(names)} models", columns, [card.row(name) for name in names])
    console.say(
        "moezoo info NAME says more of one; moezoo predict NAME FILE asks one with weights."
    )
