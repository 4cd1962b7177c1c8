"""What an archive is: where its lists and files are and how one example is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moezoo.data.source import Labels, SourceExample
from moezoo.label import LabelKind

SPLITS = ("train", "test")


@dataclass(frozen=True)
class FileKind:
    """One file per example: `{folder}/{id}{suffix}` in the first of the folders that has it."""

    folders: tuple[str, ...]
    suffix: str

    def path(self, root: Path, name: str) -> Path:
        """The file of one example; the first folder's if there is none."""
        paths = [root / folder / f"{name}{self.suffix}" for folder in self.folders]
        return next((p for p in paths if p.is_file()), paths[0])


@dataclass(frozen=True)
class ArchiveLayout:
    """An archive in the form that InvPT, TaskPrompter and their successors read.

    name      of the data set in configurations; `title` is its name in the literature
    folder    the archive's own name, as unpacked
    lists     the file with the ids of each of our splits, relative to the archive
    counts    how many ids the benchmark has
    kinds     the files of an example by what they contain
    maps      the tasks it has labels for, and extras, with the kinds of their labels
    labels    names and colours of the classes
    read      (archive, id) -> example
    size      height and width of every picture, if the benchmark fixes them
    extras    what scores also read: `regions`, if an example has them; these are not tasks
    foreground_only  tasks whose map counts as unlabelled if it shows nothing but background
    """

    name: str
    title: str
    folder: str
    lists: Mapping[str, str]
    counts: Mapping[str, int]
    kinds: Mapping[str, FileKind]
    maps: Mapping[str, LabelKind]
    labels: Mapping[str, Labels]
    read: Callable[[Path, str], SourceExample]
    size: tuple[int, int] | None = None
    foreground_only: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks it has labels for."""
        return tuple(name for name in self.maps if name not in self.extras)
