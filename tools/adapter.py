"""Write what a run on text has learned: an adapter folder, or the decoder with it merged.

Example: python tools/adapter.py runs/smora_tiny --out exports/adapter
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moezoo.command import Positional, parse
from moezoo.errors import run_command


@dataclass(frozen=True)
class Arguments:
    """Write what a run on text has learned: an adapter folder, or the decoder with it merged.

    Plain LoRA is written as Hugging Face PEFT reads it, router-gated updates in stacked form.

    Example: python tools/adapter.py runs/smora_tiny --out exports/adapter
    """

    run: Annotated[Path, Positional]
    """Folder of a run, or of one checkpoint."""
    out: Path
    """Folder to write; it must not exist."""
    merge: bool = False
    """Write the whole decoder with the updates added instead, as a Hugging Face model."""


def main() -> None:
    """Read the command line, write the folder, print what was written."""
    given = parse(Arguments, sys.argv[1:], prog="tools/adapter.py")
    from moezoo.domains.text.adapter import write_adapter, write_merged

    print((write_merged if given.merge else write_adapter)(given.run, given.out))


if __name__ == "__main__":
    run_command(main)
