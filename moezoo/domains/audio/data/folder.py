"""Folders that a data set makes itself: written once under another name, then renamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moezoo.data import store


class Made(NamedTuple):
    """A folder that is complete if it exists."""

    data_dir: Path


def once(
    folder: Path, fill: Callable[[Path], None], size: float, task: str, data_dir: Path
) -> Path:
    """`folder`, made by `fill(temporary folder)` if it does not exist yet.

    Concurrent callers wait for the one that makes it. Raises UserError ("Cannot <task> ...") if
    the disk has less than `size` bytes left or the directory cannot be written; nothing half made
    stays behind.
    """

    def write(made: Made) -> None:
        parent = made.data_dir.parent
        store.check_space(size, parent)
        temporary = parent / f"incomplete.{made.data_dir.name}"
        try:
            temporary.mkdir()
            fill(temporary)
            temporary.rename(made.data_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    with store.explained(task, data_dir):
        waiting = f"{folder.name}: waiting for another process that is making it."
        return store.prepare(lambda: Made(folder), write, waiting).data_dir
