"""Draw how far the tasks of runs disagree: cosines of their gradients, layer by layer.

Example: moezoo interference runs/dense runs/conditional_moe_tiny --out interference.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moezoo.command import ANYWHERE, WITH_WEIGHTS, Positional, parse
from moezoo.errors import UserError


@dataclass(frozen=True)
class InterferenceCommand:
    """Draw how far the tasks of runs disagree: cosines of their gradients, layer by layer.

    Example: moezoo interference runs/dense runs/conditional_moe_tiny
    """

    runs: Annotated[tuple[Path, ...], Positional, WITH_WEIGHTS]
    """Folders of runs, or of checkpoints."""
    out: Annotated[Path, ANYWHERE] = Path("interference.png")
    """The picture to write."""
    json: Annotated[Path | None, ANYWHERE] = None
    """Also write the cosines to this file."""
    batches: int = 4
    """Batches of training examples over which gradients are averaged."""
    size: int = 32
    """Examples per batch."""


def main(words: list[str], prog: str) -> None:
    """Measure every run, write the picture and the numbers."""
    from moezoo.deploy import interference
    from moezoo.files import check_file, write_atomically
    from moezoo.json_text import json_text
    from moezoo.train.console import Console

    a = parse(InterferenceCommand, words, prog)
    if min(a.batches, a.size) < 1:
        raise UserError("Give at least one batch and one example per batch.")
    for path in (a.out, a.json):
        check_file(path)
    console, found = Console(), {}
    short = len({run.name for run in a.runs}) == len(a.runs)
    with console.progress("gradients", len(a.runs), unit="runs") as bar:
        for number, run in enumerate(a.runs, 1):
            found[run.name if short else str(run)] = interference.of_run(run, a.batches, a.size)
            bar.update(number)
    interference.draw(a.out, found)
    if a.json is not None:
        numbers = {
            run: {"tasks": one.tasks, "layers": {k: v.tolist() for k, v in one.layers.items()}}
            for run, one in found.items()
        }
        write_atomically(a.json, json_text(numbers, 1))
    console.say(f"Picture: {a.out}.")
