"""The training state: one plain nested dictionary, created sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moezoo.nn import module
from moezoo.train import placement

Tree = dict[str, Any]


class Created(NamedTuple):
    """What building a model for training gives.

    `definition` is static; `state` holds arrays {params, stats, optimiser, step};
    `shardings` has the state's structure with one NamedSharding per leaf.
    """

    definition: Any
    state: Tree
    shardings: Tree


def abstract(build: Callable[[], Any], optimiser: optax.GradientTransformation) -> Created:
    """The state's shapes and dtypes without allocating anything (`shardings` is empty)."""
    parts = module.abstract(build)
    moments = jax.eval_shape(optimiser.init, parts.params)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = {"params": parts.params, "stats": parts.stats, "optimiser": moments, "step": step}
    return Created(parts.definition, state, {})


def create(
    build: Callable[[], Any],
    optimiser: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    rules: placement.Rules,
) -> Created:
    """Build the initial state directly on its shards, never whole on one device first."""
    shapes = abstract(build, optimiser)
    shardings = placement.shardings(mesh, shapes.state, rules)

    def init() -> Tree:
        parts = module.split(build())
        return {
            "params": parts.params,
            "stats": parts.stats,
            "optimiser": optimiser.init(parts.params),
            "step": jnp.zeros((), jnp.int32),
        }

    with jax.set_mesh(mesh):
        options = module.init_compiler_options()
        state = jax.jit(init, out_shardings=shardings, compiler_options=options)()
    return Created(shapes.definition, state, shardings)


def target(state: Tree, shardings: Tree) -> Tree:
    """ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
