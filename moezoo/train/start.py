"""Beginning a run from what another run, or a pretrained vision transformer, has learned.

Parameters of the same name, or experts out of one MLP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from moezoo.errors import UserError
from moezoo.nn.embed import grid_of
from moezoo.nn.module import Tree, flatten, unflatten
from moezoo.nn.upcycle import ROUTER, Carried, carry_over
from moezoo.train import manifest, restore
from moezoo.train.schema import Config
from moezoo.weights import files, vit

GROUPS = ("params", "stats")


def check(path: Path | str) -> None:
    """UserError where there is nothing to start from, before anything else is made."""
    path = Path(path)
    if not path.exists():
        kinds = " or ".join(files.FORMATS)
        raise UserError(
            f"start_from is {path}, but there is no such folder or file; name a run's folder, or "
            f"an {kinds} file with a pretrained vision transformer."
        )
    if not path.is_dir():
        vit.check(path)


def learned(path: Path | str, config: Config, params: Tree) -> dict[str, dict[str, Any]]:
    """What `begin` takes: from a run's folder, or from a file for this configuration's model.

    `params` are the model's. Raises UserError where there is nothing, and where the file's sizes
    are not the model's.
    """
    if Path(path).is_dir():
        return read(path)
    model: Any = config.model
    shapes = {name: leaf.shape for name, leaf in flatten(params).items()}
    target = vit.Target(shapes, grid_of(config.data.resolution, model.patch), model.heads)
    return {"params": vit.trunk(Path(path), target), "stats": {}}


def read(path: Path | str) -> dict[str, dict[str, Any]]:
    """`{"params": {path: array}, "stats": ...}` of a run's newest sound checkpoint, of any model.

    Raises UserError where there is none.
    """
    folder = restore.find(path)
    held = manifest.read(folder)
    assert held is not None  # `find` has read it
    shapes = {
        name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(kind))
        for name, (shape, kind) in held.arrays.items()
        if name.partition("/")[0] in GROUPS
    }
    loaded = restore.load(folder, unflatten(shapes))
    return {group: flatten(loaded.get(group, {})) for group in GROUPS}


def begin(learned: dict[str, dict[str, Any]], state: Tree) -> tuple[Tree, Carried]:
    """The state with what `learned` has for its parameters and statistics, and what was taken.

    Arrays lie where the state's lay. Raises UserError where no parameter fits.
    """
    carried = {group: carry_over(learned[group], state[group]) for group in GROUPS}
    taken = carried["params"]
    if len(taken.fresh) == len(flatten(state["params"])):
        raise UserError(
            "The run to start from has no parameter that fits this model: the sizes of the trunk "
            "(width, depth, heads, patch, stem) must be the same."
        )

    def place(new: Any, old: jax.Array) -> jax.Array:
        return new if new is old else jax.device_put(new, old.sharding)

    begun = {group: jax.tree.map(place, carried[group].params, state[group]) for group in GROUPS}
    return state | begun, taken


def summary(run: str, carried: Carried) -> str:
    """What was taken, in one sentence."""
    total = len(flatten(carried.params))
    routers = sum(ROUTER in path for path in carried.fresh)
    rest = [path for path in carried.fresh if ROUTER not in path]
    parts = [f"{routers} of routers"] if routers else []
    parts += [", ".join(rest[:4]) + (", ..." if rest[4:] else "")] if rest else []
    return (
        f"Starting from {run}: {total - len(carried.fresh)} of {total} arrays taken over; "
        f"fresh are {' and '.join(parts) or 'none'}; {len(carried.unused)} of its arrays have no "
        "place here."
    )
