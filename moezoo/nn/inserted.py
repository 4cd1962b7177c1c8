"""Where an adapter stands beside a sub-layer, and modules of which every task has its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.context import Context, LayerOutput, apply_linear

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
        condition=context.condition._replace(task_B=task),
        tasks=(task,),
        mask_BT=None if mask_BT is None else _rows(mask_BT, j, len(context.tasks)),
        key=None if key is None else jax.random.fold_in(key, task),
    )


def _joined(records: list[Any]) -> Any:
    """One record of several passes' tokens, one pass after the other."""
    if len(records) == 1:
        return records[0]

    def join(*parts: Array) -> Array:
        return jnp.concatenate(parts) if parts[0].ndim else sum(parts[1:], parts[0])

    return jax.tree.map(join, *records)
