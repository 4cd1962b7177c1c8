"""Whether an example is what its source declares, before anything moves, pads or stacks it."""

from __future__ import annotations

import numpy as np

from moezoo.data import picture
from moezoo.data.source import Info, SourceExample
from moezoo.errors import UserError
from moezoo.label import LabelKind

ADVICE = "correct the data set"


def fit(example: SourceExample, info: Info) -> SourceExample:
    """The example with an image uint8 [H,W,3] by the rules of `data.picture` and labels of the
    types of their kinds; examples without an image (clips) as they are.

    Raises UserError for images without a known range, for labels whose shape differs from their
    image's, and for numbers that their kind cannot have.
    """
    if "image" not in example:
        return example
    image = np.asarray(example["image"])
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        try:
            image = picture.eight_bits(image)
        except picture.PictureError as error:
            raise UserError(f"An image of {info.name} {error}: {ADVICE}.") from error
    labels = {}
    for name in (*info.tasks, *info.extras):
        if name not in example:
            continue  # only the labels asked for must be there
        kind, value = info.kinds[name], np.asarray(example[name])
        _check_shape(name, value, kind, image.shape[:2], info)
        labels[name] = _typed(name, value, kind, info)
        _check_classes(name, labels[name], kind, info)
    return {**example, "image": image, **labels}


def _check_shape(
    name: str, value: np.ndarray, kind: LabelKind, size: tuple[int, ...], info: Info
) -> None:
    wanted = kind.shape((size[0], size[1]))
    if kind.form != "rows" and value.shape != wanted:
        raise UserError(
            f"The label {name} of {info.name} has the shape {value.shape}, but its image of "
            f"{size[0]} x {size[1]} needs {wanted}: {ADVICE}."
        )


def _typed(name: str, value: np.ndarray, kind: LabelKind, info: Info) -> np.ndarray:
    """Raise UserError for numbers that the kind's type cannot hold."""
    if value.dtype == kind.type or kind.form == "rows":
        return value
    with np.errstate(over="ignore", invalid="ignore"):
        made = value.astype(kind.type) if value.dtype.kind in "biuf" else None
    if made is None or (kind.classes and not np.array_equal(made, value)):
        raise UserError(
            f"The label {name} of {info.name} has numbers of the type {value.dtype} that "
            f"{kind.type} cannot hold: {ADVICE}, or declare another dtype or `unknown`."
        )
    return made


def _check_classes(name: str, value: np.ndarray, kind: LabelKind, info: Info) -> None:
    if not kind.classes or not (kind.form == "binary" or name in info.labels):
        return
    count = 2 if kind.form == "binary" else info.labels[name].classes
    wrong = (value >= count) & (value != kind.unknown)
    if value.dtype.kind == "i":
        wrong |= (value < 0) & (value != kind.unknown)
    if wrong.any():
        raise UserError(
            f"The label {name} of {info.name} has the class {value[wrong].flat[0]}, but classes "
            f"are 0 to {count - 1} ({kind.unknown:g} unlabelled): {ADVICE}."
        )
