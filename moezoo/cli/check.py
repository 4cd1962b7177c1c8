"""Look through a folder of your own images and labels: counts, wrong files, a picture.

Example: moezoo check rooms_of_mine --out sheet.png
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from moezoo.command import Positional, parse
from moezoo.errors import UserError

if TYPE_CHECKING:
    from moezoo.domains.images.data.folder.survey import FolderSurvey
    from moezoo.train.console import Console

MOST_SAID, MOST_CLASSES, MOST_SIZES = 20, 40, 3
QUOTED = re.compile(r"'[^']*'")


@dataclass(frozen=True)
class CheckCommand:
    """Look through a folder of your own images and labels before training.

    Example: moezoo check rooms_of_mine --out sheet.png
    """

    folder: Annotated[Path, Positional]
    """Folder with `images` and, beside it, one folder of labels for each task; or with COCO's
    annotations, Parquet files, or what the package datasets saved."""
    out: Path = Path("sheet.png")
    """Picture to write: some images beside all of their labels."""
    count: int = 4
    """Images in the picture."""
    resolution: tuple[int, int] = (64, 64)
    """Height and width at which you want to train (data.resolution)."""


def main(words: list[str], prog: str) -> int:
    """Decode everything, say what there is, draw some of it; UserError for wrong files."""
    given = parse(CheckCommand, words, prog=prog)
    from moezoo.domains.images.data.folder import survey
    from moezoo.files import check_file
    from moezoo.train import pictures
    from moezoo.train.console import Console

    _check(given)
    check_file(given.out)
    console = Console()
    found = survey.survey(given.folder)
    _say_faults(found, console)
    _say_files(found, console)
    _say_classes(found, console)
    for note in survey.notes(found, given.resolution):
        console.say(f"note: {note}")
    pictures.predictions(given.out, survey.sheet(found, given.count))
    console.say(f"{given.out}: some images beside their labels: do they fit?")
    console.say(f"train: {_command(found, given)}")
    return 0


def _command(found: FolderSurvey, given: CheckCommand) -> str:
    """What trains on the folder: all of its maps at once, or else the class of images."""
    folder = found.folder
    maps = [task for task in folder.tasks if folder.kinds[task].per_pixel]
    words = ["moezoo", "train", f"rooms/{'m3vit' if maps else 'vmoe'}_tiny", "--name", "mine"]
    words += ["--data.name", "folder", "--data.archive", str(given.folder)]
    words += ["--data.resolution", *map(str, given.resolution), "--tasks", *(maps or folder.tasks)]
    return shlex.join(words)


def _check(given: CheckCommand) -> None:
    if given.out.resolve().is_relative_to(given.folder.resolve()):
        raise UserError(f"--out is {given.out}, inside the folder to be checked: name one outside.")
    if not 1 <= given.count <= 32:
        raise UserError(f"--count is {given.count}; it must be from 1 to 32.")
    if not all(8 <= side <= 4096 for side in given.resolution):
        height, width = given.resolution
        raise UserError(f"--resolution is {height} {width}; a side must be from 8 to 4096.")


def _say_faults(found: FolderSurvey, console: Console) -> None:
    """UserError where a file is wrong; of several, the sentences stand before it."""
    if not found.faults:
        return
    if len(found.faults) == 1:
        raise UserError(found.faults[0])
    alike: dict[str, list[str]] = {}
    for fault in sorted(found.faults):  # what differs in names of files alone is said once
        alike.setdefault(QUOTED.sub("", fault), []).append(fault)
    for fault, *others in list(alike.values())[:MOST_SAID]:
        console.say(fault + (f" So it is with {len(others):,} more." if others else ""))
    first = f"the first {MOST_SAID} kinds are above" if len(alike) > MOST_SAID else "see above"
    raise UserError(
        f"{len(found.faults):,} files of '{found.folder.root}' are wrong ({first}): correct "
        "them and check again."
    )


def _say_files(found: FolderSurvey, console: Console) -> None:
    folder = found.folder
    sizes = [f"{h} x {w} ({n:,})" for (h, w), n in found.sizes.most_common(MOST_SIZES)]
    more = len(found.sizes) - len(sizes)
    splits = ", ".join(f"{len(names):,} {split}" for split, names in folder.splits.items())
    total = len(folder.names)
    rows = [("images", total, f"{', '.join(sizes)}{f' and {more} more sizes' if more else ''}")]
    for task, counts in found.counts.items():
        without = f", {100 * counts.unknown:.1f} % without label" if counts.unknown else ""
        if folder.kinds[task].form == "value":
            what = f"{counts.low:.3g} to {counts.high:.3g}"
            what += " metres" if task == "depth" else ""
        elif task in folder.labels:
            what = f"{folder.labels[task].classes} classes"
        else:
            what = "unit vectors" if folder.kinds[task].form == "vector" else "yes or no"
        rows.append((task, total, f"{what}{without}"))
    title = f"{folder.root}: {total:,} images, {splits}"
    console.table(title, ("folder", "files", "what"), rows)


def _say_classes(found: FolderSurvey, console: Console) -> None:
    """Each class's share of the labelled pixels, by split, and how many images have it."""
    import numpy as np

    for task, counts in found.counts.items():
        if not counts.classes:
            continue
        labels = found.folder.labels.get(task)
        names = labels.names if labels else ("no", "yes")
        shares = [
            100 * pixels / max(pixels.sum(), 1)
            for split in found.folder.splits
            for pixels in [counts.classes[split]]
        ]
        images = np.sum(list(counts.images.values()), axis=0)
        rows = [
            (index, name, *(f"{share[index]:.2f}" for share in shares), int(images[index]))
            for index, name in enumerate(names[:MOST_CLASSES])
        ]
        header = ("class", "name", *(f"% {split}" for split in found.folder.splits), "images")
        console.table(task, header, rows)
        if len(names) > MOST_CLASSES:
            console.say(f"and {len(names) - MOST_CLASSES} more classes")
