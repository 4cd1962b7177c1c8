"""Tables of images: Parquet files, or a folder that the package `datasets` of Hugging Face saved.

    rooms/train-00000-of-00001.parquet   rooms/test.parquet    (or rooms/data/..., rooms/train/...)
    rooms/dataset_dict.json              rooms/train/data-00000-of-00001.arrow

A row is an image and its labels, which are pictures in a column named as a task (`semseg`, `depth`;
`mask`, `annotation` and `label` mean `semseg`), in the units of `labels`; or a class for the image,
a number or a word (`scene`; `label` where it is no picture). `columns` of `folder.json` names
others. Files with one split, or without any, are divided by rows. Parquet is held in memory as it
is coded; what `datasets` saved is read from its place. pyarrow reads both.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo import regular
from moezoo import schema_check as sc
from moezoo.data import picture
from moezoo.data.source import Labels
from moezoo.domains.images.data.folder import labels as read_label
from moezoo.domains.images.data.folder import listing, own, settings
from moezoo.domains.images.data.folder.labels import MapCell, MapReader
from moezoo.domains.images.data.folder.listing import Kinds
from moezoo.domains.images.data.folder.own import OwnData, Size
from moezoo.errors import UserError, unknown

# What of `folder.json` means something here.
SETTINGS = ("classes", "colours", "unlabelled", "depth", "columns", "test", "test_share")
IMAGE = "image"
# Columns that are read as a task where none has its name: of pictures, and of classes.
OTHER_NAMES = {"semseg": ("mask", "annotation", "label"), "scene": ("label",)}
DICTIONARY, STATE = "dataset_dict.json", "state.json"
SPLITS = {"train": ("train",), "test": ("test", "val")}
PARTS = re.compile(r"([^-.]+)(-[^.]*)?\.parquet")  # train-00000-of-00002.parquet
MOST_PARQUET = 8_000 * regular.MB
STATE_FORM = sc.table(
    {"_data_files": sc.list_of(sc.table({"filename": sc.relative}, ("filename",)), 1)},
    ("_data_files",),
)
DICTIONARY_FORM = sc.table({"splits": sc.list_of(sc.line(200), 1)}, ("splits",))


@dataclass(frozen=True)
class TableFiles:
    """The files that are read, by the name of their split, and a sentence for each left out."""

    root: Path
    files: Mapping[str, tuple[Path, ...]]
    notes: tuple[str, ...]

    @property
    def paths(self) -> list[Path]:
        """Every file that is read."""
        return [path for paths in self.files.values() for path in paths]


class Row(NamedTuple):
    """Where an example lies."""

    path: Path
    table: Any
    number: int


class TableRows:
    """The rows of several files, one behind the other."""

    def __init__(self, tables: Sequence[tuple[Path, Any]]):
        self._tables = tables
        self._ends = list(accumulate(table.num_rows for _, table in tables))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        file = bisect.bisect_right(self._ends, index)
        path, table = self._tables[file]
        return Row(path, table, index - (self._ends[file - 1] if file else 0))

    def values(self, column: str) -> list[Any]:
        """A column of all rows."""
        return [value for _, table in self._tables for value in table.column(column).to_pylist()]


@dataclass(frozen=True, eq=False)
class TableFolder(OwnData):
    """Images and labels in rows. columns: by task, and of the image.   rows: by image's name."""

    root: Path
    settings: settings.FolderSettings
    kinds: Kinds
    labels: Mapping[str, Labels]
    splits: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, str]
    rows: Mapping[str, Row]
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have columns, in the order of the table of tasks."""
        return tuple(task for task in self.kinds if task in self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all images: their split and number."""
        return tuple(self.rows)

    def image(self, name: str) -> np.ndarray:
        """An image, uint8 [H,W,3]. Raises UserError."""
        with read_label.reading(self._place(IMAGE, name)):
            return picture.rgb(self._picture(IMAGE, name))

    def image_size(self, name: str) -> Size:
        """Height and width of an image, from its header. Raises UserError."""
        with read_label.reading(self._place(IMAGE, name)):
            return picture.size_of(self._picture(IMAGE, name))

    def label(self, task: str, name: str) -> np.ndarray:
        """The label of an image at its own size. Raises UserError."""
        kind = self.kinds[task]
        if kind.per_pixel:
            classes = self.labels[task].classes if task in self.labels else None
            cell = MapCell(self._place(task, name), lambda: self._picture(task, name))
            return MapReader(task, kind, self.settings, classes)(cell)
        value = self._value(task, name)
        names = self.labels[task].names
        if value is None or value == -1:  # as the datasets on the Hub write "not known"
            return np.array(kind.unknown, kind.type)
        number = names.index(value) if isinstance(value, str) else value
        if not 0 <= number < len(names):
            raise UserError(
                f"{self._place(task, name)} is the class {number}, but {task} has the classes 0 to "
                f"{len(names) - 1}: correct it, or name all classes in {settings.FILE}."
            )
        return np.array(number, kind.type)

    def label_sizes(self, name: str) -> Mapping[str, Size]:
        """By task height and width of an image's maps, from their headers. Raises UserError."""
        found = {}
        for task in self.tasks:
            if self.kinds[task].per_pixel:
                with read_label.reading(self._place(task, name)):
                    found[task] = picture.size_of(self._picture(task, name))
        return found

    def places(self, task: str, name: str) -> tuple[str, str]:
        """Where a label and its image lie, for sentences about them."""
        return self._place(task, name), f"in the column {self.columns[IMAGE]}"

    def _place(self, task: str, name: str) -> str:
        row = self.rows[name]
        return f"'{row.path}', row {row.number}, column {self.columns[task]}"

    def _value(self, task: str, name: str) -> Any:
        row = self.rows[name]
        return row.table.column(self.columns[task])[row.number].as_py()

    def _picture(self, task: str, name: str) -> bytes:
        """The bytes of a picture. Raises UserError where there are none."""
        value = self._value(task, name)
        content = value.get("bytes") if isinstance(value, dict) else value
        if content:
            return content
        path = value.get("path") if isinstance(value, dict) else None
        what = f"names the file '{path}' without its bytes" if path else "is empty"
        raise UserError(
            f"{self._place(task, name)}, {what}: save the pictures themselves in the table, or "
            "take the row out."
        )


