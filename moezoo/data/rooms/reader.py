"""Opening the rooms data set as a source."""

from __future__ import annotations

from pathlib import Path

from moezoo.data.rooms import names
from moezoo.data.rooms.builder import RoomsConfig
from moezoo.data.rooms.store import default_dir, prepare, quiet
from moezoo.data.source import IMAGE_TASKS, Decoded, Info, Labels
from moezoo.errors import UserError


def open_rooms(
    resolution: tuple[int, int],
    train: int,
    test: int,
    seed: int,
    split: str,
    data_dir: Path | None = None,
) -> Decoded:
    """One split of the rooms with these sizes and seed, rendered first if it is not in `data_dir`.

    Raises UserError when the directory cannot be used or the stored files are damaged.
    """
    config = RoomsConfig(
        height=resolution[0], width=resolution[1], train=train, test=test, seed=seed
    )
    builder = prepare(config, data_dir or default_dir())
    info = Info(
        name="rooms",
        split=split,
        resolution=resolution,
        tasks=(*IMAGE_TASKS, "scene"),
        labels={
            "semseg": Labels(names.CLASSES, names.CLASS_PALETTE),
            "parts": Labels(names.PARTS, names.PART_PALETTE),
            "scene": Labels(names.SCENES, names.CLASS_PALETTE[: len(names.SCENES)]),
        },
    )
    expected = train if split == "train" else test
    try:
        with quiet():
            records = builder.records(split)
            whole = len(records) == expected and bool(records[0]) and bool(records[expected - 1])
    except Exception as error:  # the reader raises many kinds for damaged files
        raise _damaged(builder.data_dir) from error
    if not whole:
        raise _damaged(builder.data_dir)
    return Decoded(info, records)


def _damaged(folder: str) -> UserError:
    return UserError(f"The data set in '{folder}' is damaged; delete that folder, then run again.")
