"""The training state: one plain nested dictionary, created sharded.

Before anything of it is made, it is checked to fit into this machine's memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.train import placement


def check(state: Tree, shardings: Tree) -> None:
    """UserError where a state and its gradients are larger than the memory they would lie in.

    Activations come on top, so what is refused could not be trained; what passes may still be too
    large.

    Args:
      state: shapes and dtypes, {"params": ..., ...}.
      shardings: one per leaf, of the same structure.
    """
    # Gradients are of the parameters' sizes and lie where they lie.
    need = _bytes(state, shardings) + _bytes(state["params"], shardings["params"])
    devices = _devices(shardings)
    have = available(devices)
    if have is not None and need > have:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["params"]))
        raise UserError(
            f"The model has {count:,} parameters: with their gradients and the optimiser's state "
            f"they take {need / 1e9:,.1f} GB of each device, which has {have / 1e9:,.1f} GB: take "
            "a smaller model, or split it over more devices with --mesh.fsdp."
        )


def available(devices: Sequence[Any]) -> float | None:
    """Bytes of memory for each of this process's devices; None where the system does not tell.

    Devices of a CPU share that of the machine.
    """
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if devices[0].platform != "cpu":
        return None
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return whole / len(devices)


def _bytes(tree: Tree, shardings: Tree) -> int:
    """What one device holds of a tree."""

    def of(leaf: Any, sharding: jax.sharding.Sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of, tree, shardings)))


def _devices(shardings: Tree) -> list[Any]:
    first: jax.sharding.Sharding = jax.tree.leaves(shardings)[0]
    return sorted(first.addressable_devices, key=lambda device: device.id)


Tree = dict[str, Any]
WEIGHTING = "weighting"


class Created(NamedTuple):
    """What building a model for training gives.

    `definition` is static; `state` holds arrays {params, stats, optimiser, step}, and the sigmas
    of the tasks as `weighting` where they are learned; `shardings` has the state's structure with
    one NamedSharding per leaf.
    """

    definition: Any
    state: Tree
    shardings: Tree


class TrainedParams(NamedTuple):
    """What the optimiser trains: the model's parameters and the tasks' sigmas, None if fixed."""

    params: Tree
    sigma_J: Any


def trained(state: Tree) -> Tree:
    """The part of a state that gradients are taken of; see `parted`."""
    if WEIGHTING not in state:
        return state["params"]
    return {"params": state["params"], WEIGHTING: state[WEIGHTING]}


def parted(tree: Tree) -> TrainedParams:
    """What `trained` put together."""
    if WEIGHTING not in tree:
        return TrainedParams(tree, None)
    return TrainedParams(tree["params"], tree[WEIGHTING]["sigma"])


def as_state(tree: Tree) -> Tree:
    """Inverse of `trained`: the entries of the state."""
    return tree if WEIGHTING in tree else {"params": tree}


def sigmas(tasks: int) -> Tree:
    """Entry of a state whose tasks have learned weights, 1 at first."""
    return {WEIGHTING: {"sigma": jnp.ones((tasks,), jnp.float32)}}


def initial(
    parts: module.ModuleParts, optimiser: optax.GradientTransformation, extra: Tree
) -> Tree:
    """The state of fresh parameters; `extra` are further entries (`sigmas`)."""
    state = {"params": parts.params, "stats": parts.stats, **extra}
    step = jnp.zeros((), jnp.int32)
    return state | {"optimiser": optimiser.init(trained(state)), "step": step}


def abstract(
    build: Callable[[], Any],
    optimiser: optax.GradientTransformation,
    extra: Callable[[], Tree] = dict,
) -> Created:
    """The state's shapes and dtypes without allocating anything (`shardings` is empty)."""
    parts = module.abstract(build)

    def init(params: Tree, stats: Tree) -> Tree:
        return initial(module.ModuleParts(None, params, stats), optimiser, extra())

    return Created(parts.definition, jax.eval_shape(init, parts.params, parts.stats), {})


def create(
    build: Callable[[], Any],
    optimiser: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    rules: placement.Rules,
    extra: Callable[[], Tree] = dict,
) -> Created:
    """Build the initial state directly on its shards, never whole on one device first.

    Raises UserError where it does not fit into the devices' memory.
    """
    # Shapes first: shardings, and whether all of it fits, must be known before an array exists.
    shapes = abstract(build, optimiser, extra)
    shardings = placement.shardings(mesh, shapes.state, rules)
    check(shapes.state, shardings)

    def init() -> Tree:
        return initial(module.split(build()), optimiser, extra())

    with jax.set_mesh(mesh):
        options = module.init_compiler_options()
        state = jax.jit(init, out_shardings=shardings, compiler_options=options)()
    return Created(shapes.definition, state, shardings)


def target(state: Tree, shardings: Tree) -> Tree:
    """ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
