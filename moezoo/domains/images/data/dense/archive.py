"""Finding an archive and checking it before anything is converted."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from moezoo.domains.images.data.dense import files
from moezoo.domains.images.data.dense.layout import SPLITS, ArchiveLayout
from moezoo.errors import UserError

OTHER_NYUD = (480, 640)  # pictures of NYUD_MT, another package under the same name
PICTURES = (".png", ".jpg")

Ids = dict[str, tuple[str, ...]]


def find(layout: ArchiveLayout, given: Path | None, data_dir: Path) -> Path | None:
    """The archive's folder: the given one (or its child of the archive's name), else in `data_dir`.

    None if none was given and there is none. Raises UserError if the given one is not a folder.
    """
    if given is None:
        usual = data_dir / layout.folder
        return usual if usual.is_dir() else None
    if not given.is_dir():
        raise UserError(
            f"data.archive is '{given}', which is not a folder: name the folder '{layout.folder}' "
            f"that the {layout.title} archive unpacks to."
        )
    inner = given / layout.folder
    return inner if inner.is_dir() else given


def missing(layout: ArchiveLayout, data_dir: Path) -> UserError:
    """The error for an archive that cannot be found."""
    return UserError(
        f"{layout.title} cannot be downloaded by a program: unpack {layout.folder}.tar.gz and name "
        f"its folder with --data.archive, or put it at '{data_dir / layout.folder}'."
    )


def read_ids(layout: ArchiveLayout, root: Path) -> Ids:
    """The ids of both splits. Raises UserError for lists that are missing, empty or overlap."""
    ids: Ids = {}
    for split in SPLITS:
        path = root / layout.lists[split]
        if not os.path.lexists(path):
            raise UserError(
                f"'{path}' is missing: '{root}' is not a {layout.title} archive in the layout of "
                f"{layout.folder}.tar.gz, or it is incomplete; unpack it again."
            )
        ids[split] = tuple(files.text(path, "a list of ids").split())
        if not ids[split]:
            raise UserError(f"'{path}' lists no ids: {files.AGAIN}.")
    seen: set[str] = set()
    for split in SPLITS:
        for name in ids[split]:
            if name in seen:
                raise UserError(
                    f"The id '{name}' occurs twice in the lists of '{root}', the second time in "
                    f"'{layout.lists[split]}': {files.AGAIN}."
                )
            seen.add(name)
    return ids


def check(layout: ArchiveLayout, root: Path, ids: Ids) -> None:
    """Check folders, files and sizes of pictures; only headers are read.

    Raises UserError for the first thing that is missing or has a wrong size. If the number of
    examples is not the benchmark's, only a warning goes to stderr: scores will not be comparable.
    """
    for what, kind in layout.kinds.items():
        there = [root / folder for folder in kind.folders if (root / folder).is_dir()]
        if not there:
            raise UserError(
                f"'{root / kind.folders[0]}' with the {what} files is missing: unpack the "
                f"{layout.title} archive again."
            )
        present = {entry.name for folder in there for entry in folder.iterdir()}
        for split in SPLITS:
            for name in ids[split]:
                if name + kind.suffix not in present:
                    raise UserError(
                        f"'{kind.path(root, name)}' is missing, but '{layout.lists[split]}' lists "
                        f"'{name}': unpack the {layout.title} archive again."
                    )
    if layout.size is not None:
        _check_sizes(layout, root, ids, layout.size)
    for split in SPLITS:
        if len(ids[split]) != layout.counts[split]:
            print(
                f"warning: '{root / layout.lists[split]}' lists {len(ids[split])} ids; "
                f"{layout.title} has {layout.counts[split]}, so scores are not comparable.",
                file=sys.stderr,
            )


def _check_sizes(layout: ArchiveLayout, root: Path, ids: Ids, size: tuple[int, int]) -> None:
    for name in (name for split in SPLITS for name in ids[split]):
        for kind in layout.kinds.values():
            if kind.suffix not in PICTURES:
                continue
            path = kind.path(root, name)
            found = files.size_of(path)
            if found == size:
                continue
            other = (
                f" (this is the package NYUD_MT, not {layout.folder}.tar.gz)"
                if found == OTHER_NYUD
                else ""
            )
            raise UserError(
                f"'{path}' is {found[0]} x {found[1]}, but pictures of {layout.title} are "
                f"{size[0]} x {size[1]}{other}: use the archive of InvPT and TaskPrompter."
            )
