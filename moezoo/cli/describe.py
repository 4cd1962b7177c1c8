"""Say what a model is: paper, claim, what was measured, parameters, costs, tensors.

Example: moezoo info rooms/m3vit_tiny
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moezoo.command import Positional, parse


@dataclass(frozen=True)
class DescribeCommand:
    """Say what a model is: paper, claim, what was measured, parameters, costs, tensors.

    Example: moezoo info rooms/m3vit_tiny --tensors
    """

    model: Annotated[Path, Positional]
    """Name of a model (moezoo list), or folder of a run, a saved model or an export."""
    tensors: bool = False
    """Also list every array with its shape."""


def main(words: list[str], prog: str) -> None:
    """Print the card."""
    given = parse(DescribeCommand, words, prog=prog)
    from moezoo.front import card
    from moezoo.train.console import Console

    found, console = card.of(given.model), Console()
    console.table(found.title, ("what", "this model"), found.lines)
    console.say(found.about)
    if given.tensors:
        rows = [(name, " x ".join(map(str, shape)) or "1") for name, shape in found.tensors.items()]
        console.table("tensors", ("path", "shape"), rows)
