"""`folder.json`: what the files of a folder cannot say themselves.

    {"classes": {"semseg": ["soil", "crop"]}, "depth": {"unit": "mm"}, "test_share": 0.2}

classes      names by task, in the order of the indices; without: as many as the largest index says
colours      of the classes by task, [red, green, blue] each
unlabelled   by task, the number in its pictures that means "no label", besides 255
depth        unit: "mm", "cm", "m" or metres per number; range: [low, high] in metres, see `labels`
annotations  "instances" or "panoptic", where there are both (`coco`)
columns      by task, and for "image", the column of a table that holds it (`tables`)
test         the names of the test images;   test_share: or their share, chosen by their names
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moezoo import regular
from moezoo import schema_check as sc
from moezoo.errors import UserError, unknown

FILE = "folder.json"
UNITS = {"mm": 1e-3, "cm": 1e-2, "m": 1.0}
MOST_CLASSES = 255  # 255 itself means unlabelled
SHARE = 0.2
RANGE = (0.05, 200.0)

NAMES = sc.list_of(sc.line(200), 1, MOST_CLASSES)
_COLOURS = sc.list_of(sc.list_of(sc.whole(0, 255), 3, 3), 1, MOST_CLASSES)
_UNIT = sc.either(sc.number(1e-6, 1e3), sc.one_of(*UNITS))
_DEPTH = sc.table({"unit": _UNIT, "range": sc.list_of(sc.number(0), 2, 2)}, others=sc.refused)
FIELDS = {
    "classes": sc.map_of(NAMES),
    "colours": sc.map_of(_COLOURS),
    "unlabelled": sc.map_of(sc.whole(-1, 65535)),
    "depth": _DEPTH,
    "annotations": sc.one_of("instances", "panoptic"),
    "columns": sc.map_of(sc.line(200)),
    "test": sc.list_of(sc.text(1024), 1),
    "test_share": sc.number(0.001, 0.999),
}
FORM = sc.table(FIELDS, others=sc.refused)


@dataclass(frozen=True)
class FolderSettings:
    """What `folder.json` says; the defaults where there is none.

    unit: metres per number of a depth map, None where it is not given.   depths: the `range` of
    depth.   test: names, None where a share is taken.   said: the names that the file has.
    """

    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    colours: Mapping[str, list[list[int]]] = field(default_factory=dict)
    unlabelled: Mapping[str, int] = field(default_factory=dict)
    unit: float | None = None
    depths: tuple[float, float] = RANGE
    annotations: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    test: tuple[str, ...] | None = None
    share: float = SHARE
    said: tuple[str, ...] = ()


def read(root: Path) -> FolderSettings:
    """The settings of a folder. Raises UserError for a file that is not of this form."""
    path = root / FILE
    if not path.exists() and not path.is_symlink():
        return FolderSettings()
    content = regular.read(path, regular.MB, UserError)
    try:
        found = sc.parse(content)
        if isinstance(found, dict) and (odd := [name for name in found if name not in FIELDS]):
            raise unknown(f"name in '{path}'", sc.shortened(odd[0], sc.SHOWN), list(FIELDS))
        FORM(found, "")
    except sc.FormatFault as fault:
        raise UserError(f"'{path}' is not as it should be, {fault}: correct the file.") from fault
    return _settings(found, path)


def _settings(found: Mapping[str, Any], path: Path) -> FolderSettings:
    if "test" in found and "test_share" in found:
        raise UserError(f"'{path}' has both test and test_share: keep one of them.")
    for task, names in found.get("classes", {}).items():
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise UserError(f"'{path}' has the class '{twice}' of {task} twice: rename one.")
    depth = found.get("depth", {})
    unit = depth.get("unit")
    low, high = depth.get("range", RANGE)
    if low >= high:
        raise UserError(f"'{path}' has depth.range {low:g} to {high:g}: give the lower end first.")
    return FolderSettings(
        classes={task: tuple(names) for task, names in found.get("classes", {}).items()},
        colours=found.get("colours", {}),
        unlabelled=found.get("unlabelled", {}),
        unit=UNITS[unit] if isinstance(unit, str) else unit,
        depths=(float(low), float(high)),
        annotations=found.get("annotations"),
        columns=found.get("columns", {}),
        test=tuple(found["test"]) if "test" in found else None,
        share=found.get("test_share", SHARE),
        said=tuple(found),
    )


def check_meant(root: Path, given: FolderSettings, meant: tuple[str, ...]) -> None:
    """UserError for what the file says and this folder's layout has no use for."""
    for name in given.said:
        if name not in meant:
            raise UserError(
                f"'{root / FILE}' has {name}, which means nothing for the kind of data in "
                f"'{root}': take it out; {', '.join(meant)} are read."
            )