def recognises(root: Path) -> bool:
    """Whether a folder has Parquet files or what `datasets` saved."""
    if not root.is_dir() or (root / listing.IMAGES).is_dir():
        return False
    saved = (root / DICTIONARY).is_file() or (root / STATE).is_file()
    return saved or bool(_parquet(root))


def _parquet(root: Path) -> dict[str, list[Path]]:
    """Parquet files by the name of their split."""
    found: dict[str, list[Path]] = {}
    for path in sorted([*root.glob("*.parquet"), *root.glob("*/*.parquet")]):
        named = PARTS.fullmatch(path.name)
        inside = path.parent != root and path.parent.name.lower().startswith(
            tuple(word for begins in SPLITS.values() for word in begins)
        )
        split = path.parent.name if inside else named[1] if named else path.stem
        found.setdefault(split, []).append(path)
    return found


def files(root: Path, given: settings.FolderSettings, kinds: Kinds) -> TableFiles:
    """The files of the splits that are read. Raises UserError where they are not those."""
    if (root / DICTIONARY).is_file():
        names = _json(root / DICTIONARY, DICTIONARY_FORM)["splits"]
        found = {name: _saved(root / name) for name in names}
    elif (root / STATE).is_file():
        found = {"train": _saved(root)}
    else:
        found = _parquet(root)
        size = sum(path.stat().st_size for paths in found.values() for path in paths)
        if size > MOST_PARQUET:
            raise UserError(
                f"'{root}' has {size / 1e9:.0f} GB of Parquet files, which are held in memory: "
                "save them with datasets (load_dataset(...).save_to_disk), which is read from its "
                "place."
            )
    if len(found) == 1:
        return TableFiles(root, {"": tuple(next(iter(found.values())))}, ())
    chosen: dict[str, tuple[Path, ...]] = {}
    for split, begins in SPLITS.items():
        named = [one for word in begins for one in found if one.lower().startswith(word)]
        if not named or (len(named) > 1 and named[0].lower()[:3] == named[1].lower()[:3]):
            raise UserError(
                f"'{root}' has the splits {', '.join(found)}: give it one whose name begins with "
                f"{' or '.join(begins)}, and only one, or no splits at all."
            )
        chosen[split] = tuple(found[named[0]])
    used = {path for paths in chosen.values() for path in paths}
    left = [name for name, paths in found.items() if not used & set(paths)]
    return TableFiles(root, chosen, tuple(f"The split {name} is left out." for name in left))


