"""Runs on images: the `data` section, opening its sources, and everything the trainer asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Annotated, Any

from moezoo import fields
from moezoo.data.source import Batch, First, Info, Source, blank
from moezoo.domains.images.data import batches, oxford_pets, tfds_source, transforms
from moezoo.domains.images.protocol import ProtocolConfig
from moezoo.domains.images.tasks import TASKS
from moezoo.errors import UserError, unknown
from moezoo.fields import ExampleCount, FilePath, Seed, Side
from moezoo.tasks.base import Task
from moezoo.train.domain import Classes, Domain, Pretrained, check_names_of, check_tasks_of
from moezoo.train.schema import Config

ARCHIVES, FOLDER = ("nyud", "pascal"), "folder"
MAPPED = {mapping.name: mapping for mapping in (oxford_pets.BY_BREED, oxford_pets.BY_SPECIES)}
MEMORY = 2 << 30  # sources whose decoded size is below this many bytes are held in memory
BYTES_PER_PIXEL = 23  # image 3, four label maps 4, depth 4, normals 12


@dataclass(frozen=True)
class DataConfig:
    """Which data set, how large, and how training examples are varied."""

    name: Annotated[str, fields.KnownWords(lambda root: root.data.names())] = "rooms"
    """Data set."""
    resolution: tuple[Side, Side] = (64, 64)
    """Height and width in pixels; smaller images of NYUDv2 and PASCALContext are padded to it."""
    train: ExampleCount = 2000
    """Number of training examples in generated data sets; others provide all they have."""
    test: ExampleCount = 400
    """Number of test examples, likewise."""
    seed: Seed = 0
    """Seed of generated data sets."""
    data_dir: FilePath | None = None
    """Where data sets are kept; default: $MOEZOO_DATA, else ~/.cache/moezoo."""
    archive: FilePath | None = None
    """Folder of the unpacked archive (NYUDv2, PASCALContext), by default in data_dir; or folder of
    archives downloaded by hand (Oxford-IIIT Pet), which are otherwise downloaded; or your own
    images and labels (folder), by file name, as COCO's annotations or in tables."""
    augment: tuple[str, ...] = ("flip", "photometric")
    """Variations of training examples, applied in this order."""

    @property
    def domain(self) -> Images:
        """The domain that runs on images use."""
        return Images(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The data sets of images."""
        return tuple(_OPENERS)


def learn(mapping: tfds_source.TfdsMapping) -> None:
    """Register a data set of tensorflow-datasets by its mapping, for example in a config file.

    Raises UserError if a data set that comes with the project has its name.
    """
    learn_source(mapping.name, _open_mapped)
    MAPPED[mapping.name] = mapping


def learn_source(name: str, opened: Callable[[DataConfig, str], Source]) -> None:
    """Register any other data set of your own: (data section, "train" or "test") -> its source.

    Raises UserError if a data set that comes with the project has its name.
    """
    fields.check_value(fields.FilePath, name, "The name of the data set")
    if name in OURS:
        raise UserError(f"The data set {name} comes with this project: choose another name.")
    _OPENERS[name] = opened


def check(config: DataConfig) -> None:
    """Raise UserError if a field has no meaning."""
    fields.check(config, "data")
    if config.name not in _OPENERS:
        raise unknown("data set", config.name, sorted(_OPENERS))
    if config.name == FOLDER and config.archive is None:
        raise UserError(
            "data.name is folder, your own images and labels, but data.archive does not say which: "
            "give --data.archive DIR."
        )
    if config.archive is not None and config.name not in (*ARCHIVES, *MAPPED, FOLDER):
        raise UserError(f"data.archive is given, but {config.name} is not read from an archive.")
    for name in config.augment:
        transforms.check(name)
    if "scale" in config.augment and "crop" not in config.augment[config.augment.index("scale") :]:
        raise UserError("data.augment has 'scale', so it needs 'crop' after it: images grow.")


def open_source(config: DataConfig, split: str) -> Source:
    """The `train` or `test` split, generated first if needed; in memory if it is small.

    Raises UserError for unknown names and for directories that cannot be used.
    """
    check(config)
    if split not in ("train", "test"):
        raise unknown("split", split, ["train", "test"])
    return _OPENERS[config.name](config, split)


def info_of(config: DataConfig) -> Info:
    """What the configured data set contains; generates nothing, opens only a source of your own."""
    if config.name == "rooms":
        from moezoo.domains.images.data.rooms import (
            reader,  # tensorflow-datasets costs a quarter of a second
        )

        check(config)
        return reader.describe("train", config.resolution)
    return form_of(config).info


def form_of(config: DataConfig) -> Source:
    """One training example in the form of the configured data set; needs no archive."""
    check(config)
    if config.name == "rooms":
        return blank(info_of(config))
    if config.name in ARCHIVES:
        from moezoo.domains.images.data.dense import reader

        return reader.blank(config.name, "train", config.resolution)
    if config.name in MAPPED:
        return blank(tfds_source.describe(MAPPED[config.name], "train", config.resolution))
    if config.name == FOLDER:
        from moezoo.domains.images.data.folder import reader as folders

        return blank(folders.describe(_folder(config), "train", config.resolution))
    with TemporaryDirectory() as folder:
        return open_source(replace(config, train=1, test=1, data_dir=folder), "train")


def _open_rooms(config: DataConfig, split: str) -> Source:
    from moezoo.data import store
    from moezoo.domains.images.data.rooms import (
        reader,  # tensorflow-datasets costs a quarter of a second
    )

    where = store.directory(config.data_dir)

    def opened() -> Source:
        source = reader.open_rooms(
            config.resolution, config.train, config.test, config.seed, split, where
        )
        size = BYTES_PER_PIXEL * config.resolution[0] * config.resolution[1] * len(source)
        return source.in_memory() if size < MEMORY else source

    return store.renewed(opened, "rooms")


def _open_benchmark(config: DataConfig, split: str) -> Source:
    from moezoo.data import store
    from moezoo.domains.images.data.dense import reader

    given = Path(config.archive).expanduser() if config.archive else None
    where = store.directory(config.data_dir)
    cropped = split == "train" and "crop" in config.augment
    return reader.open_benchmark(config.name, config.resolution, split, given, where, cropped)


def _open_mapped(config: DataConfig, split: str) -> Source:
    from moezoo.data import store

    given = Path(config.archive).expanduser() if config.archive else None
    where = store.directory(config.data_dir)
    mapping = MAPPED[config.name]
    return tfds_source.open_mapped(mapping, config.resolution, split, given, where, MEMORY)


def _folder(config: DataConfig) -> Path:
    return Path(config.archive or "").expanduser()


def _open_folder(config: DataConfig, split: str) -> Source:
    from moezoo.domains.images.data.folder import reader as folders

    return folders.open_folder(_folder(config), split, config.resolution, MEMORY)


_OPENERS: dict[str, Callable[[DataConfig, str], Source]] = {
    "rooms": _open_rooms,
    **dict.fromkeys(ARCHIVES, _open_benchmark),
    **dict.fromkeys(MAPPED, _open_mapped),
    FOLDER: _open_folder,
}
OURS = DataConfig.names()


class Images(Domain[DataConfig]):
    """Pictures with dense labels or a class: `image` float32 [B, H, W, 3] and labels by task."""

    name, unit = "images", "images"
    tasks = TASKS
    pictures = MappingProxyType(
        {
            "predictions.png": "predictions beside truth",
            "confusion.png": "which class was taken for which",
        }
    )

    @property
    def pretrained(self) -> Pretrained:
        """Pretrained vision transformers, those with shifted windows among them."""
        from moezoo.domains.images.pretrained_kinds import ImageTransformers

        return ImageTransformers()

    def check(self, config: Config) -> None:
        """Raise UserError if a field has no meaning."""
        check(self.data)

    def open(self, config: Config, split: str) -> Source:
        """The `train` or `test` split, generated first if needed."""
        return open_source(self.data, split)

    def classes(self, config: Config, source: Source) -> Classes:
        """The classes of its label maps.

        Raises UserError for a task without labels, which could not be made without its classes.
        """
        check_names_of(config.tasks, source)
        return Classes.of(source.info)

    def known_classes(self) -> Classes:
        """The classes of the configured data set; nothing is generated for it."""
        return Classes.of(info_of(self.data))

    def size(self, config: Config) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.data.resolution

    def example(self, config: Config) -> tuple[Batch, Classes]:
        """One training image in the configured form."""
        source = form_of(self.data)
        classes = self.classes(config, source)
        made = batches.training(source, 1, 0, config.tasks, self.data.augment).batch(0)
        return made, classes

    def training(
        self,
        config: Config,
        source: Source,
        tasks: Sequence[str],
        start: int,
        rows: Sequence[int],
    ) -> Iterator[tuple[int, Batch]]:
        """(step, this process's rows of the batch), varied as configured."""
        size, seed = config.train.batch, config.seed
        made = batches.training(source, size, seed, tasks, self.data.augment)
        return made.batches(start, config.train.steps, rows)

    def evaluation(
        self, source: Source, count: int, size: int, names: Sequence[str], rows: Sequence[int]
    ) -> Iterator[Batch]:
        """The first `count` images once, as they are."""
        return batches.evaluation(First(source, count), size, names, rows)

    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        """The model's output for the images."""
        return model(batch["image"], **options)

    def describe(self, config: Config) -> str:
        """The images' size."""
        return f"at {self.data.resolution[0]}x{self.data.resolution[1]}"

    def check_labels(self, tasks: Sequence[Task], source: Source) -> None:
        """Raise UserError for a task for which the data set has no labels or no truth."""
        info = source.info
        check_tasks_of(tasks, source)
        for task in tasks:
            if task.truth not in (*info.tasks, *info.extras):
                raise UserError(
                    f"The protocol of task {task.name} scores against {task.truth}, which "
                    f"{info.name} does not have: use another --protocol.{task.name}, or leave "
                    "it out for the data set's own."
                )

    def protocol(self) -> ProtocolConfig:
        """How benchmarks pose and score tasks on images."""
        return ProtocolConfig()

    def resized(self, size: tuple[int, int]) -> DataConfig:
        """The section with images of this height and width."""
        return replace(self.data, resolution=size)

    def inference(self, run: Any, classes: Classes) -> Any:
        """Photos in, every task's prediction out."""
        from moezoo.deploy.inference import ArrayInference

        return ArrayInference(self.exports(run.config), run, classes)

    def exports(self, config: Config) -> Any:
        """Every task as a path from an image."""
        from moezoo.domains.images.export import PhotoExports

        return PhotoExports(config, self.data)

    def draw(self, finished: Any, folder: Path, count: int) -> None:
        """Predictions beside truth, and usage of experts."""
        from moezoo.domains.images import report  # matplotlib costs a third of a second

        report.draw(finished, folder, count)
