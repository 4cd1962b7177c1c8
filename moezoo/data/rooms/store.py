"""The rendered rooms on disk."""

from __future__ import annotations

from pathlib import Path

from moezoo.data import store
from moezoo.data.rooms.builder import Rooms, RoomsConfig

BYTES_PER_PIXEL = 30  # on disk while writing: final records and the builder's temporary file


def prepare(config: RoomsConfig, data_dir: Path) -> Rooms:
    """The builder of a data set that is complete on disk; renders it first where it is missing.

    Concurrent callers wait for the one that renders. Raises UserError when the directory cannot be
    written or the disk is full; what was half written is removed.
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
