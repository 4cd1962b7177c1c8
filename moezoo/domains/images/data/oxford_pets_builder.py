"""The Oxford-IIIT Pet data set as a tfds builder that needs no TensorFlow.

tfds's own builder unpacks archives and re-encodes a dozen pictures with TensorFlow; here Pillow
re-encodes every picture that is not really a colour JPEG. URLs, sizes and checksums are tfds's.
Features are named as in tfds's version 4.0.0, without the boxes of heads.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import requests
import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from tensorflow_datasets.core.download import checksums

from moezoo.data import store
from moezoo.domains.images.data.dense import files
from moezoo.domains.images.data.dense.builder import png
from moezoo.domains.images.data.dense.names import BACKGROUND, BORDER, BREEDS, PET, SPECIES
from moezoo.errors import UserError

LIBRARY = tfds.builder_cls("oxford_iiit_pet")
KNOWN = checksums.load_url_infos(Path(str(LIBRARY.pkg_dir_path)) / "checksums.tsv")
URLS = {info.filename.removesuffix(".tar.gz"): url for url, info in KNOWN.items() if info.filename}
LISTS = {"train": "trainval.txt", "test": "test.txt"}
COUNTS = {"train": 3680, "test": 3669}
ARCHIVES = ("images", "annotations")  # the folders, and with .tar.gz the archives
COPIES = 4  # while converting: archives, their contents, tfds's temporary file, records


@dataclass
class PetsConfig(tfds.core.BuilderConfig):
    """Unpacked folders, which no checksum covers; the name says what their lists contain."""

    name: str = ""
    root: Path | None = None

    def __post_init__(self) -> None:
        if self.root is not None:
            lists = {split: entries(self.root / "annotations", split) for split in LISTS}
            sizes = "_".join(f"{split}{len(names)}" for split, names in lists.items())
            self.name = f"{sizes}_{sha256(repr(lists).encode()).hexdigest()[:8]}"


class Pets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Oxford-IIIT Pet.

    segmentation_mask: 1 pet, 2 background, 3 border. label: breed. species: cat, dog.
    """

    name = "oxford_pets"
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # else tfds 4.9.10 looks for checksums with a package it does not install
    url_infos = KNOWN  # pyright: ignore[reportAssignmentType]
    given: Path | None = None  # the folder of archives downloaded by hand

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(BREEDS)),
            "species": tfds.features.ClassLabel(names=list(SPECIES)),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__ or "",
            features=tfds.features.FeaturesDict(features),
            homepage="https://www.robots.ox.ac.uk/~vgg/data/pets/",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        root = self.builder_config.root if isinstance(self.builder_config, PetsConfig) else None
        if root is None:
            finished = Path(dl_manager.download_dir).glob("**/*.INFO")
            if self.given is None and len(list(finished)) < len(URLS):
                check_download(Path(dl_manager.download_dir))
            root = Path(dl_manager.download_dir) / "extracted"
            for path in dl_manager.download(URLS).values():
                with tarfile.open(path) as archive:  # tfds's own unpacking needs TensorFlow
                    archive.extractall(root, filter="data")
        folders = {name: root / name for name in ARCHIVES}
        return {split: self._generate_examples(split, **folders) for split in LISTS}

    def _generate_examples(
        self, split: str, images: Path, annotations: Path
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        listed = entries(annotations, split)
        if len(listed) != COUNTS[split]:
            print(
                f"warning: '{annotations / LISTS[split]}' lists {len(listed)} pictures; the data "
                f"set has {COUNTS[split]}, so scores are not comparable.",
                file=sys.stderr,
            )
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(f"converting pets, {split}", total=len(listed))
            for index, (name, label, species) in enumerate(listed):
                yield (
                    index,
                    {
                        "image": colour_jpeg(images / f"{name}.jpg"),
                        "segmentation_mask": trimap(annotations / "trimaps" / f"{name}.png"),
                        "label": label,
                        "species": species,
                        "file_name": f"{name}.jpg",
                    },
                )
                bar.advance(task)


def open_builder(given: Path | None, data_dir: Path) -> Pets:
    """The builder for what is given: unpacked folders, the two archives, or nothing (download).

    If nothing is given and nothing was downloaded before, the only conversion of unpacked folders
    in `data_dir` is used. Raises UserError for a folder that has neither.
    """
    with store.opening(data_dir / Pets.name):
        return _builder(given, data_dir, {"data_dir": str(data_dir)})


def _builder(given: Path | None, data_dir: Path, where: dict[str, Any]) -> Pets:
    if given is None:
        version = str(Pets.VERSION)
        found = [p.parent.name for p in (data_dir / Pets.name).glob(f"*/{version}")]
        if len(found) == 1 and not (data_dir / Pets.name / version).exists():
            return Pets(config=PetsConfig(name=found[0]), **where)
        return Pets(**where)
    if all((given / name).is_dir() for name in ARCHIVES):
        return Pets(config=PetsConfig(root=given), **where)
    for name in ARCHIVES:
        if not (given / f"{name}.tar.gz").is_file():
            raise UserError(
                f"'{given}' has no {name}.tar.gz: put both archives of the Oxford-IIIT Pet data "
                f"set there, {' and '.join(URLS.values())}, or both unpacked as folders."
            )
    builder = Pets(**where)
    builder.given = given
    return builder


def check_download(folder: Path) -> None:
    """Check disk space, and make one quick request: offline, tfds repeats its own for minutes.

    Raises OSError and the errors of requests.
    """
    size = sum(info.size for info in KNOWN.values())
    store.check_space(COPIES * size, folder)
    requests.head(URLS["annotations"], timeout=20)
    print(f"oxford_iiit_pet: downloading {size / 1e6:.0f} MB, once.", file=sys.stderr)


def entries(annotations: Path, split: str) -> list[tuple[str, int, int]]:
    """Name, breed and species (both from 0) of every picture of a split.

    Raises UserError for a list that is missing or malformed, and for numbers out of range.
    """
    path = annotations / LISTS[split]
    lines = files.text(path, "a list of pictures", "unpack annotations.tar.gz again").splitlines()
    found = [_entry(path, line) for line in lines if line.strip() and line[0] != "#"]
    if not found:
        raise UserError(f"'{path}' lists no pictures: unpack annotations.tar.gz again.")
    return found


def _entry(path: Path, line: str) -> tuple[str, int, int]:
    try:
        name, label, species, _ = line.split()
        label, species = int(label), int(species)
    except ValueError as error:
        raise UserError(
            f"'{path}' has the line '{line}', but name, breed, species and a number were "
            "expected: unpack annotations.tar.gz again."
        ) from error
    for what, number, names in (("breed", label, BREEDS), ("species", species, SPECIES)):
        if not 1 <= number <= len(names):
            raise UserError(
                f"'{path}' gives '{name}' the {what} {number}, but there are 1 to {len(names)}: "
                "unpack annotations.tar.gz again."
            )
    return name, label - 1, species - 1


def colour_jpeg(path: Path) -> BytesIO:
    """The file itself if it is a colour JPEG, else its picture as one.

    Raises UserError for a file that is missing or damaged.
    """
    values = files.rgb(path)
    if files.is_plain(path, "JPEG"):
        return BytesIO(path.read_bytes())
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, "JPEG", quality=95)
    buffer.seek(0)
    return buffer


def trimap(path: Path) -> BytesIO:
    """A trimap as a PNG file; UserError if it is damaged or has other values."""
    values = files.single(path)
    files.check_values(path, values, (PET, BACKGROUND, BORDER), "a trimap has 1, 2 and 3")
    return png(values)
