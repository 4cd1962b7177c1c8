"""What a layer may be told about the tokens it sees, and how it reports what it did with them.

Plain layers are called as `layer(x)`. A layer that stands in the place of one, an adapter with a
router for example, may ask for more: it sets the attribute `wants_context = True`, is called as
`layer(x, context)` and answers with `LayerOutput(y, record)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from zlib import crc32

import jax
from jax import Array

from moezoo.nn.condition import NO_TASK, Condition


class LayerOutput(NamedTuple):
    """What a layer that wants the context gives.

    y: [..., out].   record: a pytree of arrays for losses and statistics, or None.
    """

    y: Array
    record: Any = None


@dataclass(frozen=True)
class Context:
    """One pass of a model, as its layers see it.

    condition: the task of every row and whatever else decides.
    mask_BT: bool, False = padding, which no statistic may count; None = no padding.
    train: whether this is a training pass (dropout, routers that explore).
    key: randomness of the pass; None = no randomness. A layer is handed a key of its own.
    path: where in the model we are; a layer finds its own path here.
    records: filled by `apply_linear`, `{path: record}`.
    tasks: the numbers of J tasks where rows are those of B examples, row b*J + j for task
    `tasks[j]`; () where tasks share their rows.
    """

    condition: Condition = NO_TASK
    mask_BT: Array | None = None
    train: bool = False
    key: Array | None = None
    path: str = ""
    records: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[int, ...] = ()

    def within(self, name: str) -> Context:
        """The same one level deeper; records still go to the same dictionary."""
        return replace(self, path=f"{self.path}/{name}" if self.path else name)

    def collecting(self) -> Context:
        """The same with an empty dictionary of records, for a function that JAX traces apart."""
        return replace(self, records={})


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
