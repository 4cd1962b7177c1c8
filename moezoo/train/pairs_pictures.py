"""Pictures of a run on pairs: captions beside images, and the images that a text finds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moezoo.train.pictures import RIGHT, WRONG, empty_figure, figure_of, save

BEST = 5  # images that are shown of what a text finds
LINE = 84  # letters


class Told(NamedTuple):
    """An image uint8 [H, W, 3], its caption, the model's, and the kind of room it says, if any."""

    image: np.ndarray
    caption: str
    given: str
    scene: str | None


class Find(NamedTuple):
    """A text, and the images most similar to it with whether they fit."""

    text: str
    images: Sequence[tuple[np.ndarray, bool]]


def captions(path: Path, told: Sequence[Told]) -> None:
    """One row per image: what its caption says, and what the model says."""
    figure, axes = figure_of(len(told), 2, (8.0, 1.75 * len(told) + 0.2), (1.0, 3.4))
    for (left, right), one in zip(axes, told, strict=True):
        left.imshow(one.image, interpolation="nearest")
        lines = ["caption:", *textwrap.wrap(one.caption, LINE)]
        lines += ["", "the model:", *textwrap.wrap(one.given, LINE)]
        if one.scene is not None:
            lines += ["", f"kind of room: {one.scene}"]
        right.text(0, 1, "\n".join(lines), va="top", fontsize=8, family="monospace")
        for axis in (left, right):
            axis.set_axis_off()
    save(figure, path)


def finds(path: Path, found: Sequence[Find]) -> None:
    """One row per text: the most similar images, framed green where they fit and red elsewhere."""
    columns = max(len(one.images) for one in found)
    figure = empty_figure((1.6 * columns, 2.0 * len(found)))
    # A figure per text: as a title of the first image it would push the others away.
    for part, one in zip(figure.subfigures(len(found), squeeze=False)[:, 0], found, strict=True):
        row = part.subplots(1, columns, squeeze=False)[0]
        for axis in row[len(one.images) :]:
            axis.set_axis_off()
        for axis, (image, fits) in zip(row, one.images, strict=False):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_edgecolor(RIGHT if fits else WRONG)
                side.set_linewidth(3)
        text = "\n".join(textwrap.wrap(one.text, 24 * columns))
        part.suptitle(text, fontsize=8, x=0.01, ha="left")
    save(figure, path)
