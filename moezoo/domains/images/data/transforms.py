"""Pure functions (example, rng) -> example.

They work on uint8 images and never change their input. `AUGMENTATIONS` lists the augmentations by
name; `normalise` turns a batch of images into what models read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from moezoo.data.source import Info, Kinds, SourceExample, Transform
from moezoo.domains.images.data import colour, geometry
from moezoo.errors import unknown

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet
STD = np.array([0.229, 0.224, 0.225], np.float32)


def flip(example: SourceExample, rng: np.random.Generator, kinds: Kinds) -> SourceExample:
    """Mirror left and right with probability 1/2; the x component of vectors changes sign."""
    return mirror(example, kinds) if rng.random() < 0.5 else example


def mirror(example: SourceExample, kinds: Kinds) -> SourceExample:
    """Swap left and right."""
    maps = geometry.maps_of(example, kinds)
    mirrored = example | {name: kinds[name].mirrored(example[name]) for name in maps}
    mirrored["image"] = example["image"][:, ::-1]
    if "intrinsics" in example:
        fx, fy, cx, cy = example["intrinsics"]
        width = example["image"].shape[1]
        mirrored["intrinsics"] = np.array([fx, fy, width - 1 - cx, cy], np.float32)
    return mirrored


_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def photometric(example: SourceExample, rng: np.random.Generator) -> SourceExample:
    """Random brightness, contrast, saturation and white balance, as one affine map of colours."""
    brightness, contrast, saturation = rng.uniform(0.75, 1.25, 3)
    tint = rng.uniform(0.9, 1.1, 3)
    matrix = saturation * np.eye(3) + (1 - saturation) * _GREY[:, None]
    matrix = (matrix * tint * brightness * contrast).astype(np.float32)
    shift = np.float32(128 * (1 - contrast) * brightness)
    image = example["image"].reshape(-1, 3).astype(np.float32) @ matrix + shift
    image = np.clip(image, 0, 255, out=image).astype(np.uint8).reshape(example["image"].shape)
    return example | {"image": image}


def zoom(example: SourceExample, rng: np.random.Generator, kinds: Kinds) -> SourceExample:
    """Enlarge by 1, 1.2 or 1.5, crop a random window of the old size; depth is divided by it.

    This is the NYUD-v2 recipe of M3ViT: dividing depth keeps the focal length, and normals are
    unchanged. Images are sampled bilinearly, labels at the nearest pixel.
    """
    factor = float(rng.choice([1.0, 1.2, 1.5]))
    top, left = rng.random(2)
    if factor == 1.0:
        return example
    height, width = example["image"].shape[:2]
    rows = _window(height, factor, top)
    columns = _window(width, factor, left)
    near = np.ix_(np.rint(rows).astype(int), np.rint(columns).astype(int))
    maps = geometry.maps_of(example, kinds)
    zoomed = {name: kinds[name].scaled(example[name][near], factor) for name in maps}
    return {**example, **zoomed, "image": _bilinear(example["image"], rows, columns)}


def _window(size: int, factor: float, place: float) -> np.ndarray:
    """Old coordinates of the new pixels' centres along one axis."""
    start = place * (size - size / factor)
    return np.clip(start + (np.arange(size) + 0.5) / factor - 0.5, 0, size - 1)


def _bilinear(image_HW3: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    r, c = np.floor(rows).astype(int), np.floor(columns).astype(int)
    r1, c1 = np.minimum(r + 1, image_HW3.shape[0] - 1), np.minimum(c + 1, image_HW3.shape[1] - 1)
    fr, fc = (rows - r)[:, None, None], (columns - c)[None, :, None]
    lines = image_HW3[r] * (1 - fr) + image_HW3[r1] * fr
    mixed = lines[:, c] * (1 - fc) + lines[:, c1] * fc
    return np.rint(mixed).astype(np.uint8)


def normalise(image: np.ndarray) -> np.ndarray:
    """uint8 [...,3] to float32 with the mean and deviation of ImageNet."""
    width = image.shape[-2]  # whole rows at once: an inner loop over three channels is slow
    rows = image.reshape(*image.shape[:-2], width * 3)
    ready = np.multiply(rows, np.tile(1 / (255 * STD), width), dtype=np.float32)
    ready -= np.tile(MEAN / STD, width)
    return ready.reshape(image.shape)


def denormalise(image: np.ndarray) -> np.ndarray:
    """The inverse of `normalise`, rounded to uint8."""
    return np.rint(np.clip(image * STD + MEAN, 0, 1) * 255).astype(np.uint8)


MakeTransform = Callable[[tuple[int, int], Kinds], Transform]
# Built for the resolution of batches and the declared kinds of label. After "scale" images have any
# size, after "crop" at most that of batches; the others change no size.
AUGMENTATIONS: dict[str, MakeTransform] = {
    "flip": lambda size, kinds: partial(flip, kinds=kinds),
    "photometric": lambda size, kinds: photometric,
    "zoom": lambda size, kinds: partial(zoom, kinds=kinds),
    "distort": lambda size, kinds: colour.distort,
    "scale": lambda size, kinds: partial(geometry.scale, kinds=kinds),
    "crop": lambda size, kinds: partial(geometry.crop, size=size, kinds=kinds),
}


def check(name: str) -> None:
    """Raise UserError if no augmentation has this name."""
    if name not in AUGMENTATIONS:
        raise unknown("augmentation", name, sorted(AUGMENTATIONS))


def named(name: str, resolution: tuple[int, int], kinds: Kinds) -> Transform:
    """The augmentation with this name; UserError for an unknown one."""
    check(name)
    return AUGMENTATIONS[name](resolution, kinds)


def sequence(
    names: Sequence[str], resolution: tuple[int, int], kinds: Kinds
) -> tuple[Transform, ...]:
    """The named augmentations in order; a "crop" right after "scale" is taken in one step."""
    result: list[Transform] = []
    for before, name in zip((None, *names), names, strict=False):
        if (before, name) == ("scale", "crop"):
            result[-1] = partial(geometry.scale_and_crop, size=resolution, kinds=kinds)
        else:
            result.append(named(name, resolution, kinds))
    return tuple(result)


def of_source(names: Sequence[str], info: Info) -> tuple[Transform, ...]:
    """`sequence` for the examples of a source."""
    return sequence(names, info.resolution, info.kinds)
