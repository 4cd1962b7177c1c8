"""A further task for a trained model: new router, head, vector and experts, nothing old changed.

The old tasks keep their router, with its very numbers (`GrownRouter`); what is new is told apart,
so that training can be confined to it (`Grown.free`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.models.shared.multitask import MultiTaskTrunk
from moezoo.nn import module, surgery
from moezoo.nn.context import Context, TaskBias, task_of_tokens
from moezoo.nn.heads import UpConvHead, upsamplings
from moezoo.nn.layers import trunc_normal
from moezoo.nn.moe import MoE
from moezoo.nn.routers import Decision, LinearRouter, MultiGateRouter, Router, TopKRouter
from moezoo.ops.routing import OUTSIDE, Routing


def widened(routing: Routing, experts: int) -> Routing:
    """The same decision over `experts` experts, of which those that are more are out of reach."""
    more = ((0, 0), (0, experts - routing.logits_NE.shape[1]))
    return routing._replace(
        probs_NE=jnp.pad(routing.probs_NE, more),
        logits_NE=jnp.pad(routing.logits_NE, more, constant_values=OUTSIDE),
        noisy_NE=jnp.pad(routing.noisy_NE, more, constant_values=OUTSIDE),
        noise_scale_NE=jnp.pad(routing.noise_scale_NE, more),
    )


class WidenedRouter(nnx.Module):
    """A router of fewer experts than its layer has: the first ones."""

    decision: ClassVar[Decision] = "task_support"
    depends_on_task: ClassVar[bool] = False

    def __init__(self, router: TopKRouter, experts: int):
        self.router, self.experts, self.k = router, experts, router.k

    @property
    def reach(self) -> tuple[int, ...]:
        """The only experts that any token can ask for, ascending."""
        own = self.router.reach
        kernel: Any = self.router.kernel  # type: ignore[attr-defined]
        return tuple(range(kernel.shape[-1])) if own is None else own

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        return widened(self.router(x_ND, context, key, mask_N), self.experts)


class GrownRouter(nnx.Module):
    """The router `old` of the first `tasks` tasks, over the first experts, and `new` for one more.

    An old task is routed by the old computation, whatever the number of experts now; the new task
    may choose among all of them. Where rows of several tasks come together both are computed.
    """

    decision: ClassVar[Decision] = "token"
    depends_on_task: ClassVar[bool] = True

    def __init__(self, old: Router, new: TopKRouter, *, tasks: int, experts: int):
        self.old, self.new, self.tasks, self.experts, self.k = old, new, tasks, experts, new.k

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        task_B = context.task_B
        if isinstance(task_B, int):
            if task_B >= self.tasks:
                return self.new(x_ND, context, key, mask_N)
            return widened(self.old(x_ND, context, key, mask_N), self.experts)
        # The old router has nothing for the new task: its rows get some decision that nobody takes.
        known = replace(context, task_B=jnp.minimum(task_B, self.tasks - 1))
        old = widened(self.old(x_ND, known, key, mask_N), self.experts)
        new = widened(self.new(x_ND, context, key, mask_N), self.experts)
        here_N = task_of_tokens(context, x_ND.shape[0]) >= self.tasks

        def chosen(of_old: Array, of_new: Array) -> Array:
            here = here_N.reshape(-1, *(1,) * (of_old.ndim - 1))
            # Chosen, never mixed: the old tasks' decisions keep their bits.
            return jnp.where(here, of_new, of_old)

        return jax.tree.map(chosen, old, new)

    def of_task(self, task: int) -> Router:
        """The router of one task by itself, sharing no array with this one."""
        if task >= self.tasks:
            return nnx.clone(self.new)
        alone = self.old.of_task(task)  # type: ignore[attr-defined]
        return WidenedRouter(alone, self.experts)


class Grown(NamedTuple):
    """The larger model, and what is new in it.

    free: the structure of its parameters with bool arrays that broadcast to them, True where a
    number is new; `train.optim.only` trains just these.
    """

    model: Any
    free: module.Tree


def add_task(
    model: MultiTaskTrunk, task: str, channels: int, *, experts: int = 0, rngs: nnx.Rngs
) -> Grown:
    """A copy of a model with one router per task that knows `task` too.

    `experts` fresh experts join every MoE layer. The old tasks never reach them and have the very
    numbers they had: with a backend that computes each row by itself (`blocks`, what auto is on
    CPU) their outputs are equal bit for bit as long as only what is `free` is trained. The new
    task may choose any expert. Mod-Squad (arXiv:2212.08066), section on new tasks, and 2306.17165
    for new experts; the published code's freeze has no effect, this one has.

    Raises UserError for a task that is there, for other kinds of router and for a model with a
    branch between the heads, whose old tasks would see the new one.
    """
    _check(model, task, channels, experts)
    tasks = len(model.tasks)
    # A copy: the caller's model stays as it is.
    model = module.merge(*module.split(model))
    free: dict[str, Any] = {}
    for path, layer in surgery.find(model, MoE).items():
        free |= _grow_layer(model, path, layer, tasks, experts, rngs)
    for path, vectors in surgery.find(model, TaskBias).items():
        bias_JD = vectors.bias.get_value()
        fresh_1D = trunc_normal(rngs.params(), (1, bias_JD.shape[1]))
        vectors.bias.set_value(jnp.concatenate([bias_JD, fresh_1D]))
        free[f"{path}/bias"] = _rows_from(tasks, vectors.bias.get_value())
    config: Any = model.config
    model.heads[task] = UpConvHead(
        config.width,
        channels,
        upsamplings(config.patch),
        channels=config.head_channels,
        dtype=model.dtype,
        rngs=rngs,
    )
    model.tasks = (*model.tasks, task)
    return Grown(model, _mask(model, free, f"heads/{task}/"))


def _grow_layer(
    model: Any, path: str, layer: Any, tasks: int, experts: int, rngs: nnx.Rngs
) -> dict[str, Any]:
    """Grow one MoE layer in place; what is new in it, by path of parameter."""
    router, before = layer.router, layer.experts.count
    first = router if isinstance(router, MultiGateRouter) else _first(router)
    width = first.kernel.shape[1]
    options: dict[str, Any] = {"select": first.select, "noise": first.noise, "rngs": rngs}
    new = LinearRouter(width, before + experts, first.k, **options)
    grown = GrownRouter(router, new, tasks=tasks, experts=before + experts)
    surgery.replace(model, f"{path}/router", grown)
    free: dict[str, Any] = {f"{path}/router/new/kernel": np.True_}
    if experts:
        surgery.replace(model, f"{path}/experts", layer.experts.more(experts, rngs=rngs))
        stacks = module.flatten(module.split(surgery.get(model, f"{path}/experts")).params)
        free |= {f"{path}/experts/{n}": _rows_from(before, stack) for n, stack in stacks.items()}
    return free


def _first(router: GrownRouter) -> MultiGateRouter:
    old: Any = router.old
    return old if isinstance(old, MultiGateRouter) else _first(old)


def _rows_from(first: int, array: Array) -> np.ndarray:
    rows = np.arange(array.shape[0]) >= first
    return rows.reshape(-1, *(1,) * (array.ndim - 1))


def _mask(model: Any, free: dict[str, Any], head: str) -> module.Tree:
    """Which parameters are new: those in `free`, and the head."""
    flat = module.flatten(module.split(model).params)
    missing = set(free) - set(flat)
    assert not missing, missing
    named = {name: free.get(name, np.bool_(name.startswith(head))) for name in flat}
    return module.unflatten(named)


def _check(model: MultiTaskTrunk, task: str, channels: int, experts: int) -> None:
    if task in model.tasks:
        raise UserError(f"The model has a task {task} already; choose another name.")
    if channels < 1 or experts < 0:
        raise UserError(
            f"A new task needs a channel or more, and may bring experts; {channels} channels and "
            f"{experts} experts are neither."
        )
    if len(model.tam):
        raise UserError("A model with TAM levels mixes its tasks: no task can be added to it.")
    for path, layer in surgery.find(model, MoE).items():
        if not isinstance(layer.router, MultiGateRouter | GrownRouter):
            raise UserError(
                f"The router of {path} ({type(layer.router).__name__}) is not one per task: no "
                "task can be added to it."
            )
