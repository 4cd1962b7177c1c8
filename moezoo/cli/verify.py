"""Run an exported folder's program again and check what the folder says of itself.

Example: moezoo verify exports/depth
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moezoo.command import ANYWHERE, Positional, parse
from moezoo.errors import UserError


@dataclass(frozen=True)
class VerifyCommand:
    """Check a folder that `moezoo export` or `moezoo prune` wrote, in a process of its own.

    Example: moezoo verify exports/depth
    """

    folder: Annotated[Path, Positional, ANYWHERE]
    """The exported folder."""


def main(words: list[str], prog: str) -> int:
    """Check it; 2 and one sentence for what is not as it says."""
    from moezoo import storage
    from moezoo.deploy import proof
    from moezoo.deploy.runtime import programs
    from moezoo.deploy.runtime.forms import ExportError
    from moezoo.deploy.runtime.load import GIVE_UP

    given = parse(VerifyCommand, words, prog)
    try:
        with programs.at_most(2 * GIVE_UP):
            for line in proof.checked(storage.local(given.folder)):
                print(line)
    except ExportError as error:
        raise UserError(str(error)) from error
    return 0
