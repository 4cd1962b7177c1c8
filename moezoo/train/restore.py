"""Reading checkpoints: which one a path means, whether it is sound, and onto which devices.

A saved model (`saved`) is read in the place of a run's newest checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as orbax

from moezoo import storage
from moezoo.errors import UserError
from moezoo.files import failure
from moezoo.nn.module import flatten, unflatten
from moezoo.train import manifest, origin, saved, zoo
from moezoo.train.config_json import from_json
from moezoo.train.manifest import Manifest
from moezoo.train.placement import path_name
from moezoo.train.schema import Config

FOLDER = "checkpoints"
ARRAYS, CONFIG = "arrays", "config.json"
CHAIN = "optimiser/"
Order = Callable[[Manifest], float]
Say = Callable[[str], None]

# Orbax logs a failure with its whole stack; here failures are raised as one sentence.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def newest(held: Manifest) -> float:
    """Order checkpoints by step."""
    return held.step


def best(held: Manifest) -> float:
    """Order checkpoints by score; those without one come last."""
    return -np.inf if held.score is None else held.score


def find(path: Path | str, order: Order = newest, say: Say = print) -> Path:
    """The checkpoint that a run's folder, its folder of checkpoints or a checkpoint means.

    Among several the first by `order` that is not damaged. Raises UserError where there is none.
    """
    given, path = path, storage.place(path).absolute()
    if not path.is_dir():
        said = zoo.without_weights(given)
        raise UserError(said or f"No checkpoint at {path}: there is no such folder.")
    if is_step(path.name) and (path / ARRAYS).exists():
        trouble = manifest.damage(path)
        if trouble:
            raise UserError(f"Checkpoint {path} is damaged ({trouble}); use another one.")
        return path
    inner = path / FOLDER if (path / FOLDER).is_dir() else path
    found, damaged = valid(inner, order, say)
    if found is None and damaged:
        raise UserError(
            f"No checkpoint in {inner} can be read, all {len(damaged)} are damaged: name another "
            "folder, or train again."
        )
    if found is None:
        raise UserError(f"No checkpoint in {inner}: train first, or name another folder.")
    return found


def read_config(path: Path | str) -> Config:
    """The configuration beside the checkpoint that `path` means, see `find`.

    What it names and only its own file defines is made known first, see `origin`.
    """
    path = zoo.located(path)
    if zoo.holds(path):
        text = saved.read_text(path)
        origin.prepare(path, text)
        return from_json(text)
    folder = find(path, say=lambda sentence: None)
    file = folder / CONFIG
    try:
        text = file.read_text()
    except OSError as error:
        raise failure("read", file, error) from error
    origin.prepare(folder.parent.parent, text)
    return from_json(text)


def restore(path: Path | str, target: Any, say: Say = print) -> Any:
    """The arrays of a run's newest valid checkpoint (or of one checkpoint), placed like `target`.

    `target` may lack whole groups of what was saved, for example the optimiser. Raises UserError
    where there is no checkpoint or it is of another model.
    """
    return load(find(path, newest, say), target)


def load_params(path: Path | str, target: Any, say: Say = print) -> dict[str, Any]:
    """What inference needs: `{"params", "stats", "step"}` without the optimiser's state.

    `target` holds params and stats as ShapeDtypeStructs; where they carry no sharding the arrays
    come whole onto this process's first device. See `restore`. Raises UserError, besides, for a
    checkpoint of an older version that holds values which are not finite.
    """
    path = zoo.located(path)
    wanted = {group: target[group] for group in ("params", "stats")}
    if zoo.holds(path):
        return {**saved.read_arrays(path, wanted), "step": zoo.read_about(path).step}
    folder = find(path, newest, say)
    loaded = load(folder, wanted)
    for name, array in by_path(loaded).items():
        if not _is_finite(array):
            raise UserError(
                f"Checkpoint {folder} is no model: {name} is not finite, the run had diverged; "
                "name an older checkpoint, or train again with a lower optimiser.lr."
            )
    return {**loaded, "step": int(folder.name)}


def load(folder: Path, target: Any) -> Any:
    """The arrays of one checkpoint whose files are known to be sound, placed like `target`."""
    held = manifest.read(folder)
    if held is None:
        raise UserError(f"Checkpoint {folder} was never finished; use another one.")
    target = jax.tree.map(_placed, target)
    wanted = by_path(target)
    names = as_stored(wanted, held.arrays)
    stored = {names[path]: leaf for path, leaf in wanted.items()}
    manifest.check_arrays(folder, held.arrays, stored)
    places = dict.fromkeys(held.arrays, orbax.PLACEHOLDER) | stored
    found = flatten(orbax.load(str(folder / ARRAYS), unflatten(places)))
    loaded = {path: found[name] for path, name in names.items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: loaded[path_name(path)] if leaf.size else _nothing(leaf), target
    )


def check_stored(folder: Path, arrays: Mapping[str, Any]) -> None:
    """UserError unless the store finds every array that was just written, as it was given.

    Checksums say that files are as they were written, not that something can be read from them.
    """
    found = orbax.metadata(str(folder / ARRAYS)).metadata
    held = flatten(found) if isinstance(found, dict) else {}
    for path, wanted in arrays.items():
        if path not in held:
            trouble = f"{path} is not found"
        elif (tuple(held[path].shape), held[path].dtype) != (tuple(wanted.shape), wanted.dtype):
            trouble = f"{path} is {held[path].dtype} {tuple(held[path].shape)}"
        else:
            continue
        raise UserError(
            f"Checkpoint {folder} was written but cannot be read back ({trouble}): choose another "
            "folder or disk."
        )


def as_stored(wanted: Collection[str], held: Collection[str]) -> dict[str, str]:
    """By path of a state, its path in a checkpoint.

    They differ in the number of a part of the optimiser's chain: with clipping, which has no
    arrays, the others stand one place later.
    """

    def parts(paths: Collection[str]) -> list[str]:
        numbers = {path.split("/")[1] for path in paths if path.startswith(CHAIN)}
        return sorted(filter(is_step, numbers), key=int)

    ours, theirs = parts(wanted), parts(held)
    if len(ours) != len(theirs):
        return {path: path for path in wanted}
    moved = {f"{CHAIN}{a}/": f"{CHAIN}{b}/" for a, b in zip(ours, theirs, strict=True)}

    def stored(path: str) -> str:
        start = "/".join(path.split("/")[:2]) + "/"
        return moved[start] + path[len(start) :] if start in moved else path

    return {path: stored(path) for path in wanted}


def _is_finite(array: jax.Array) -> bool:
    """Whether what this process has of an array is finite."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    # On the host, which takes no program to be compiled for every model that is read.
    return all(np.isfinite(np.asarray(part.data)).all() for part in array.addressable_shards)


