"""Folders of several files that appear whole under their name, or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moezoo.errors import UserError


def check_new(folder: Path) -> None:
    """UserError where the folder is there already."""
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another folder.")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name when the block ends well.

    Whatever ends the block otherwise, nothing stays. Raises UserError where `folder` exists or the
    disk does not take it.
    """
    check_new(folder)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)
    except OSError as error:
        raise UserError(
            f"Could not write {folder}: {error.strerror or error}; choose another folder or make "
            "room."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
