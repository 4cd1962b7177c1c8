"""Score a run's checkpoint on its test data.

Example: python tools/evaluate.py runs/m3vit_tiny --examples 100
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from moezoo.command import Positional, parse
from moezoo.errors import UserError, run_command


@dataclass(frozen=True)
class Arguments:
    """Score a run's newest valid checkpoint on its test data.

    Example: python tools/evaluate.py runs/m3vit_tiny --examples 100
    """

    run: Annotated[Path, Positional]
    """Folder of a run, or of one checkpoint."""
    examples: int | None = None
    """Score only this many test examples, from the first on."""
    batch: int | None = None
    """Examples per step; default: as in training."""
    json: Path | None = None
    """Also write all scores to this file."""


def main() -> int:
    """Evaluate and print one table."""
    from moezoo.train import scoring

    arguments = parse(Arguments, sys.argv[1:], prog="tools/evaluate.py")
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


if __name__ == "__main__":
    run_command(main)
