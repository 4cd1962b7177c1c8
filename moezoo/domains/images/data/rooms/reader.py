"""Opening the rendered rooms, on disk, as a source."""

from __future__ import annotations

from pathlib import Path

from moezoo.data import records, store
from moezoo.data.source import Decoded, Info, Labels
from moezoo.domains.images.data.rooms import names
from moezoo.domains.images.data.rooms.builder import Rooms, RoomsConfig
from moezoo.label import BINARY, CLASSES, DIRECTION, DISTANCE, IMAGE

BYTES_PER_PIXEL = 30  # on disk while writing: final records and the builder's temporary file


def prepare(config: RoomsConfig, data_dir: Path) -> Rooms:
    """The builder of a data set that is complete on disk; renders it first if it is missing.

    Concurrent callers wait for the one that renders. Raises UserError if the directory cannot be
    written or the disk is full; partly written files are removed.
    """

    folder = data_dir / "rooms" / config.name / str(Rooms.VERSION)

    def build() -> Rooms:
        with store.quiet(), store.opening(folder):
            return Rooms(config=config, data_dir=str(data_dir))

    def write(builder: Rooms) -> None:
        pixels = config.height * config.width * (config.train + config.test)
        store.check_space(BYTES_PER_PIXEL * pixels, Path(builder.data_dir).parent)
        store.generate(builder, data_dir)

    with store.explained("store the rooms data set in", data_dir):
        return store.prepare(build, write, "rooms: waiting for another process that is rendering.")


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

    Raises UserError if the directory cannot be used or the stored files are damaged.
    """
    config = RoomsConfig(
        height=resolution[0], width=resolution[1], train=train, test=test, seed=seed
    )
    builder = prepare(config, data_dir or store.default_dir())
    return Decoded(describe(split, resolution), records.records(builder, split))


def describe(split: str, resolution: tuple[int, int]) -> Info:
    """What the source contains."""
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
