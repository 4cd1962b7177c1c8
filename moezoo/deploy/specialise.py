"""A model for one task: what can be decided once is decided here, exactly.

What is left of a part of the model for one task, the part says itself (`surgery.OfTask`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Specialised(NamedTuple):
    """A model for one task, and what became of its mixtures that are no MoE layers, by path.

    Each mixture (`surgery.ExpertMixture`) is dense now, or has all its experts.
    """

    model: Any
    mixtures: dict[str, PathLayer]


def specialise(model: nnx.Module, task: int) -> Specialised:
    """A copy of the model whose routers are those of one task (its number among the routers).

    Raises UserError for a router whose decision is not the example's alone: nothing can be promised
    about a part of it yet.
    """
    model = copy_of(model)
    for path, layer in layers_of(model).items():
        _check(path, layer)
    dense = _parts_of_task(model, task)
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
    left = surgery.find(model, surgery.ExpertMixture)
    return Specialised(model, dense | {p: whole_mixture(m.mixture_size) for p, m in left.items()})


def _parts_of_task(model: Any, task: int) -> dict[str, PathLayer]:
    """Put what is left for the task in the place of every part that knows it; the dense ones."""
    dense: dict[str, PathLayer] = {}
    done: set[str] = set()
    # One at a time: what stands for a part may hold parts that know more.
    while todo := [(p, m) for p, m in surgery.find(model, surgery.OfTask).items() if p not in done]:
        path, part = todo[0]
        done.add(path)
        while isinstance(part, surgery.OfTask) and (own := part.of_task(task)) is not part:
            if isinstance(part, surgery.ExpertMixture) and not isinstance(
                own, surgery.ExpertMixture
            ):
                dense[path] = dense_layer(part.mixture_size)
            part = own
        surgery.replace(model, path, part)
    return dense


def dense_layer(size: surgery.MixtureSize) -> PathLayer:
    """A layer whose mixture was decided once: no expert is left."""
    return PathLayer(size.decision, size.experts, (), size.chosen, ())


def whole_mixture(size: surgery.MixtureSize) -> PathLayer:
    """A layer that mixes all its experts still."""
    return PathLayer(size.decision, size.experts, tuple(range(size.experts)), size.chosen)


def _check(path: str, layer: MoE) -> None:
    decision = layer.router.decision
    if decision not in BY_EXAMPLE:
        raise UserError(
            f"The router of {path} decides by '{decision}'; a task's path can be cut only out of "
            f"routers that decide by {' or '.join(BY_EXAMPLE)}."
        )
