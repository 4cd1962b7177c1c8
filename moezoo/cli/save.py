"""Write a run's model as a folder of its own: configuration, weights, scores.

Example: moezoo save runs/m3vit_tiny --out models/m3vit_tiny
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moezoo.command import ANYWHERE, WITH_WEIGHTS, Positional, parse


@dataclass(frozen=True)
class SaveCommand:
    """Write a run's model as a folder of its own: configuration, weights, scores.

    Matrices are stored as bfloat16, and the scores are those of what was stored. Every command that
    takes a run takes such a folder.

    Example: moezoo save runs/m3vit_tiny --out models/m3vit_tiny
    """

    run: Annotated[Path, Positional, WITH_WEIGHTS]
    """Folder of a run, a checkpoint or a saved model, or the name of a model with weights."""
    out: Annotated[Path, ANYWHERE]
    """Folder to write; it must not exist."""
    hardware: str = ""
    """What it was trained on, in words."""
    command: str = ""
    """The command that trained it; default: that of its configuration, if it is one of ours."""
    licence: str = ""
    """The licence under which the weights may be used, such as Apache-2.0; default: none is
    stated."""


def main(words: list[str], prog: str) -> None:
    """Write the folder, print what it holds."""
    given = parse(SaveCommand, words, prog=prog)
    from moezoo.front.release import save_run

    facts = given.hardware, given.command, given.licence
    print(f"{save_run(given.run, given.out, *facts)}: written and scored.")
