"""What lies in a folder of one's own: images, the labels of each by its name, and the two splits.

    rooms/images/kitchen.jpg    rooms/semseg/kitchen.png    rooms/depth/kitchen.npy
    rooms/scene.csv             rooms/folder.json           rooms/test.txt

A folder beside `images` is named as a task; those whose names begin with `.` or `_` are left out.
Nothing is decoded here.
"""

from __future__ import annotations

import csv
import hashlib
import io
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from moezoo import regular
from moezoo.data import picture
from moezoo.domains.images.data.folder.settings import FILE, FolderSettings
from moezoo.errors import UserError
from moezoo.label import LabelKind

IMAGES = "images"
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm", ".pgm")
MAPS = (".png", ".tif", ".tiff", ".bmp", ".npy")  # no format that changes numbers
FOREIGN = ("Thumbs.db", "desktop.ini")
MOST_TEXT = 50 * regular.MB
SPLITS = ("train", "test")

Kinds = Mapping[str, LabelKind]
Words = Mapping[str, str]


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder by the image's name, which is its file's without the ending.

    maps: by task, a file for every image.   words: by task whose label is one class for the image,
    the class's name, "" where there is none.   splits: names of the `train` and `test` images.
    """

    root: Path
    images: Mapping[str, Path]
    maps: Mapping[str, Mapping[str, Path]]
    words: Mapping[str, Words]
    splits: Mapping[str, tuple[str, ...]]

    @property
    def paths(self) -> Iterable[Path]:
        """Every file that is read."""
        yield from self.images.values()
        for files in self.maps.values():
            yield from files.values()


def look(root: Path, known: Kinds, settings: FolderSettings) -> FolderFiles:
    """The files of a folder and how they go together. Raises UserError where they do not.

    known: the kind of label of every task that there is.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "is missing"
        raise UserError(f"The folder '{root}' {what}: name a folder that holds '{IMAGES}'.")
    folders, tables = _entries(root, known)
    images = _by_name(root / IMAGES, PICTURES)
    if len(images) < 2:
        raise UserError(f"'{root / IMAGES}' has one image: put at least two into it.")
    maps = {task: _by_name(root / task, MAPS) for task in known if task in folders}
    faults = [_unpaired(root / task, images, files) for task, files in maps.items()]
    if any(faults):
        raise UserError(" ".join(filter(None, faults)))
    words = {task: _words(root / f"{task}.csv", images) for task in known if task in tables}
    if not maps and not words:
        raise UserError(
            f"'{root}' has images without labels: put a folder of labels beside '{IMAGES}', named "
            f"as one of the tasks {', '.join(known)}."
        )
    return FolderFiles(root, images, maps, words, _splits(root, images, settings))


