"""Beginning a run from what another run has learned: same names, or experts out of one MLP."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moezoo.errors import UserError
from moezoo.nn.module import Tree, flatten, unflatten
from moezoo.nn.upcycle import EXPERTS, ROUTER
from moezoo.train import manifest, restore

PARAMS = "params/"
POSITIONS = "pos_embed"


class Carried(NamedTuple):
    """Parameters to begin with; the paths that stayed fresh, and those found nowhere to go."""

    params: Tree
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def read_params(path: Path | str) -> dict[str, Any]:
    """`{path: array}` of a run's newest sound checkpoint, whatever model it is of.

    Raises UserError where there is none.
    """
    folder = restore.find(path)
    held = manifest.read(folder)
    assert held is not None  # `find` has read it
    shapes = {
        name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(kind))
        for name, (shape, kind) in held.arrays.items()
        if name.startswith(PARAMS)
    }
    return flatten(restore.load(folder, unflatten(shapes))["params"])


def carry_over(learned: dict[str, Any], fresh: Tree) -> Carried:
    """`fresh` with everything that `learned` has for it, on the devices where `fresh` lies.

    A parameter is taken from the same path and shape; positions also where only the class token's
    is too much. Experts that replace an MLP take E copies of
    it (sparse upcycling, arXiv:2212.05055). Routers are taken only from the same kind of router.
    Raises UserError where nothing at all fits.
    """
    kept, used, made = [], set(), {}
    for path, leaf in flatten(fresh).items():
        name = _source(path, leaf.shape, learned)
        if name is None:
            kept.append(path)
            made[path] = leaf
        else:
            used.add(name)
            array = np.asarray(learned[name], leaf.dtype)
            if path == POSITIONS:
                array = array[:, -leaf.shape[1] :]
            made[path] = jax.device_put(np.broadcast_to(array, leaf.shape), leaf.sharding)
    if not used:
        raise UserError(
            "The run to start from has no parameter that fits this model: the sizes of the trunk "
            "(width, depth, heads, patch, stem) must be the same."
        )
    return Carried(unflatten(made), tuple(kept), tuple(sorted(set(learned) - used)))


def _source(path: str, shape: tuple[int, ...], learned: dict[str, Any]) -> str | None:
    """The learned parameter that `path` begins with."""
    found = learned[path].shape if path in learned else ()
    # A model without a class token, which comes first, takes the positions of the patches.
    without_first = (1, found[1] - 1, found[2]) if path == POSITIONS and len(found) == 3 else None
    if shape in (found, without_first):
        return path
    name = path.replace(EXPERTS, "/")
    if EXPERTS in path and name in learned and learned[name].shape == shape[1:]:
        return name
    return None


def summary(run: str, carried: Carried) -> str:
    """What was taken, in one sentence."""
    total = len(flatten(carried.params))
    routers = sum(ROUTER in path for path in carried.fresh)
    rest = [path for path in carried.fresh if ROUTER not in path]
    named = ", ".join(rest[:4]) + (", ..." if rest[4:] else "")
    fresh = f"{routers} of routers" + (f" and {named}" if rest else "")
    return (
        f"Starting from {run}: {total - len(carried.fresh)} of {total} arrays taken over; "
        f"fresh are {fresh}; {len(carried.unused)} of that run's arrays have no place here."
    )
