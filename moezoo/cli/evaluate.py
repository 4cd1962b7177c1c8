"""Score a run's checkpoint on its test data.

Example: moezoo evaluate runs/m3vit_tiny --examples 100
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from moezoo.command import ANYWHERE, WITH_WEIGHTS, Positional, parse
from moezoo.errors import UserError


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a run's newest valid checkpoint on its test data.

    Example: moezoo evaluate runs/m3vit_tiny --examples 100
    """

    run: Annotated[Path, Positional, WITH_WEIGHTS]
    """Folder of a run, a checkpoint or a saved model, or the name of a model with weights."""
    examples: int | None = None
    """Score only this many test examples, from the first on."""
    batch: int | None = None
    """Examples per step; default: as in training."""
    json: Annotated[Path | None, ANYWHERE] = None
    """Also write all scores to this file."""


def main(words: list[str], prog: str) -> int:
    """Evaluate and print one table."""
    from moezoo.train import scoring

    arguments = parse(EvaluateCommand, words, prog)
    for name in ("examples", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1.")
    scoring.score_run(
        arguments.run,
        lambda e: replace(e, examples=arguments.examples, batch=arguments.batch or e.batch),
        arguments.json,
    )
    return 0
