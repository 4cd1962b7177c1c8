"""What a layer or a router may look at besides tokens, and how a layer reports what it did.

Plain layers are called as `layer(x)`. A layer that stands in the place of one, an adapter with a
router for example, may ask for more: it sets the attribute `wants_context = True`, is called as
`layer(x, context)` and answers with `LayerOutput(y, record)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.layers import Init, trunc_normal
from moezoo.ops.routing import Routing
from moezoo.ops.weight_mixtures import WHOLE, Segments


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        *("task_B", "features_JF", "routing", "attributes_RA", "mask_BT", "key"),
        *("known", "summaries", "records"),
    ),
    meta_fields=("where", "prefix", "train", "path", "tasks"),
)
@dataclass(frozen=True)
class Context:
    """One pass of a model, as its layers and routers see it: all they may look at besides tokens.

    task_B: int32 [B], the task of each batch row, whose T tokens lie together; or a Python int,
    which makes the program special to that task; or an int32 scalar.
    features_JF: float [J, F] learned features of every task, for routers that append them.
    routing: a decision taken elsewhere, for layers that share it (`GivenRouter`).
    attributes_RA: float [R, A] attributes of R rows that decide for their tokens
    (`AttributeRouter`). where: which of these rows each token belongs to.
    mask_BT: bool, False = padding, which no statistic may count; None = no padding.
    prefix: how many tokens of each sequence all others may see, None = all; summaries are of them.
    known: summaries by path, where the prefix was read before.
    train: whether this is a training pass (dropout, routers that explore).
    key: randomness of the pass; None = no randomness. A layer is handed a key of its own.
    path: where in the model we are; a layer finds its own path here.
    records: filled by `apply_linear` and by levels, `{path: record}`; summaries likewise.
    tasks: the numbers of J tasks where rows are those of B examples, row b*J + j for task
    `tasks[j]`; () where tasks share their rows.
    """

    task_B: Array | int = 0
    features_JF: Array | None = None
    routing: Routing | None = None
    attributes_RA: Array | None = None
    where: Segments = WHOLE
    mask_BT: Array | None = None
    prefix: int | None = None
    known: Mapping[str, Array] | None = None
    train: bool = False
    key: Array | None = None
    path: str = ""
    records: dict[str, Any] = field(default_factory=dict)
    summaries: dict[str, Array] = field(default_factory=dict)
    tasks: tuple[int, ...] = ()

    def within(self, name: str) -> Context:
        """The same one level deeper; records and summaries go to the same dictionaries."""
        return replace(self, path=f"{self.path}/{name}" if self.path else name)

    def collecting(self) -> Context:
        """The same with empty dictionaries, for a pass of its own or one that JAX traces apart."""
        return replace(self, records={}, summaries={})


NO_TASK = Context()


class LayerOutput(NamedTuple):
    """What a layer that wants the context gives.

    y: [..., out].   record: a pytree of arrays for losses and statistics, or None.
    """

    y: Array
    record: Any = None


def task_of_tokens(context: Context, tokens: int) -> Array:
    """The task of each of `tokens` rows, int32 [N]."""
    task_B = jnp.atleast_1d(jnp.asarray(context.task_B, jnp.int32))
    rows = task_B.shape[0]
    # Not jnp.repeat, which cannot be exported with a symbolic number of tokens.
    return jnp.broadcast_to(task_B[:, None], (rows, tokens // rows)).reshape(tokens)


class TaskBias(nnx.Module):
    """One learned vector per task, added to all tokens of its rows; bias [J, D]."""

    def __init__(self, tasks: int, width: int, *, init: Init = trunc_normal, rngs: nnx.Rngs):
        self.bias = nnx.Param(init(rngs.params(), (tasks, width)))

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        """x_BTD plus the vector of each row's task, in the type of x."""
        bias_JD, task_B = self.bias.get_value(), context.task_B
        if jnp.ndim(task_B) == 0:
            return x_BTD + bias_JD[task_B].astype(x_BTD.dtype)
        # A product with one-hot rows picks exactly, and its derivative is no scatter.
        hot_BJ = jax.nn.one_hot(task_B, bias_JD.shape[0])
        bias_BD = jnp.matmul(hot_BJ, bias_JD, precision=jax.lax.Precision.HIGHEST)
        return x_BTD + bias_BD[:, None].astype(x_BTD.dtype)

    def of_task(self, task: int) -> FixedBias:
        """What it adds for one task, whatever the context says; shares no array with this one."""
        return FixedBias(self.bias.get_value()[task])


class FixedBias(nnx.Module):
    """A learned vector that is added to all tokens; bias [D]."""

    def __init__(self, bias_D: Array):
        self.bias = nnx.Param(bias_D)

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        return x_BTD + self.bias.get_value().astype(x_BTD.dtype)


def apply_linear(layer: Any, x: Array, context: Context, name: str) -> Array:
    """`layer(x)`, or `layer(x, context)` where the layer wants it, its record then kept.

    name: the layer's attribute, which together with `context.path` makes the path of its record.
    """
    if not getattr(layer, "wants_context", False):
        return layer(x)
    here = context.within(name)
    if here.key is not None:
        # By name, so that the number of adapted layers before it changes nothing.
        here = replace(here, key=jax.random.fold_in(here.key, crc32(here.path.encode())))
    y, record = layer(x, here)
    if record is not None:
        context.records[here.path] = record
    return y
