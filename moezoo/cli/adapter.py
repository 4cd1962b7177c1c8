"""Write what a run on text has learned: an adapter folder, or the decoder with it merged.

Example: moezoo adapter runs/smora_tiny --out exports/adapter
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moezoo.command import ANYWHERE, WITH_WEIGHTS, Positional, parse


@dataclass(frozen=True)
class AdapterCommand:
    """Write what a run on text has learned: an adapter folder, or the decoder with it merged.

    Plain LoRA is written as Hugging Face PEFT reads it, what tokens choose among in stacked form.

    Example: moezoo adapter runs/smora_tiny --out exports/adapter
    """

    run: Annotated[Path, Positional, WITH_WEIGHTS]
    """Folder of a run, a checkpoint or a saved model, or the name of a model with weights."""
    out: Annotated[Path, ANYWHERE]
    """Folder to write; it must not exist."""
    merge: bool = False
    """Write the whole decoder with the updates added instead, as a Hugging Face model."""
    task: str | None = None
    """With --merge, where tasks decide what is added: the task that the decoder is for."""


def main(words: list[str], prog: str) -> None:
    """Read the command line, write the folder, print what was written."""
    given = parse(AdapterCommand, words, prog)
    from moezoo.domains.text.adapter import write_adapter, write_merged
    from moezoo.errors import UserError

    if given.merge:
        print(write_merged(given.run, given.out, given.task))
    elif given.task is not None:
        raise UserError("--task is for a merged decoder: add --merge, or leave it out.")
    else:
        print(write_adapter(given.run, given.out))
