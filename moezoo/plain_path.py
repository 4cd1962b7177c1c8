"""Paths that array stores and data builders take for what they are.

Orbax and tensorflow-datasets look for their files with patterns in which a folder's name stands
as it is: there `[ab]`, `*` and `?` mean other names, and TensorStore reads a backslash as a slash.
What is written into such a folder cannot be found again, or another folder's files are.
"""

from __future__ import annotations

import os
from pathlib import Path

from moezoo.errors import UserError
from moezoo.storage import is_stored

ODD = tuple(c for c in "[*?\\" if c != os.sep)


def check(path: Path | str, option: str) -> None:
    """UserError for a folder whose whole path has such a character, or cannot be encoded.

    `option` is what names another one.
    """
    whole = str(path) if is_stored(path) else os.path.abspath(path)
    found = [c for c in ODD if c in whole]
    if found:
        raise UserError(
            f"'{whole}' has the character {' and '.join(found)} in it, which the programs that "
            f"store arrays there take for a pattern of names: choose another {option}."
        )
    try:
        whole.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{whole!r} cannot be written as UTF-8: choose another {option}."
        ) from error
