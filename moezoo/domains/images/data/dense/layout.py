"""What an archive is: where its lists and files lie and how one example is read."""

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
        """The file of one example; the first folder's when there is none."""
        paths = [root / folder / f"{name}{self.suffix}" for folder in self.folders]
        return next((p for p in paths if p.is_file()), paths[0])


@dataclass(frozen=True)
class ArchiveLayout:
    """An archive in the form that InvPT, TaskPrompter and their successors read.

    name      of the data set in configurations; `title` is what the literature calls it
    folder    the archive's own name, as unpacked
    lists     file of the ids of each of our splits, relative to the archive
    counts    how many ids the benchmark has
    kinds     the files of an example by what they hold
    maps      the tasks it has labels for, and extras, with the kinds of their labels
    labels    names and colours of the classes
    read      (archive, id) -> example
    size      height and width of every picture, where the benchmark fixes them
    extras    what scores read besides: `regions`, where an example has them; no tasks
    foreground_only  tasks whose map counts as unlabelled where it shows nothing but background
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
