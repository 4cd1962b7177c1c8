"""A trained model in a folder of its own, apart from the run that it comes from.

    config.json          the run's configuration
    weights.safetensors  parameters and statistics, by path
    model.json           classes of its tasks, step, origin, scores, checksums of the other two

Everything that reads a run's newest checkpoint reads such a folder, too. Those that come with the
package lie in `moezoo/zoo/`, by the names of their configurations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moezoo import regular, storage
from moezoo.errors import UserError
from moezoo.files import check_writable
from moezoo.json_text import json_text
from moezoo.nn.module import Tree, flatten, unflatten
from moezoo.train import zoo
from moezoo.train.config_json import from_json, to_json
from moezoo.train.manifest import checksum
from moezoo.train.placement import path_name
from moezoo.train.schema import Config
from moezoo.weights import files, tensor_file
from moezoo.weights.shards import from_parts

GROUPS = ("params", "stats")
# Vectors (norms, biases, running means) are a hundredth of the bytes, and the first to show
# rounding.
SMALL = 1


def write(
    folder: Path,
    config: Config,
    params: Tree,
    stats: Tree,
    about: zoo.About,
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a folder, whole or not at all; matrices become bfloat16, vectors stay as they are.

    beside: other files by name, such as the configuration's own code (`origin.kept`). Raises
    UserError where `folder` exists, the disk does not take it, and for arrays that are not finite.
    """
    folder = storage.place(folder)
    check_writable(folder.absolute().parent)
    arrays = flatten({"params": params, "stats": stats})
    _check_finite(folder, arrays)
    with files.written_whole(folder) as temporary:
        (temporary / zoo.CONFIG).write_text(to_json(config))
        for name, content in (beside or {}).items():
            (temporary / name).write_bytes(content)
        planned = {name: _planned(array) for name, array in sorted(arrays.items())}
        tensor_file.write(temporary / zoo.WEIGHTS, planned)
        sums = {name: checksum(temporary / name) for name in (zoo.CONFIG, zoo.WEIGHTS)}
        (temporary / zoo.ABOUT).write_text(json_text(zoo.stored(about) | {"sha256": sums}, 1))
    return folder


def _planned(array: Any) -> tensor_file.Planned:
    kind = np.dtype(array.dtype)
    stored = np.dtype(ml_dtypes.bfloat16) if np.ndim(array) > SMALL else kind
    if stored not in tensor_file.NAMES:
        raise UserError(f"A model with arrays of {kind} cannot be saved: floats can.")
    return tensor_file.Planned(array.shape, stored, lambda: np.asarray(array).astype(stored))


def _check_finite(folder: Path, arrays: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise UserError(
                f"{folder} cannot be written: {name} is not finite, the run had diverged; take an "
                "older checkpoint."
            )


def verify(folder: Path | str) -> None:
    """UserError where a file of a saved model is not the one that was written."""
    folder = Path(folder)
    zoo.read_about(folder)
    sums = json.loads((folder / zoo.ABOUT).read_bytes())["sha256"]
    for name in (zoo.CONFIG, zoo.WEIGHTS):
        regular.check(folder / name, 2**62, UserError, zoo.AGAIN)
        if checksum(folder / name) != sums.get(name):
            raise UserError(f"{folder / name} is damaged (wrong checksum): {zoo.AGAIN}.")


def read_text(folder: Path | str) -> str:
    """A saved model's configuration as JSON text."""
    content = regular.read(Path(folder) / zoo.CONFIG, 64 * regular.MB, UserError, zoo.AGAIN)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{Path(folder) / zoo.CONFIG} is no text: {zoo.AGAIN}.") from error


def read_config(folder: Path | str) -> Config:
    """A saved model's configuration; UserError where it is damaged."""
    return from_json(read_text(folder))


def read_arrays(folder: Path | str, target: Tree | None = None) -> Tree:
    """`{"params": ..., "stats": ...}` of a saved model whose checksums are right.

    target: a tree of ShapeDtypeStructs; each array comes in its type and onto its sharding's
    devices, every part of it straight from the file. None: all arrays, float32 on the host. Raises
    UserError where the file has others, by name.
    """
    verify(folder)
    file = tensor_file.TensorFile(Path(folder) / zoo.WEIGHTS)
    if target is None:
        single = partial(np.array, dtype=np.float32)
        everything = {name: _finite(file, name, file.read(name, single)) for name in file.entries}
        return {group: {} for group in GROUPS} | unflatten(everything)
    return read_file(file, target)


def read_file(
    file: tensor_file.TensorFile, target: Tree, left: Callable[[str], bool] = lambda name: False
) -> Tree:
    """A file's arrays in a target's place, as `read_arrays`; no checksum is looked at.

    left: which ones stay the shapes that they are, by name; they are there all the same, and
    finite. Raises UserError where the file has others, by name.
    """
    _check_same(file, flatten(target))

    def placed(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if not left(name):
            return _placed(file, name, leaf)
        with file.viewed(name) as stored:
            for row in range(leaf.shape[0]):
                _finite(file, name, stored()[row])
        return leaf

    return jax.tree_util.tree_map_with_path(placed, target)


def _finite(file: tensor_file.TensorFile, name: str, array: np.ndarray) -> np.ndarray:
    """The array; UserError where it holds numbers that no model computes with."""
    if not np.isfinite(array.astype(np.float32, copy=False)).all():
        raise UserError(f"{file.path} is no model: {name} is not finite; take another folder.")
    return array


def _check_same(file: tensor_file.TensorFile, wanted: Mapping[str, Any]) -> None:
    held = {name: tuple(entry.shape) for name, entry in file.entries.items()}
    for name, leaf in wanted.items():
        if name not in held:
            raise UserError(f"{file.path} is of another model: it has no {name}.")
        if held[name] != tuple(leaf.shape):
            raise UserError(
                f"{file.path} is of another model: {name} is {held[name]}, not {leaf.shape}."
            )
    left = sorted(set(held) - set(wanted))
    if left:
        raise UserError(f"{file.path} is of another model: it has {left[0]}, too.")


def _placed(file: tensor_file.TensorFile, name: str, leaf: Any) -> jax.Array:
    dtype = np.dtype(leaf.dtype)

    where = getattr(leaf, "sharding", None)
    # While somebody has a mesh set, shapes may carry one without devices, which nobody asked for.
    if where is None or isinstance(getattr(where, "mesh", None), jax.sharding.AbstractMesh):
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with file.viewed(name) as stored:

        def part(index: Any) -> np.ndarray:
            return _finite(file, name, tensor_file.copied(stored()[index or ()], dtype))

        return from_parts(tuple(leaf.shape), where, part)