def valid(
    directory: Path, order: Order, say: Say, but: Collection[Path] = ()
) -> tuple[Path | None, set[Path]]:
    """The first undamaged checkpoint by `order`, and the damaged ones met before it.

    Those in `but` are passed over without a word.
    """
    sealed = [f for f in folders(directory) if (f / manifest.NAME).exists() and f not in but]
    held = {f: m for f in sealed if (m := manifest.read(f)) is not None}
    damaged = {f: "its manifest is unreadable" for f in sealed if f not in held}
    found = None
    for folder in sorted(held, key=lambda f: (order(held[f]), held[f].step), reverse=True):
        trouble = manifest.damage(folder)
        if trouble is None:
            found = folder
            break
        damaged[folder] = trouble
    for folder, trouble in damaged.items():
        say(f"Skipping checkpoint {folder}, which is damaged: {trouble}.")
    return found, set(damaged)


def folders(directory: Path) -> list[Path]:
    """The folders named by a step, finished or not."""
    return [f for f in directory.iterdir() if f.is_dir() and is_step(f.name)]


def is_step(name: str) -> bool:
    """Whether a folder's name is a number as a run writes it: no sign, zeros or other digits."""
    return name.isascii() and name.isdigit() and str(int(name)) == name


def by_path(tree: Any) -> dict[str, Any]:
    """`{path: array}` of what is stored; arrays without elements are not, Orbax takes none."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves if leaf.size}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    place = getattr(leaf, "sharding", None)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=place or here)


def _nothing(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