def _entries(root: Path, known: Kinds) -> tuple[set[str], set[str]]:
    """The folders of tasks, and the tasks of tables."""
    entries = _entries_of(root)
    folders = {e.name for e in entries if e.is_dir()}
    if IMAGES not in folders:
        raise UserError(
            f"'{root}' has no folder '{IMAGES}': put the images into one, and the labels of each "
            "task into a folder beside it that has the task's name."
        )
    for entry in entries:
        if entry.name in known and not entry.is_dir():
            raise UserError(
                f"'{entry}' is a file: put the labels of {entry.name} into a folder of that name."
            )
    for name in sorted(folders - {IMAGES}):
        if name not in known:
            near = get_close_matches(name, [*known, IMAGES], n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"tasks: {', '.join(known)}."
            raise UserError(
                f"'{root / name}' is called as no task is (with _ before its name it is left out): "
                f"{hint}"
            )
        if not known[name].per_pixel:
            raise UserError(
                f"'{root / name}' is a folder, but {name} is one class for an image: write lines "
                f"'image,class' into '{root / name}.csv'."
            )
    tables = {e.stem for e in entries if e.suffix == ".csv" and e.stem in known}
    for name in sorted(tables):
        if known[name].form != "image":
            raise UserError(
                f"'{root / name}.csv' is a table, but {name} is a map: put one file for each image "
                f"into the folder '{root / name}'."
            )
    return folders, tables


def _by_name(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by their names without ending."""
    found: dict[str, Path] = {}
    for path in _entries_of(folder):
        wrong = regular.trouble(path, picture.MOST_BYTES)
        if wrong is not None:
            raise UserError(f"'{path}' {wrong}: replace it, or move it out of '{folder}'.")
        if path.suffix.lower() not in endings:
            lossy = " (others change numbers)" if path.suffix.lower() in PICTURES else ""
            raise UserError(
                f"'{path}' is none of the files that are read here, which end in "
                f"{', '.join(endings)}{lossy}: save it as one of these, or move it out."
            )
        name = unicodedata.normalize("NFC", path.stem)  # systems write accents in two ways
        if name in found:
            raise UserError(
                f"'{found[name]}' and '{path.name}' have one name: rename one, because labels are "
                "found by the name without its ending."
            )
        found[name] = path
    if not found:
        raise UserError(f"The folder '{folder}' is empty: put its files into it, or remove it.")
    return found


def _entries_of(folder: Path) -> list[Path]:
    """What lies in a folder and is meant, in order."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"The folder '{folder}' cannot be read ({error.strerror}): allow it, or name another."
        ) from error
    return [path for path in found if path.name[0] not in "._" and path.name not in FOREIGN]


def _unpaired(folder: Path, images: Mapping[str, Path], files: Mapping[str, Path]) -> str | None:
    """What is wrong with the names in a folder of labels; None: nothing."""
    if missing := [name for name in images if name not in files]:
        return (
            f"'{images[missing[0]]}' has no label in '{folder}'{_more(missing)}: add "
            f"'{missing[0]}.png', or move the image out."
        )
    if alone := [name for name in files if name not in images]:
        near = get_close_matches(alone[0], images, n=1)
        hint = f" (there is '{images[near[0]].name}')" if near else ""
        return (
            f"'{files[alone[0]]}' is the label of no image{hint}{_more(alone)}: give it the name "
            "of its image, or move it out."
        )
    return None


def _more(names: Sequence[str]) -> str:
    return f", nor have {len(names) - 1:,} more" if len(names) > 1 else ""


def _words(path: Path, images: Mapping[str, Path]) -> Words:
    """The class of every image by a table with the columns image and class."""
    found: dict[str, str] = {}
    try:
        rows = list(csv.reader(io.StringIO(_text(path)), strict=True))
    except csv.Error as error:
        raise UserError(f"'{path}' is not a table of commas ({error}): correct it.") from error
    for number, row in enumerate(rows, 1):
        row = [cell.strip() for cell in row]
        if not any(row) or (number == 1 and row[0].lower() == IMAGES[:-1]):
            continue
        if len(row) != 2 or not row[1].isprintable() or len(row[1]) > 200:
            raise UserError(
                f"'{path}' has the line {number} '{','.join(row)[:80]}', which is not of the form "
                "'image,class': correct it."
            )
        name = _name_of(row[0], images, f"'{path}', line {number},")
        if found.setdefault(name, row[1]) != row[1]:
            raise UserError(f"'{path}' has two classes for the image '{name}': remove one line.")
    if missing := [name for name in images if name not in found]:
        raise UserError(
            f"'{images[missing[0]]}' has no line in '{path}'{_more(missing)}: add the line "
            f"'{missing[0]},class', with nothing after the comma where the class is not known."
        )
    return found


def _name_of(word: str, images: Mapping[str, Path], where: str) -> str:
    """The name of the image that a line means, with or without the file's ending."""
    word = unicodedata.normalize("NFC", word)
    for name in (word, word.rpartition(".")[0]):
        if name in images and word in (name, images[name].name):
            return name
    near = get_close_matches(word, images, n=1)
    hint = f": did you mean '{near[0]}'?" if near else ": correct the line."
    raise UserError(f"{where} names the image '{word[:80]}', which is not there{hint}")


def _text(path: Path) -> str:
    try:
        return regular.read(path, MOST_TEXT, UserError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not text: save it as UTF-8.") from error


def _splits(
    root: Path, images: Mapping[str, Path], settings: FolderSettings
) -> dict[str, tuple[str, ...]]:
    """Names of the images of each split, in order: by lists, else by the share."""
    given: dict[str, set[str]] = {}
    for split in SPLITS:
        path = root / f"{split}.txt"
        if path.exists():
            words = filter(None, map(str.strip, _text(path).splitlines()))
            given[split] = {_name_of(word, images, f"'{path}'") for word in words}
    if settings.test is not None:
        if given:
            raise UserError(
                f"'{root}' lists its images in {FILE} and in {' and '.join(given)}.txt: keep one "
                "of them."
            )
        given["test"] = {_name_of(word, images, f"'{root / FILE}'") for word in settings.test}
    given = given or {"test": drawn(images, settings.share)}
    for split, other in (SPLITS, SPLITS[::-1]):
        given.setdefault(split, set(images) - given.get(other, set()))
        if not given[split]:
            raise UserError(f"'{root}' has no {split} images: correct the lists of images there.")
    if both := sorted(given["train"] & given["test"]):
        raise UserError(f"'{root}' has '{both[0]}' in train.txt and in test.txt: remove one line.")
    return {split: tuple(name for name in images if name in given[split]) for split in SPLITS}


def drawn(names: Collection[str], share: float) -> set[str]:
    """The test images: those whose name's hash falls below the share.

    Each name decides for itself, so that further images move none. Only where all hashes fall on
    one side, the one nearest to the other side goes there, because both splits need an image.
    """
    places = {name: _place(name) for name in names}
    below = {name for name, place in places.items() if place < share}
    if not below:
        return {min(places, key=places.__getitem__)}
    if len(below) == len(places):
        below.remove(max(places, key=places.__getitem__))
    return below


def _place(name: str) -> float:
    """A number from 0 to below 1 that follows from the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
