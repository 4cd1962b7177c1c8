"""Routers of one task: what can be decided once is decided here, exactly.

A part of a model with a method `of_task` knows itself what is left of it for one task.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.context import Condition
from moezoo.nn.moe import MoE
from moezoo.nn.routers import TaskEmbedding, TaskEmbeddingRouter, TopKRouter

# Decisions that an image makes itself: the router stays, experts leave only approximately.
BY_IMAGE = ("token", "row")


class OffsetRouter(TopKRouter):
    """A linear router with one constant per expert; kernel [D, E], bias [E].

    What a task-conditioned router is for a fixed task: [x, f] W = x W_x + f W_f.
    """

    def __init__(self, router: TaskEmbeddingRouter, embedding: TaskEmbedding, task: int):
        super().__init__(router.k, router.select, router.noise)
        kernel = router.kernel.get_value()
        width = kernel.shape[0] - embedding.fc2.kernel.shape[1]
        self.kernel = nnx.Param(kernel[:width])
        # All tasks at once, as in the whole model: a product with one row rounds differently.
        self.bias = nnx.Param(_offsets(embedding, kernel[width:])[task])

    def logits(self, x_ND: Array, condition: Condition) -> Array:
        """Clean logits, float32 [N, E]."""
        kernel, bias = self.kernel.get_value(), self.bias.get_value()
        product = jnp.matmul(x_ND.astype(jnp.float32), kernel, precision=lax.Precision.HIGHEST)
        return product + bias


@jax.jit
def _offsets(embedding: TaskEmbedding, kernel_FE: Array) -> Array:
    return jnp.matmul(embedding(), kernel_FE, precision=lax.Precision.HIGHEST)


def copy_of(model: nnx.Module) -> Any:
    """A module with the same arrays that can be changed without changing `model`."""
    return module.merge(*module.split(model))


def layers_of(model: nnx.Module) -> dict[str, MoE]:
    """The MoE layers by path."""
    return surgery.find(model, MoE)


def specialise(model: nnx.Module, task: int) -> Any:
    """A copy of the model whose routers are those of one task (its number among the routers).

    Raises UserError for a router whose decision is not the image's alone: nothing can be promised
    about a part of it yet.
    """
    model = copy_of(model)
    for path, layer in layers_of(model).items():
        _check(path, layer)
    for path, part in surgery.find(model, lambda m: hasattr(m, "of_task")).items():
        surgery.replace(model, path, part.of_task(task))
    embeddings = list(surgery.find(model, TaskEmbedding).values())
    for path, layer in layers_of(model).items():
        router = layer.router
        if isinstance(router, TaskEmbeddingRouter):
            if len(embeddings) != 1:
                raise UserError(
                    f"The router of {path} reads a task's features, but the model has "
                    f"{len(embeddings)} task embeddings; one is needed to cut a task's path."
                )
            surgery.replace(model, f"{path}/router", OffsetRouter(router, embeddings[0], task))
        elif router.depends_on_task:
            raise UserError(
                f"The router of {path} ({type(router).__name__}) depends on the task in a way "
                "that cannot be fixed to one task."
            )
    return model


def _check(path: str, layer: MoE) -> None:
    decision = layer.router.decision
    if decision not in BY_IMAGE:
        raise UserError(
            f"The router of {path} decides by '{decision}'; a task's path can be cut only out of "
            f"routers that decide by {' or '.join(BY_IMAGE)}."
        )
