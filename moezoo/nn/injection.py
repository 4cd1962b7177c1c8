"""Updates and adapters put into a built model by path: on linear layers, and beside sub-layers.

A linear layer with an update is frozen below it and can be folded into one layer again. An adapter
stands beside a sub-layer, and a module may have one copy for every task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn import surgery
from moezoo.nn.condition_routers import ConditionRouter
from moezoo.nn.context import Context, LayerOutput, apply_linear
from moezoo.nn.layers import Linear
from moezoo.nn.lowrank import LowRank

PLAIN = Context()

MakeUpdate = Callable[[int, int], LowRank]  # (inputs, outputs)


class Frozen(nnx.Variable):
    """A pretrained array: no parameter, so no optimiser sees it or keeps moments of it."""


class Adapted(nnx.Module):
    """y = base(x) + update(x); the sum is in the type of the base's output."""

    wants_context: ClassVar[bool] = True

    def __init__(self, base: Linear, update: LowRank):
        self.base, self.update = base, update

    @property
    def router(self) -> Any:
        """The update's router, None where nothing is routed."""
        return self.update.router

    def __call__(self, x: Array, context: Context = PLAIN) -> LayerOutput:
        """x [..., D] to [..., O], and the router's record; the leading axes are B rows of tokens.

        Dropout and noise act in training only.
        """
        y = self.base(x)
        mask_N = None if context.mask_BT is None else context.mask_BT.reshape(-1)
        key = context.key if context.train else None
        x_ND = x.reshape(-1, x.shape[-1])
        added_NO, record = self.update(x_ND, context, key, mask_N)
        return LayerOutput(y + added_NO.reshape(y.shape).astype(y.dtype), record)

    def folded(self, task: int | None = None) -> Linear:
        """The base with the update added to its kernel, in float32 and back in the kernel's type.

        Raises UserError where the decision is neither constant nor the given task's.
        """
        kernel = self.base.kernel.get_value()
        wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        delta_DO = self.update.delta(self.update.constant_gates(task))
        self.base.kernel.set_value((wide + delta_DO).astype(kernel.dtype))
        return self.base


def inject(root: nnx.Module, patterns: Sequence[str], make: MakeUpdate) -> tuple[str, ...]:
    """Put an update on every linear layer whose path fits a pattern ("layers/*/attn/q").

    Shell wildcards; "*" crosses "/". Returns the paths, in the module's order; layers that have an
    update already are left alone.
    Raises UserError for a pattern that fits no linear layer, naming some that exist.
    """
    # The base of an update is a linear layer, too, and must not get a second one.
    taken = tuple(f"{path}/" for path in surgery.find(root, Adapted))
    layers = {p: m for p, m in surgery.find(root, Linear).items() if not p.startswith(taken)}
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in layers):
            some = ", ".join(list(layers)[:4])
            raise UserError(f"'{pattern}' fits no linear layer; some of the model's are {some}.")
    chosen = [p for p in layers if any(fnmatchcase(p, pattern) for pattern in patterns)]
    for path in chosen:
        base = layers[path]
        inputs, outputs = base.kernel.get_value().shape
        surgery.replace(root, path, Adapted(base, make(inputs, outputs)))
    return tuple(chosen)


def freeze(root: nnx.Module, dtype: Any = None, trained: Sequence[str] = ()) -> None:
    """Turn every parameter outside of updates into a `Frozen` array, of `dtype` if one is given.

    trained: patterns of further paths that stay parameters, as for `inject`.
    """

    def frozen(path: str, variable: nnx.Variable) -> nnx.Variable:
        spared = any(fnmatchcase(path, pattern) for pattern in trained)
        if spared or not isinstance(variable, nnx.Param):
            return variable
        array = variable.get_value()
        return Frozen(array if dtype is None else array.astype(dtype))

    surgery.retype(root, frozen, keep=LowRank)


def hold(root: nnx.Module, parts: Sequence[str]) -> None:
    """Turn these parts of every update ("down", "up", "router") into `Frozen` arrays, in place."""

    def frozen(path: str, variable: nnx.Variable) -> nnx.Variable:
        return Frozen(variable.get_value()) if isinstance(variable, nnx.Param) else variable

    for layer in surgery.find(root, Adapted).values():
        for name in parts:
            part = getattr(layer.update, name)
            if isinstance(part, nnx.Variable):
                setattr(layer.update, name, frozen(name, part))
            else:
                surgery.retype(part, frozen, keep=LowRank)


def fold(root: nnx.Module, task: int | None = None) -> None:
    """Replace every `Adapted` layer by the dense layer it is, for one task where tasks decide.

    Changes the module in place. Raises UserError where tokens decide.
    """
    for path, layer in surgery.find(root, Adapted).items():
        surgery.replace(root, path, layer.folded(task))


