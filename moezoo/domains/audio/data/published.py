"""Published data sets of sounds: the folders that their archives unpack to, splits and classes.

ESC-50 (Piczak, 2015), UrbanSound8K (Salamon et al., 2014), Speech Commands v2 (Warden,
arXiv:1804.03209) and Fluent Speech Commands (Lugosch et al., 2019). There is always a validation
split: in data sets with folds, fold k is for testing and fold k + 1 for validation (the published
code of Soft-MoA selects on the test fold of UrbanSound8K, which we do not follow). Classes are in
the order of their numbers.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moezoo import regular
from moezoo.domains.audio.data.read import Mono, average, first
from moezoo.errors import UserError
from moezoo.schema_check import shown

SEPARATOR = " / "  # between the slots of an intent

ESC50 = (
    *("dog", "rooster", "pig", "cow", "frog", "cat", "hen", "insects", "sheep", "crow"),
    *("rain", "sea waves", "crackling fire", "crickets", "chirping birds", "water drops", "wind"),
    *("pouring water", "toilet flush", "thunderstorm", "crying baby", "sneezing", "clapping"),
    *("breathing", "coughing", "footsteps", "laughing", "brushing teeth", "snoring"),
    *("drinking sipping", "door wood knock", "mouse click", "keyboard typing"),
    *("door wood creaks", "can opening", "washing machine", "vacuum cleaner", "clock alarm"),
    *("clock tick", "glass breaking", "helicopter", "chainsaw", "siren", "car horn", "engine"),
    *("train", "church bells", "airplane", "fireworks", "hand saw"),
)
URBANSOUND8K = (
    *("air conditioner", "car horn", "children playing", "dog bark", "drilling"),
    *("engine idling", "gun shot", "jackhammer", "siren", "street music"),
)
SPEECH_COMMANDS = (
    *("backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward"),
    *("four", "go", "happy", "house", "learn", "left", "marvin", "nine", "no", "off", "on"),
    *("one", "right", "seven", "sheila", "six", "stop", "three", "tree", "two", "up", "visual"),
    *("wow", "yes", "zero"),
)
TFDS_SPEECH_COMMANDS = (
    *("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes"),
    *("_silence_", "_unknown_"),
)
_ROOMS = ("bedroom", "kitchen", "none", "washroom")
_INTENTS = (
    *(("activate", "lamp", "none"), *(("activate", "lights", room) for room in _ROOMS)),
    ("activate", "music", "none"),
    *(("bring", thing, "none") for thing in ("juice", "newspaper", "shoes", "socks")),
    *(
        ("change language", language, "none")
        for language in ("Chinese", "English", "German", "Korean", "none")
    ),
    *(("deactivate", "lamp", "none"), *(("deactivate", "lights", room) for room in _ROOMS)),
    ("deactivate", "music", "none"),
    *(*(("decrease", "heat", room) for room in _ROOMS), ("decrease", "volume", "none")),
    *(*(("increase", "heat", room) for room in _ROOMS), ("increase", "volume", "none")),
)
FLUENT: dict[str, tuple[str, ...]] = {
    "intent": tuple(SEPARATOR.join(slots) for slots in _INTENTS),
    "action": tuple(sorted({slots[0] for slots in _INTENTS})),
    "object": tuple(sorted({slots[1] for slots in _INTENTS})),
    "location": tuple(sorted({slots[2] for slots in _INTENTS})),
}


LARGEST, MOST_ROWS = 32 * regular.MB, 500_000  # per table; the longest has 23,132 rows
NOISE = "_background_noise_"  # a folder of Speech Commands that contains no words
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}


class Found(NamedTuple):
    """Clips of a split in order, and their classes by task."""

    paths: list[Path]
    labels: dict[str, list[str]]


@dataclass(frozen=True)
class Published:
    """A data set: its name, the folder its archive unpacks to, and how its splits are found."""

    name: str
    title: str
    folder: str
    names: Mapping[str, tuple[str, ...]]
    find: Callable[[Published, Path, str, int], Found]
    folds: int = 0
    mono: Mono = average

    def root(self, given: Path | None, data_dir: Path) -> Path:
        """The data set's folder: the given one, or its child of the usual name, or in `data_dir`.

        Raises UserError if there is none.
        """
        if given is not None and not given.is_dir():
            raise UserError(
                f"data.archive is '{given}', which is not a folder: name the folder "
                f"'{self.folder}' that the {self.title} archive unpacks to."
            )
        base = data_dir if given is None else given
        inner = base / self.folder
        if given is None and not inner.is_dir():
            raise UserError(
                f"{self.title} was not found: unpack its archive and name the folder with "
                f"--data.archive, or put it at '{inner}'."
            )
        return inner if inner.is_dir() else base

    def split(self, root: Path, split: str, fold: int) -> Found:
        """The clips of a split; `fold` counts from 1 if the data set has folds.

        Raises UserError if lists or clips are missing, or a class is unknown or has no clip.
        """
        found = self.find(self, root, split, fold)
        for path in found.paths:
            _check_inside(self, root, path)
            if not os.path.isfile(path):
                raise UserError(
                    f"'{path}' is missing, but the lists of {self.title} name it: {self.again}."
                )
        for task, classes in self.names.items():
            self._check_classes(task, classes, found.labels[task], root, split, fold)
        return found

    def _check_classes(
        self, task: str, classes: Sequence[str], given: list[str], root: Path, split: str, fold: int
    ) -> None:
        unknown = sorted(set(given) - set(classes))
        if unknown:
            raise UserError(
                f"'{root}' has clips of the {task} {shown(unknown[0])}, which {self.title} does "
                f"not have: {self.again}."
            )
        missing = [name for name in classes if name not in set(given)]
        if missing:
            where = f"the {split} split" + (f" with data.fold {fold}" if self.folds else "")
            raise UserError(
                f"No clip of the {task} '{missing[0]}' is in {where} of {self.title} in '{root}': "
                f"{self.again}."
            )

    @property
    def again(self) -> str:
        """What to do."""
        return f"unpack the {self.title} archive again"


def _check_inside(data: Published, root: Path, path: Path) -> None:
    """Raise UserError if a list names a file outside the folder, or an impossible file name."""
    inside = path.is_relative_to(root) and ".." not in path.relative_to(root).parts
    if not inside or not str(path.name).isprintable():
        raise UserError(
            f"The lists of {data.title} name {shown(str(path))}, which is not a file inside "
            f"'{root}': {data.again}."
        )


def folds_of(split: str, fold: int, folds: int) -> set[int]:
    """The folds of a split: `fold` is for testing, the next validates, the others train."""
    test, valid = fold, fold % folds + 1
    held = {"test": {test}, "valid": {valid}}
    return held.get(split, set(range(1, folds + 1)) - {test, valid})


def table(data: Published, path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """These columns of a CSV file, by row; UserError if it is missing or lacks one.

    Files as spreadsheets write them are accepted: with a byte order mark, in UTF-16 with one, with
    semicolons or tabs instead of commas, and with empty rows.
    """
    text = _text(data, path)
    marks = (mark for mark in ",;\t" if set(columns) <= set(_titles(text, mark)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=next(marks, ","))
    rows = (row for row in reader if any(row))  # spreadsheets write empty ones
    found: list[dict[str, str]] = []
    try:
        titles = next(rows, [])
        for column in columns:
            if column not in titles:
                raise UserError(
                    f"'{path}' has no column '{column}', but {shown(titles)}: {data.again}."
                )
        places = {column: titles.index(column) for column in columns}
        for row in rows:
            if len(row) <= max(places.values()):
                column = next(name for name, place in places.items() if place >= len(row))
                raise UserError(f"'{path}' lacks values in the column '{column}': {data.again}.")
            found.append({column: row[place] for column, place in places.items()})
            if len(found) > MOST_ROWS:
                raise UserError(f"'{path}' has more than {MOST_ROWS:,} rows: {data.again}.")
    except csv.Error as error:
        raise UserError(f"'{path}' cannot be read as a table: {data.again}.") from error
    if not found:
        raise UserError(f"'{path}' has no rows: {data.again}.")
    return found


def _titles(text: str, mark: str) -> list[str]:
    """The entries of the first line, split at `mark`."""
    first = text[:10_000].lstrip("\r\n").split("\n", 1)[0].rstrip("\r")
    return [title.strip('"') for title in first.split(mark)]


def _text(data: Published, path: Path) -> str:
    missing = not os.path.lexists(path)
    advice = f"that folder is not {data.title}, or incomplete; {data.again}"
    content = regular.read(path, LARGEST, UserError, advice if missing else data.again)
    try:
        wide = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' cannot be read as a table: {data.again}.") from error


def in_folds(data: Published, path: Path, rows: list[dict[str, str]], split: str, fold: int):
    """The rows of a split; UserError if a row's fold is not a number of the data set's."""
    wanted, kept = folds_of(split, fold, data.folds), []
    for row in rows:
        if row["fold"] not in map(str, range(1, data.folds + 1)):
            raise UserError(
                f"'{path}' has the fold {shown(row['fold'])}, but {data.title} has folds 1 to "
                f"{data.folds}: {data.again}."
            )
        if int(row["fold"]) in wanted:
            kept.append(row)
    return kept


def _esc50(data: Published, root: Path, split: str, fold: int) -> Found:
    path = root / "meta" / "esc50.csv"
    rows = table(data, path, ("filename", "fold", "category"))
    kept = in_folds(data, path, rows, split, fold)
    paths = [root / "audio" / row["filename"] for row in kept]
    return Found(paths, {"event": [row["category"].replace("_", " ") for row in kept]})


def _urban(data: Published, root: Path, split: str, fold: int) -> Found:
    path = root / "metadata" / "UrbanSound8K.csv"
    rows = table(data, path, ("slice_file_name", "fold", "class"))
    kept = in_folds(data, path, rows, split, fold)
    paths = [root / "audio" / f"fold{row['fold']}" / row["slice_file_name"] for row in kept]
    return Found(paths, {"event": [row["class"].replace("_", " ") for row in kept]})


def _commands(data: Published, root: Path, split: str, fold: int) -> Found:
    lists = {part: _text(data, root / name).split() for part, name in LISTS.items()}
    if split in lists:
        held = lists[split]
    else:
        away = {*lists["valid"], *lists["test"]}
        everything = sorted(p.relative_to(root).as_posix() for p in root.glob("*/*.wav"))
        held = [name for name in everything if name not in away and not name.startswith(NOISE)]
    return Found([root / name for name in held], {"word": [n.split("/")[0] for n in held]})


def _fluent(data: Published, root: Path, split: str, fold: int) -> Found:
    path = root / "data" / f"{split}_data.csv"
    slots = ("action", "object", "location")
    rows = table(data, path, ("path", *slots))
    labels = {slot: [row[slot] for row in rows] for slot in slots}
    intents = [SEPARATOR.join(row[slot] for slot in slots) for row in rows]
    return Found([root / row["path"] for row in rows], {"intent": intents} | labels)


PUBLISHED: dict[str, Published] = {
    data.name: data
    for data in (
        Published("esc50", "ESC-50", "ESC-50-master", {"event": ESC50}, _esc50, 5),
        Published(
            *("urbansound8k", "UrbanSound8K", "UrbanSound8K", {"event": URBANSOUND8K}),
            *(_urban, 10, first),
        ),
        Published(
            *("speech_commands", "Speech Commands v2", "speech_commands_v0.02"),
            *({"word": SPEECH_COMMANDS}, _commands),
        ),
        Published(
            *("fluent_speech_commands", "Fluent Speech Commands"),
            *("fluent_speech_commands_dataset", FLUENT, _fluent),
        ),
    )
}