def _json(path: Path, form: sc.CheckValue) -> Any:
    content = regular.read(path, regular.MB, UserError)
    try:
        found = sc.parse(content)
        form(found, "")
    except sc.FormatFault as fault:
        raise UserError(
            f"'{path}' is not as it should be, {fault}: save the data set again."
        ) from fault
    return found


def _saved(folder: Path) -> list[Path]:
    """The files of a split that `datasets` saved."""
    named = _json(folder / STATE, STATE_FORM)["_data_files"]
    paths = [folder / one["filename"] for one in named]
    for path in paths:
        regular.check(path, 2**50, UserError, "save the data set again")
    return paths


def look(found: TableFiles, given: settings.FolderSettings, kinds: Kinds) -> TableFolder:
    """The rows, columns and classes. Raises UserError where files do not fit together."""
    if "" not in found.files and {"test", "test_share"} & set(given.said):
        raise UserError(
            f"'{found.root / settings.FILE}' chooses test images, but the files have splits of "
            "their own: take test and test_share out."
        )
    first = found.paths[0]
    schema = _opened(first, None).schema
    columns = _columns(first, schema, given, kinds)
    used = sorted(set(columns.values()))
    parts = {
        split: TableRows([(path, _opened(path, used)) for path in paths])
        for split, paths in found.files.items()
    }
    rows = {
        f"{split} {index:06}".strip(): part[index]
        for split, part in parts.items()
        for index in range(len(part))
    }
    if len(rows) < 2:
        raise UserError(f"'{first}' has {len(rows)} rows: there must be at least two.")
    splits = _splits(found, parts, rows, given)
    classes = [task for task in columns if task in kinds and kinds[task].form in ("class", IMAGE)]
    maps = [task for task in columns if task in kinds and kinds[task].classes]
    own.check_sections(found.root, given, classes, maps)
    left = [f.name for f in schema if _is_picture(f.type) and f.name not in used]
    notes = (*found.notes, *(f"The column {name} is left out." for name in left))
    plain = TableFolder(found.root, given, kinds, {}, splits, columns, rows, notes)
    labels = {task: _labels(task, plain, list(parts.values()), schema) for task in classes}
    return TableFolder(found.root, given, kinds, labels, splits, columns, rows, notes)


def _splits(
    found: TableFiles,
    parts: Mapping[str, TableRows],
    rows: Mapping[str, Row],
    given: settings.FolderSettings,
) -> dict[str, tuple[str, ...]]:
    """Names by split: that of their files, else by lists or the share of `folder.json`."""
    if "" not in parts:
        chosen = {split: [n for n in rows if n.startswith(f"{split} ")] for split in parts}
        empty = next((split for split, names in chosen.items() if not names), None)
        if empty:
            raise UserError(f"'{found.files[empty][0]}' has no rows: give it some.")
        return {split: tuple(names) for split, names in chosen.items()}
    test = listing.drawn(rows, given.share) if given.test is None else set(given.test)
    for name in test - rows.keys():
        raise unknown(f"row in test of '{found.root / settings.FILE}'", name[:80], list(rows))
    if test >= rows.keys():
        raise UserError(f"'{found.root / settings.FILE}' leaves no row for training: name fewer.")
    return {
        "train": tuple(name for name in rows if name not in test),
        "test": tuple(name for name in rows if name in test),
    }


