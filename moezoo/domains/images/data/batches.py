"""Batches of images and their labels: stacking, padding, normalising."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moezoo.data import pipeline
from moezoo.data.fit import ADVICE
from moezoo.data.source import Batch, Info, Source, SourceExample
from moezoo.domains.images.data.padding import MEAN_COLOUR, pad, pad_label, without_foreground
from moezoo.domains.images.data.transforms import normalise, of_source
from moezoo.errors import UserError


def collate(examples: Sequence[SourceExample], tasks: Sequence[str], info: Info) -> Batch:
    """Stack examples: `image` float32 [B,H,W,3] normalised, and the labels of `tasks`.

    Smaller examples are padded to the source's resolution: images with the mean colour, labels
    with unlabelled pixels. Raises UserError for larger ones and for examples without a label.
    """
    size = info.resolution

    def label(name: str, example: SourceExample) -> np.ndarray:
        if name not in example:
            raise UserError(f"An example of {info.name} has no label {name}: {ADVICE}.")
        value = pad_label(info.kinds[name], example[name], size)
        return without_foreground(value) if name in info.foreground_only else value

    images = [e["image"] for e in examples]
    if all(image.shape[:2] == size for image in images):
        image_BHW3 = normalise(np.stack(images))
    else:
        image_BHW3 = np.stack([pad(normalise(image), size, MEAN_COLOUR) for image in images])
    return {"image": image_BHW3} | {n: np.stack([label(n, e) for e in examples]) for n in tasks}


def training(
    source: Source,
    size: int,
    seed: int,
    tasks: Sequence[str] | None = None,
    augment: Sequence[str] = (),
) -> pipeline.Training:
    """Training batches of `size` images (all hosts together), varied by the named `augment`s."""
    return pipeline.Training(source, size, seed, tasks, augment, of_source, collate)


def evaluation(
    source: Source,
    size: int,
    tasks: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every image once, in order, see `pipeline.evaluation`."""
    return pipeline.evaluation(source, size, tasks, rows, collate)
