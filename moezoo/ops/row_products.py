"""What a kernel makes of rows in blocks of one expert each, in whatever language it is written.

A form says which operands are multiplied and what becomes of the sums; `mosaic_products` and
`triton_products` run forms. Left operands are rows [S, D] in P blocks, right ones are stacked
matrices [E, D, F] (`transposed`: [E, F, D]), of which each block takes its own expert's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from jax import Array, lax

from moezoo.ops.expert import Activation
from moezoo.ops.kernel_activations import applied

RowKernel = Literal["rows", "gated", "joined"]


class ProductForm(NamedTuple):
    """One kernel of rows.

    kind: where tables have its tiles. pairs: which left operand times which right one adds to which
    sum. results: of the sums and the expert's bias, or None where it has none, all float32, one
    array for each of so many `outputs`.
    """

    kind: RowKernel
    pairs: tuple[tuple[int, int, int], ...]
    transposed: bool
    biased: bool
    outputs: int
    results: Callable[..., tuple[Array, ...]]

    @property
    def lefts(self) -> int:
        """Number of left operands; right ones follow them, then perhaps biases."""
        return 1 + max(left for left, _, _ in self.pairs)

    @property
    def sums(self) -> int:
        """Number of sums."""
        return 1 + max(total for _, _, total in self.pairs)

    def width(self, arrays: tuple[Array, ...]) -> int:
        """Columns of the results."""
        return arrays[self.lefts].shape[1 if self.transposed else 2]


def one_product(
    *,
    transposed: bool = False,
    biased: bool = False,
    activation: Activation | None = None,
    keep: bool = False,
) -> ProductForm:
    """Rows times matrices, plus the bias, through the activation; keep: before it, too, first."""

    def results(value: Array, b_C: Array | None) -> tuple[Array, ...]:
        if b_C is not None:
            value += lax.broadcast_in_dim(b_C, value.shape, (1,))
        last = value if activation is None else applied(activation, value)
        return (value, last) if keep else (last,)

    return ProductForm("rows", ((0, 0, 0),), transposed, biased, 1 + keep, results)


def gated(activation: Activation, *, keep: bool = False) -> ProductForm:
    """The activation of rows times one matrix, times rows times another one; rows are read once.

    keep: both products first.
    """

    def results(before: Array, up: Array, _: None) -> tuple[Array, ...]:
        last = applied(activation, before) * up
        return (before, up, last) if keep else (last,)

    return ProductForm("gated", ((0, 0, 0), (0, 1, 1)), False, False, 3 if keep else 1, results)


def joined() -> ProductForm:
    """Two left operands, each times the transpose of its own matrix, in one sum."""
    return ProductForm("joined", ((0, 0, 0), (1, 1, 0)), True, False, 1, lambda value, _: (value,))