def fold_decided(root: nnx.Module, task: int) -> dict[str, surgery.MixtureSize]:
    """Fold every `Adapted` layer whose gates are the same for all tokens of a task, in place.

    Layers whose tokens decide stay. Returns by path what was mixed; plain LoRA mixes nothing.
    """
    folded = dict[str, surgery.MixtureSize]()
    for path, layer in surgery.find(root, Adapted).items():
        router = layer.router
        if router is not None and not isinstance(router, ConditionRouter):
            continue
        surgery.replace(root, path, layer.folded(task))
        if router is not None:
            size = surgery.MixtureSize(router.decision, layer.update.experts, router.k)
            folded[path] = size
    return folded


Apply = Callable[[Array], Array]
# (sub-layer, adapter, normalised input) -> what is added to the residual stream
Arrangement = Callable[[Apply, Apply, Array], Array]


def parallel(layer: Apply, adapter: Apply, x: Array) -> Array:
    """Both see the same (He et al., arXiv:2110.04366)."""
    return layer(x) + adapter(x)


def parallel_residual(layer: Apply, adapter: Apply, x: Array) -> Array:
    """And what they see is added, as it is after the norm."""
    return layer(x) + adapter(x) + x


def sequential(layer: Apply, adapter: Apply, x: Array) -> Array:
    """The adapter behind the sub-layer, in its place."""
    return adapter(layer(x))


def sequential_residual(layer: Apply, adapter: Apply, x: Array) -> Array:
    """The adapter behind the sub-layer, added to it (Houlsby et al., arXiv:1902.00751)."""
    y = layer(x)
    return y + adapter(y)


def before(layer: Apply, adapter: Apply, x: Array) -> Array:
    """The sub-layer sees what the adapter gives, and it is added once more behind."""
    y = adapter(x)
    return layer(y) + y


ARRANGEMENTS: dict[str, Arrangement] = {
    "parallel": parallel,
    "parallel_residual": parallel_residual,
    "sequential": sequential,
    "sequential_residual": sequential_residual,
    "before": before,
}


class Inserted(nnx.Module):
    """A sub-layer with an adapter, in the sub-layer's place; its old self is `base`."""

    wants_context: ClassVar[bool] = True

    def __init__(self, base: nnx.Module, adapter: nnx.Module, arrange: Arrangement):
        self.base: Any = base
        self.adapter: Any = adapter
        self.arrange = arrange

    def __call__(self, x_BTD: Array, context: Context) -> LayerOutput:
        def layer(x: Array) -> Array:
            return apply_linear(self.base, x, context, "base")

        def adapter(x: Array) -> Array:
            return apply_linear(self.adapter, x, context, "adapter")

        return LayerOutput(self.arrange(layer, adapter, x_BTD))


class PerTask(nnx.Module):
    """One module per task, each for its own rows (`context.tasks`); they lie under `of`."""

    wants_context: ClassVar[bool] = True

    def __init__(self, of: Mapping[str, nnx.Module]):
        self.of, self.names = nnx.Dict(of), tuple(of)

    def __call__(self, x_RTD: Array, context: Context) -> LayerOutput:
        """x_RTD: rows b*J + j. The records of all tasks become one."""
        count = len(context.tasks)
        if not count:
            raise ValueError("modules of single tasks need context.tasks")
        outputs, records = [], []
        for j, task in enumerate(context.tasks):
            here = _of_task(context, j, task)
            x_BTD = _rows(x_RTD, j, count)
            outputs.append(apply_linear(self.of[self.names[task]], x_BTD, here, "of"))
            records += here.records.values()
        y = jnp.stack(outputs, axis=1).reshape(-1, *outputs[0].shape[1:])
        return LayerOutput(y, _joined(records) if records else None)

    def of_task(self, task: int) -> Any:
        """The module of one task."""
        return self.of[self.names[task]]


def _rows(x: Array, j: int, count: int) -> Array:
    return x if count == 1 else x.reshape(-1, count, *x.shape[1:])[:, j]


def _of_task(context: Context, j: int, task: int) -> Context:
    """The context of one task's rows, with records of its own."""
    mask_BT, key = context.mask_BT, context.key
    return replace(
        context.collecting(),
        task_B=task,
        tasks=(task,),
        mask_BT=None if mask_BT is None else _rows(mask_BT, j, len(context.tasks)),
        # By the task's number, not its place: other tasks in the batch change nothing.
        key=None if key is None else jax.random.fold_in(key, task),
    )


def _joined(records: list[Any]) -> Any:
    """One record of several passes' tokens, one pass after the other."""
    if len(records) == 1:
        return records[0]

    def join(*parts: Array) -> Array:
        # A record's scalars are counts: they add up.
        return jnp.concatenate(parts) if parts[0].ndim else sum(parts[1:], parts[0])

    return jax.tree.map(join, *records)
