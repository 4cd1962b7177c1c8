"""Small models with random weights, made without compiling an initialisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.nn import module
from moezoo.train.config import Config
from moezoo.train.setup import Loaded, make_builder, make_tasks

TASKS = {"semseg": 3, "depth": 1}
SIZE = (8, 16)
BATCH = 8


def config(**changes: Any) -> M3ViTConfig:
    """MoE in block 1 of 3, a 2 x 4 grid."""
    sizes: dict[str, Any] = {"width": 8, "depth": 3, "heads": 2, "patch": 4, "mlp_ratio": 2.0}
    sizes |= {"experts": 4, "top_k": 2, "head_channels": 4, "task_embedding": 6}
    return M3ViTConfig(**(sizes | changes))


def image(size: tuple[int, int] = SIZE, batch: int = BATCH) -> jax.Array:
    return jax.random.normal(jax.random.key(5), (batch, *size, 3))


def filled(build: Callable[[], nnx.Module], seed: int = 0) -> module.ModuleParts:
    """The parts of `build()` with random numbers of sensible size in place of its own."""
    shapes = module.abstract(build)
    generator = np.random.default_rng(seed)

    def number(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        value = generator.normal(size=leaf.shape)
        if name in ("scale", "var"):
            value = 1 + 0.2 * np.tanh(value)
        elif name == "kernel":
            value *= 1.5 / np.sqrt(np.prod(leaf.shape[-2:-1]))
        else:
            value *= 0.2
        return jnp.asarray(value, leaf.dtype)

    fill = jax.tree_util.tree_map_with_path
    return module.ModuleParts(
        shapes.definition, fill(number, shapes.params), fill(number, shapes.stats)
    )


def loaded(config: Config) -> tuple[Loaded, Any]:
    """The model with random numbers everywhere, and what its labels mean."""
    classes = config.data.domain.example(config)[1]
    tasks = make_tasks(config, classes)
    parts = filled(make_builder(config, tasks))
    return Loaded(config, tasks, module.merge(*parts), 0), classes


# Tests compile much and compute little: this halves their time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def runner(definition: Any, options: frozenset) -> Callable:
    """A jitted `(params, stats, image, key) -> Output`; one per definition and static options."""

    def run(params, stats, x, key):
        return module.merge(definition, params, stats)(x, key=key, **dict(options))

    return quick_jit(run)


def call(
    parts: module.ModuleParts, x: jax.Array | None = None, key: Any = None, **options: Any
) -> Any:
    """A pass of the model."""
    run = runner(parts.definition, frozenset(options.items()))
    return run(parts.params, parts.stats, image() if x is None else x, key)


def parts_of(config: Any, tasks: dict[str, int] = TASKS, size=SIZE) -> module.ModuleParts:
    return filled(lambda: config.build(tasks, size, nnx.Rngs(0)))
