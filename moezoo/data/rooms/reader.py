"""Opening the rooms data set as a source."""

from __future__ import annotations

from pathlib import Path

from moezoo.data import records, store
from moezoo.data.rooms import names
from moezoo.data.rooms.builder import RoomsConfig
from moezoo.data.rooms.store import prepare
from moezoo.data.source import Decoded, Info, Labels
from moezoo.label import BINARY, CLASSES, DIRECTION, DISTANCE, IMAGE

KINDS = {
    "semseg": CLASSES,
    "parts": CLASSES,
    "saliency": BINARY,
    "normals": DIRECTION,
    "edge": BINARY,
    "depth": DISTANCE,
    "scene": IMAGE,
}


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
    builder = prepare(config, data_dir or store.default_dir())
    return Decoded(describe(split, resolution), records.records(builder, split))


def describe(split: str, resolution: tuple[int, int]) -> Info:
    """What the source holds."""
    return Info(
        name="rooms",
        split=split,
        resolution=resolution,
        tasks=tuple(KINDS),
        kinds=KINDS,
        labels={
            "semseg": Labels(names.CLASSES, names.CLASS_PALETTE),
            "parts": Labels(names.PARTS, names.PART_PALETTE),
            "scene": Labels(names.SCENES, names.CLASS_PALETTE[: len(names.SCENES)]),
        },
    )
