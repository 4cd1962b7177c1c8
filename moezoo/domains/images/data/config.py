"""The `data` section of a configuration, and opening what it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from moezoo import fields
from moezoo.data.source import Info, Source, blank
from moezoo.domains.images.data import oxford_pets, tfds_source, transforms
from moezoo.errors import UserError, unknown
from moezoo.fields import Examples, FilePath, Seed, Side

ARCHIVES = ("nyud", "pascal")
MAPPED = {mapping.name: mapping for mapping in (oxford_pets.BY_BREED, oxford_pets.BY_SPECIES)}
MEMORY = 2 << 30  # sources whose decoded size is below this many bytes are held in memory
BYTES_PER_PIXEL = 23  # image 3, four label maps 4, depth 4, normals 12


@dataclass(frozen=True)
class DataConfig:
    """Which data set, how large, and how training examples are varied."""

    name: str = "rooms"
    """Data set."""
    resolution: tuple[Side, Side] = (64, 64)
    """Height and width in pixels; smaller images of NYUDv2 and PASCALContext are padded to it."""
    train: Examples = 2000
    """Number of training examples of generated data sets; archives give all they have."""
    test: Examples = 400
    """Number of test examples, likewise."""
    seed: Seed = 0
    """Seed of generated data sets."""
    data_dir: FilePath | None = None
    """Where data sets are kept; default $MOEZOO_DATA, else ~/.cache/moezoo."""
    archive: FilePath | None = None
    """Folder of the unpacked archive (NYUDv2, PASCALContext), by default in data_dir; or the folder
    of archives that were downloaded by hand (Oxford-IIIT Pet), which are otherwise downloaded."""
    augment: tuple[str, ...] = ("flip", "photometric")
    """Variations of training examples, applied in this order."""


def names() -> tuple[str, ...]:
    """The data sets of images."""
    return tuple(_OPENERS)


def learn(mapping: tfds_source.TfdsMapping) -> None:
    """Make a data set of tensorflow-datasets known by its mapping, for example in a config file.

    Raises UserError where one that comes with the project has its name.
    """
    learn_source(mapping.name, _open_mapped)
    MAPPED[mapping.name] = mapping


def learn_source(name: str, opened: Callable[[DataConfig, str], Source]) -> None:
    """Make any other data set of one's own known: (data section, "train" or "test") -> its source.

    Raises UserError where one that comes with the project has its name.
    """
    if name in OURS:
        raise UserError(f"The data set {name} comes with this project: choose another name.")
    _OPENERS[name] = opened


def check(config: DataConfig) -> None:
    """Raise UserError when a field has no meaning."""
    fields.check(config, "data")
    if config.name not in _OPENERS:
        raise unknown("data set", config.name, sorted(_OPENERS))
    if config.archive is not None and config.name not in (*ARCHIVES, *MAPPED):
        raise UserError(f"data.archive is given, but {config.name} is not read from an archive.")
    for name in config.augment:
        transforms.check(name)
    if "scale" in config.augment and "crop" not in config.augment[config.augment.index("scale") :]:
        raise UserError("data.augment has 'scale', so it needs 'crop' after it: images grow.")


def open_source(config: DataConfig, split: str) -> Source:
    """The `train` or `test` split, generated first where needed; in memory when it is small.

    Raises UserError for unknown names and for directories that cannot be used.
    """
    check(config)
    if split not in ("train", "test"):
        raise unknown("split", split, ["train", "test"])
    return _OPENERS[config.name](config, split)


def info_of(config: DataConfig) -> Info:
    """What the configured data set holds; nothing is made, only a source of one's own is opened."""
    if config.name == "rooms":
        from moezoo.domains.images.data.rooms import (
            reader,  # tensorflow-datasets costs a quarter of a second
        )

        check(config)
        return reader.describe("train", config.resolution)
    return form_of(config).info


def form_of(config: DataConfig) -> Source:
    """One training example in the form of the configured data set's; needs no archive."""
    check(config)
    if config.name in ARCHIVES:
        from moezoo.domains.images.data.dense import reader

        return reader.blank(config.name, "train", config.resolution)
    if config.name in MAPPED:
        return blank(tfds_source.describe(MAPPED[config.name], "train", config.resolution))
    with TemporaryDirectory() as folder:
        return open_source(replace(config, train=1, test=1, data_dir=folder), "train")


def _open_rooms(config: DataConfig, split: str) -> Source:
    from moezoo.data import store
    from moezoo.domains.images.data.rooms import (
        reader,  # tensorflow-datasets costs a quarter of a second
    )

    where = Path(config.data_dir).expanduser() if config.data_dir else None

    def opened() -> Source:
        source = reader.open_rooms(
            config.resolution, config.train, config.test, config.seed, split, where
        )
        size = BYTES_PER_PIXEL * config.resolution[0] * config.resolution[1] * len(source)
        return source.in_memory() if size < MEMORY else source

    return store.renewed(opened, "rooms")


def _open_benchmark(config: DataConfig, split: str) -> Source:
    from moezoo.domains.images.data.dense import reader

    given, where = (Path(p).expanduser() if p else None for p in (config.archive, config.data_dir))
    cropped = split == "train" and "crop" in config.augment
    return reader.open_benchmark(config.name, config.resolution, split, given, where, cropped)


def _open_mapped(config: DataConfig, split: str) -> Source:
    given, where = (Path(p).expanduser() if p else None for p in (config.archive, config.data_dir))
    mapping = MAPPED[config.name]
    return tfds_source.open_mapped(mapping, config.resolution, split, given, where, MEMORY)


_OPENERS: dict[str, Callable[[DataConfig, str], Source]] = {
    "rooms": _open_rooms,
    **dict.fromkeys(ARCHIVES, _open_benchmark),
    **dict.fromkeys(MAPPED, _open_mapped),
}
OURS = names()
