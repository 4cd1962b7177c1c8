"""Say what a model is: paper, claim, what was measured, parameters, costs, tensors.

Example: moezoo info rooms/m3vit_tiny
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from moezoo.command import CONFIGURATIONS, Positional, parse

if TYPE_CHECKING:
    from moezoo.front.printed import ModelCard


@dataclass(frozen=True)
class DescribeCommand:
    """Say what a model is: paper, claim, what was measured, parameters, costs, tensors.

    Example: moezoo info rooms/m3vit_tiny --tensors
    """

    model: Annotated[Path, Positional, CONFIGURATIONS]
    """Name of a model (moezoo list), or folder of a run, a saved model, an export or a
    library of adapters."""
    tensors: bool = False
    """Also list every array with its shape."""


def main(words: list[str], prog: str) -> None:
    """Print the card."""
    given = parse(DescribeCommand, words, prog=prog)
    from moezoo.train.console import Console

    found, console = _card(given), Console()
    console.table(found.title, ("what", "this model"), found.lines)
    console.say(found.about)
    if given.tensors:
        rows = [(name, " x ".join(map(str, shape)) or "1") for name, shape in found.tensors.items()]
        console.table("tensors", ("path", "shape"), rows)


def _card(given: DescribeCommand) -> ModelCard:
    """The card that is kept of one of the package's models, or else the one that is computed."""
    from moezoo.front import catalogue, printed

    if not given.tensors and not given.model.exists():
        kept = printed.card(catalogue.full_name(str(given.model)))
        if kept is not None:
            return kept
    from moezoo.front import card  # imports JAX, and builds the model

    return card.of(given.model)