def _opened(path: Path, columns: list[str] | None) -> Any:
    """A file's table, of which only `columns` matter; None: its form alone matters."""
    arrow, parquet = _libraries(path)
    regular.check(path, 2**50, UserError)
    try:
        if path.suffix == ".parquet":
            table = parquet.read_schema(path).empty_table()
            if columns and set(columns) <= set(table.column_names):
                table = parquet.read_table(path, columns=columns)
        else:
            table = arrow.ipc.open_stream(arrow.memory_map(str(path))).read_all()
            table.validate(full=True)  # reading trusts what the file says about lengths
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be read as a table ({sc.first_line(error)}): save it again."
        ) from error
    for name in columns or ():
        if name not in table.column_names:
            raise unknown(f"column in '{path}'", name, table.column_names)
    return table


def _libraries(path: Path) -> tuple[Any, Any]:
    """pyarrow; UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"Reading '{path}' needs the package pyarrow: pip install 'moezoo[tables]'."
        ) from error
    return pyarrow, pyarrow.parquet


def _is_picture(form: Any) -> bool:
    """Whether a column holds pictures: bytes, or bytes and a path."""
    words = str(form)
    return words in ("binary", "large_binary") or words.startswith("struct<bytes: binary")


def _is_class(form: Any) -> bool:
    return str(form).startswith(("int", "uint")) or str(form) in ("string", "large_string")


def _columns(
    path: Path, schema: Any, given: settings.FolderSettings, kinds: Kinds
) -> dict[str, str]:
    """By task, and for the image, the column that holds it. Raises UserError."""
    forms = {field.name: field.type for field in schema}
    for task, column in given.columns.items():
        if task != IMAGE and task not in kinds:
            raise unknown(f"task in columns of {settings.FILE}", task, [IMAGE, *kinds])
        if column not in forms:
            raise unknown(f"column in '{path}'", column, list(forms))
    found: dict[str, str] = {}
    for task in (IMAGE, *kinds):
        fits = _is_picture if task == IMAGE or kinds[task].per_pixel else _is_class
        named = given.columns.get(task)
        choices = [named] if named else [task, *OTHER_NAMES.get(task, ())]
        column = next((one for one in choices if one in forms and fits(forms[one])), None)
        if column is not None:
            found[task] = column
        elif named or task in forms:
            wanted = "pictures" if fits is _is_picture else "numbers or names of classes"
            raise UserError(
                f"'{path}' has {forms[named or task]} in the column {named or task}, but {task} "
                f"is read from {wanted}: correct it, or name another column in {settings.FILE}."
            )
    if IMAGE not in found:
        raise UserError(
            f"'{path}' has no column {IMAGE} of pictures, only {', '.join(forms)}: say in "
            f'{settings.FILE} which it is, "columns": {{"{IMAGE}": NAME}}.'
        )
    if len(found) == 1:
        raise UserError(
            f"'{path}' has images, but no column of labels among {', '.join(forms)}: say in "
            f'{settings.FILE} which it is, "columns": {{"semseg": NAME}}.'
        )
    return found


def _labels(task: str, folder: TableFolder, parts: Sequence[TableRows], schema: Any) -> Labels:
    """Named by `folder.json`, else by the table, else by the words or numbers that occur."""
    column, given = folder.columns[task], folder.settings
    where = f"The column {column} of '{folder.rows[folder.names[0]].path}'"
    named = given.classes.get(task) or _named(schema, column)
    if folder.kinds[task].per_pixel:
        if named is None:
            most = own.largest(lambda n: folder.label(task, n), folder.kinds[task], folder.names)
            named = tuple(f"class {index}" for index in range(most + 1))
        return own.classes_of(task, named, where, given)
    occur = {value for part in parts for value in part.values(column)} - {None, -1}
    words = sorted(value for value in occur if isinstance(value, str))
    if named and (odd := [word for word in words if word not in named]):
        raise unknown(f"class in the column {column}", odd[0], list(named))
    if named is None:
        numbers = range(max((v for v in occur if isinstance(v, int)), default=-1) + 1)
        named = tuple(words) or tuple(f"class {index}" for index in numbers)
    return own.classes_of(task, named, where, given)


def _named(schema: Any, column: str) -> tuple[str, ...] | None:
    """The names of a column's classes by what `datasets` notes in a file; None without."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        names = noted["info"]["features"][column]["names"]
        settings.NAMES(names, "names")
    except (KeyError, TypeError, ValueError):  # other programs' tables
        return None
    return tuple(names)
