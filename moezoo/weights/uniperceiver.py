"""A checkpoint of Uni-Perceiver-MoE's published code: whether it fits a model, and its arrays.

Sizes are told from names and shapes alone, before an array is read and before data is made. The
whole encoder is read: patches, words, positions, norms, experts with their gates, the map in front
of the comparison. What is left behind by name: temperatures and queues of training, gates that are
never asked, the frames of videos but the first. A file that was trained with prompts has arrays
that no line of the table knows, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moezoo.errors import UserError
from moezoo.ops.interpolate import bilinear, resize
from moezoo.schema_check import first_line, shortened
from moezoo.weights import files, uniperceiver_names
from moezoo.weights.files import OpenWeights
from moezoo.weights.uniperceiver_names import (
    BEYOND,
    NORMS,
    TABLE,
    activated,
    axes,
    from_uni_perceiver,
)
from moezoo.weights.vit import idle, named

Shape = tuple[int, ...]
IMAGES, TEXTS = "tokens/image_positions", "tokens/text_positions"
SECOND = "/mlp/level2/"  # of gates that are not asked where a model's MLPs decide once
READ = (
    "token_embed.embeddings", "video_embed.embeddings", "fused_encoder.layers.",
    "loss_prepare.ln_post", "loss_prepare.proj",
)  # fmt: skip
EPSILON = 1e-5  # of PyTorch's layers, which no array shows


class EncoderSource(NamedTuple):
    """A checkpoint whose arrays are not read yet.

    shapes: by our paths. beyond: names of what only training needs. unknown: names that no line of
    the table has. gate: "gelu" where an activation stands in its gates, else "none".
    """

    path: Path
    weights: OpenWeights
    shapes: Mapping[str, Shape]
    beyond: tuple[str, ...]
    unknown: tuple[str, ...]
    gate: str


def is_uni_perceiver(path: Path) -> bool:
    """Whether a file's arrays are those of Uni-Perceiver's code."""
    return path.is_file() and uniperceiver_names.is_uni_perceiver(files.open_file(path).stored)


def source(path: Path) -> EncoderSource:
    """What a file holds, from names and shapes alone.

    Raises UserError where it cannot be read or holds another model.
    """
    weights = files.open_file(path)
    _check_norms(weights)
    plain = {name: name.removeprefix("module.") for name in weights.stored}
    beyond = tuple(name for name in plain if BEYOND.fullmatch(plain[name]))
    own = [name for name in plain if name not in set(beyond)]
    for name in own:
        files.float_type(weights.stored[name], name, path)
        _check_axes(path, plain[name], weights.stored[name].shape)
    stand_ins = {name: np.broadcast_to(np.int8(0), weights.stored[name].shape) for name in own}
    found = _translated(path, stand_ins)
    shapes = {name: tuple(array.shape) for name, array in found.arrays.items()}
    gate = "gelu" if activated(weights.stored) else "none"
    return EncoderSource(path, weights, shapes, beyond, tuple(found.unknown), gate)


def _check_axes(path: Path, name: str, shape: Shape) -> None:
    """UserError for arrays that sums and products would take although they are others."""
    if name.startswith(READ) and (len(shape) != axes(name) or 0 in shape):
        raise UserError(
            f"'{path}' has {shortened(name, 200)} of {list(shape)}, where Uni-Perceiver's code has "
            f"{axes(name)} axes, none of them 0: take another file."
        )


def _check_norms(weights: OpenWeights) -> None:
    """UserError where words and images have norms of their own; there is one here."""
    named = {name.removeprefix("module."): name for name in weights.stored}
    for kind in ("weight", "bias"):
        own, other = (f"{name}.{kind}" for name in NORMS)
        if not {own, other} <= set(named):
            continue
        first, second = (files.finite(weights, named[name]) for name in (own, other))
        if not np.array_equal(first, second):
            raise UserError(
                f"'{weights.path}' was trained without SHARE_LAYERNORM: {other} is another "
                f"than {own}, where models here have one norm; take another file."
            )


def _translated(path: Path, state: Mapping[str, np.ndarray]) -> Any:
    try:
        return from_uni_perceiver(state)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"'{path}' is no checkpoint of Uni-Perceiver's code as it is read here: "
            f"{first_line(error)}; take another file."
        ) from error


def options(given: EncoderSource) -> dict[str, Any]:
    """Fields of a model's configuration with which it has the file's sizes and form."""
    shapes, block = given.shapes, "encoder/blocks/0"
    width = shapes.get("tokens/patch_embed/bias", (1,))[-1]
    blocks = {path.split("/")[2] for path in shapes if path.startswith("encoder/blocks/")}
    mixed = {path.split("/")[2] for path in shapes if path.endswith("/qkv/experts/kernel")}
    experts = shapes.get(f"{block}/attn/qkv/experts/kernel")
    hidden = shapes.get(f"{block}/mlp/fc1/{'experts/' if experts else ''}kernel", (0, 0))[-1]
    made: dict[str, Any] = {"width": width, "depth": len(blocks), "stem": "patch"}
    made |= {"patch": shapes.get("tokens/patch_embed/kernel", (1,))[0]}
    made |= {"mlp_ratio": hidden / width, "level": "attribute" if experts else "dense"}
    if experts:
        made |= {"experts": experts[0], "location": _location(mixed, len(blocks))}
        made |= {"gate_activation": given.gate}
    made |= {"vocabulary": shapes.get(TABLE, (0,))[0], "text_length": shapes.get(TEXTS, (0,))[0]}
    made |= {"token_norm": "layer" if "tokens/norm/scale" in shapes else "none"}
    made |= {"projection": "linear" if "encoder/projection/kernel" in shapes else "none"}
    return made | {"epsilon": EPSILON}


def _location(mixed: set[str], depth: int) -> str:
    """Which blocks have experts, in the published names."""
    steps = {"all": 1, "odd": 2, "four": 4}
    named = (name for name, step in steps.items() if mixed == set(map(str, range(0, depth, step))))
    return next(named, "all")


def misfits(
    given: EncoderSource,
    wanted: Mapping[str, Shape],
    without: Sequence[str] = (),
) -> list[str]:
    """Why the file cannot be a model's, in clauses; nothing where all of it can.

    wanted: the shapes of the model's parameters by path. without: patterns of paths and names that
    are left out on purpose.
    """
    found = [
        f"it has {shortened(name, 200)}, for which there is no place"
        for name in given.unknown
        if not named(name, without)
    ] + idle(without, [*given.shapes, *given.unknown])
    for path, shape in given.shapes.items():
        if named(path, without) or (SECOND in path and path not in wanted):
            continue
        if path not in wanted:
            found.append(f"it has {shortened(path, 200)}, which the model lacks")
        elif path == IMAGES and round(shape[0] ** 0.5) ** 2 != shape[0]:
            found.append(f"its positions of {shape[0]} patches are no square grid")
        elif not _fits(path, shape, wanted[path]):
            found.append(f"its {path} is {list(shape)}, the model's {list(wanted[path])}")
    begun = (path for path in wanted if path.startswith(("tokens/", "encoder/")))
    missing = [path for path in begun if path not in given.shapes and not named(path, without)]
    return found + [f"it lacks {path}" for path in missing]


def _fits(path: str, shape: Shape, wanted: Shape) -> bool:
    if path == IMAGES:  # resized to another grid
        return shape[1:] == wanted[1:]
    if path == TEXTS:  # shorter texts have the first ones
        return shape[1:] == wanted[1:] and shape[0] >= wanted[0]
    return shape == wanted


def read(
    given: EncoderSource,
    wanted: Mapping[str, Shape],
    grid: tuple[int, int],
    without: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """The model's parameters that the file has, by our paths, float32.

    grid: patches of the model's images in height and width, to which positions are resized
    bilinearly, as the published code does. Raises UserError for damage and for values that are not
    finite.
    """
    skipped = {*given.beyond, *given.unknown}
    names = [n for n in given.weights.stored if not skipped & {n, n.removeprefix("module.")}]
    found = _translated(given.path, {name: files.finite(given.weights, name) for name in names})
    taken = {p: a for p, a in found.arrays.items() if p in wanted and not named(p, without)}
    if IMAGES in taken:
        side = round(len(taken[IMAGES]) ** 0.5)
        square = jnp.asarray(taken[IMAGES]).reshape(1, side, side, -1)
        taken[IMAGES] = np.asarray(resize(square, grid, bilinear)).reshape(grid[0] * grid[1], -1)
    if TEXTS in taken:
        taken[TEXTS] = taken[TEXTS][: wanted[TEXTS][0]]
    return taken
