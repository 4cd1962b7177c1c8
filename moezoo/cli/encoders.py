"""Write the conditions of a run on pairs as encoders of images and texts that run without moezoo.

Example: moezoo encoders runs/conditional_moe_tiny --out exports/encoders
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moezoo.command import ANYWHERE, WITH_WEIGHTS, Positional, parse


@dataclass(frozen=True)
class EncodersCommand:
    """Write the conditions of a run on pairs as encoders of images and texts.

    Under a fixed condition the encoder is dense. The folder holds every distinct matrix once.

    Example: moezoo encoders runs/conditional_moe_tiny --out exports/encoders

    Example: python exports/encoders/encode.py photo.jpg "a bedroom with a bed" "an office"
    """

    run: Annotated[Path, Positional, WITH_WEIGHTS]
    """Folder of a run, a checkpoint or a saved model, or the name of a model with weights."""
    out: Annotated[Path, ANYWHERE]
    """Folder to write."""
    conditions: tuple[str, ...] = ()
    """Only these, for example 'retrieval|input' 'retrieval|target'; default: all of the run's."""
    replace: bool = False
    """Replace an export that is already in the folder."""


def main(words: list[str], prog: str) -> None:
    """Specialise the encoders, write them, check them."""
    given = parse(EncodersCommand, words, prog)
    from moezoo.domains.pairs.encoders import export_encoders

    export_encoders(given.run, given.out, given.conditions, replace=given.replace)
