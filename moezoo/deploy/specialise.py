"""A model for one task: what can be decided once is decided here, exactly.

What is left of a part of the model for one task, the part says itself (`surgery.OfTask`).
"""

from __future__ import annotations

from typing import Any

from flax import nnx

from moezoo.deploy.path import PathLayer
from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.moe import MoE
from moezoo.nn.routers import TaskEmbedding, TaskEmbeddingRouter

# Decisions that an example makes itself: the router stays, experts leave only approximately.
BY_EXAMPLE = ("token", "row", "task_support")


def copy_of(model: nnx.Module) -> Any:
    """A module with the same arrays that can be changed without changing `model`."""
    return module.merge(*module.split(model))


def layers_of(model: nnx.Module) -> dict[str, MoE]:
    """The MoE layers by path."""
    return surgery.find(model, MoE)


def specialise(model: nnx.Module, task: int) -> Any:
    """A copy of the model whose routers are those of one task (its number among the routers).

    Raises UserError for a router whose decision is not the example's alone: nothing can be promised
    about a part of it yet.
    """
    model = copy_of(model)
    for path, layer in layers_of(model).items():
        _check(path, layer)
    for path, part in surgery.find(model, surgery.OfTask).items():
        surgery.replace(model, path, part.of_task(task))
    # Not by `of_task`: these routers need the embedding, which lies elsewhere in the model.
    embeddings = list(surgery.find(model, TaskEmbedding).values())
    for path, router in surgery.find(model, TaskEmbeddingRouter).items():
        if len(embeddings) != 1:
            raise UserError(
                f"The router {path} reads a task's features, but the model has {len(embeddings)} "
                "task embeddings; one is needed to cut a task's path."
            )
        surgery.replace(model, path, router.with_features(embeddings[0], task))
    for path, layer in layers_of(model).items():
        if layer.router.depends_on_task:
            raise UserError(
                f"The router of {path} ({type(layer.router).__name__}) depends on the task in a "
                "way that cannot be fixed to one task."
            )
    return model


def folded_between(model: nnx.Module, own: nnx.Module) -> dict[str, PathLayer]:
    """The layers of `model` that are dense in `own`, which `specialise` made of it."""
    mixtures = surgery.find(model, surgery.Mixture)
    left = surgery.find(own, surgery.Mixture)
    return {path: dense_layer(*part.mixed) for path, part in mixtures.items() if path not in left}


def dense_layer(decision: str, experts: int, chosen: int) -> PathLayer:
    """A layer whose mixture was decided once: no expert is left."""
    return PathLayer(decision, experts, (), chosen, ())


def _check(path: str, layer: MoE) -> None:
    decision = layer.router.decision
    if decision not in BY_EXAMPLE:
        raise UserError(
            f"The router of {path} decides by '{decision}'; a task's path can be cut only out of "
            f"routers that decide by {' or '.join(BY_EXAMPLE)}."
        )
