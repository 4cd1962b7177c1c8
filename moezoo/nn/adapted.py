"""Linear layers with an update added: injected by path, frozen below, folded away again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn import surgery
from moezoo.nn.context import Context, LayerOutput
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
        added_NO, record = self.update(x_ND, context.condition, key, mask_N)
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


def fold(root: nnx.Module, task: int | None = None) -> None:
    """Replace every `Adapted` layer by the dense layer it is, for one task where tasks decide.

    Changes the module in place. Raises UserError where tokens decide.
    """
    for path, layer in surgery.find(root, Adapted).items():
        surgery.replace(root, path, layer.folded(task))
