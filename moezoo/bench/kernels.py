"""Kernels of rows in blocks of experts: how far off they are, and how fast with which tiles.

For `moezoo bench gpu` and for tests on a GPU. Products are `plain` (rows times matrices, a bias, an
activation) or `gated` (two products that meet, `gated_matmul`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.nn.causal_attention import KeyValues, attend, visible
from moezoo.nn.layers import gelu
from moezoo.ops import grouped_matmul, mosaic_products, triton_products
from moezoo.ops.attention import by_kernel
from moezoo.ops.gated_matmul import gated_matmul
from moezoo.ops.grouped_matmul import Groups, Tables
from moezoo.ops.mosaic_products import MosaicTiles
from moezoo.ops.triton_products import TritonTiles
from moezoo.timing import seconds

# Also those in which blocks are partly or never full, widths odd, steps fewer than stages.
CHECKED = (
    *((4096, 384, 384, 16, 4), (2048, 768, 1536, 4, 2), (300, 64, 64, 8, 1), (64, 128, 256, 2, 1)),
    *((1, 128, 128, 4, 2), (1000, 72, 200, 5, 3), (512, 192, 192, 4, 2)),
)
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}  # of the largest number, at highest precision


class BlockedRows(NamedTuple):
    """Rows in blocks of experts, what multiplies them, a cotangent; holds_S: not empty."""

    x_SD: Any
    w_EDF: Any
    b_EF: Any
    groups: Groups
    dy_SF: Any
    holds_S: Any


def rows_of(shape: tuple[int, ...], dtype: str, seed: int = 0) -> BlockedRows:
    """Uneven groups, one of them empty; NaN in the blocks that are not in use."""
    tokens, width, hidden, experts, k = shape
    rng, rows = np.random.default_rng(seed), tokens * k
    block = grouped_matmul.rows_of_block(rows, experts)
    shares = rng.dirichlet(np.full(experts, 5.0)) * (np.arange(experts) != experts // 2)
    size_E = np.floor(shares / shares.sum() * rows).astype(np.int32)
    count_E = np.maximum(-(-size_E // block), 1)
    last_E, blocks = np.cumsum(count_E), rows // block + experts
    row_PB = np.arange(block) + block * (np.arange(blocks)[:, None])
    expert_P = np.minimum(np.searchsorted(last_E, np.arange(blocks), side="right"), experts - 1)
    begin_E = (last_E - count_E) * block
    holds_S = (row_PB < (begin_E + size_E)[expert_P][:, None]).reshape(-1)
    used_S = np.arange(blocks * block) < last_E[-1] * block
    keys = jax.random.split(jax.random.key(seed), 4)
    s = blocks * block
    forms = ((s, width), (experts, width, hidden), (experts, hidden), (s, hidden))
    x, w, b, dy = (
        jax.random.normal(key, form, dtype) for key, form in zip(keys, forms, strict=True)
    )
    empty = jnp.where(used_S, 0.0, jnp.nan).astype(dtype)[:, None]
    x, dy = (jnp.where(holds_S[:, None], a, empty) for a in (x, dy))
    groups = Groups(*(jnp.asarray(a, jnp.int32) for a in (expert_P, last_E - count_E, last_E)))
    return BlockedRows(x, w / width**0.5, b, groups, dy, jnp.asarray(holds_S))


def each_expert(
    rows: BlockedRows, one: Callable[..., Any], stacks: tuple[Any, ...], width: int
) -> Any:
    """`one(whose rows, stacks of an expert)` of each row, one expert after the other over all."""
    expert_S = jnp.repeat(rows.groups.expert_P, rows.x_SD.shape[0] // len(rows.groups.expert_P))

    def add(y_SF: Any, own: Any) -> tuple[Any, None]:
        mine_S1 = (rows.holds_S & (expert_S == own[0]))[:, None]
        return jnp.where(mine_S1, one(mine_S1, *own[1:]), y_SF), None

    y_SF = jnp.zeros((rows.x_SD.shape[0], width), jnp.float32)
    return jax.lax.scan(add, y_SF, (jnp.arange(stacks[0].shape[0]), *stacks))[0]


def exact(x_SD: Any, mine_S1: Any, w_DF: Any) -> Any:
    """A product of those rows in float32."""
    x = jnp.where(mine_S1, x_SD, 0).astype(jnp.float32)
    return jnp.matmul(x, w_DF.astype(jnp.float32), precision="highest")


def plain(rows: BlockedRows, x_SD: Any, w_EDF: Any, b_EF: Any) -> Any:
    """The same product and activation, in float32."""

    def one(mine_S1: Any, w_DF: Any, b_F: Any) -> Any:
        return exact(x_SD, mine_S1, w_DF) + b_F.astype(jnp.float32)

    y_SF = each_expert(rows, one, (w_EDF, b_EF), w_EDF.shape[2])
    return jnp.where(rows.holds_S[:, None], gelu(y_SF), 0.0)


def plain_gated(rows: BlockedRows, x_SD: Any, gate_EDF: Any, up_EDF: Any) -> Any:
    """The same of gated experts."""

    def one(mine_S1: Any, gate_DF: Any, up_DF: Any) -> Any:
        return jax.nn.silu(exact(x_SD, mine_S1, gate_DF)) * exact(x_SD, mine_S1, up_DF)

    return each_expert(rows, one, (gate_EDF, up_EDF), gate_EDF.shape[2])


def differences(shape: tuple[int, ...], dtype: str) -> dict[str, float]:
    """How far the kernels' value and derivatives are off, relative to the largest number."""
    rows = rows_of(shape, dtype)
    multiply: Any = grouped_matmul.grouped_matmul

    def ours(*arrays: Any) -> Any:
        return multiply(*arrays, rows.groups, gelu)

    given = rows.x_SD, rows.w_EDF, rows.b_EF
    names = "value", "rows", "matrices", "biases"
    return apart(rows, ours, partial(plain, rows), given, names)


def gated_differences(shape: tuple[int, ...], dtype: str) -> dict[str, float]:
    """The same of both products of gated experts in one pass."""
    rows = rows_of(shape, dtype)

    def ours(x: Any, gate: Any, up: Any) -> Any:
        return gated_matmul(x, gate, up, rows.groups, jax.nn.silu)

    given = rows.x_SD, rows.w_EDF, second(rows.w_EDF)
    names = "value", "rows", "gates", "ups"
    return apart(rows, ours, partial(plain_gated, rows), given, names)


def second(w_EDF: Any) -> Any:
    """Other matrices of the same size."""
    return jnp.flip(w_EDF, axis=(1, 2))


def apart(
    rows: BlockedRows,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    given: tuple[Any, ...],
    names: tuple[str, ...],
) -> dict[str, float]:
    """By name, how far one function's value and derivatives are off, over the largest number."""
    holds_S1 = rows.holds_S[:, None]

    def both(call: Callable[..., Any], dy: Any) -> Callable[..., Any]:
        def value_and_derivatives(*arrays: Any) -> Any:
            y, pull = jax.vjp(call, *arrays)
            return y, *pull(dy.astype(y.dtype))

        return jax.jit(value_and_derivatives)

    found = both(ours, rows.dy_SF)(*given)
    truth = both(theirs, jnp.where(holds_S1, rows.dy_SF, 0.0))(*given)
    off: dict[str, float] = {}
    for name, mine, right in zip(names, found, truth, strict=True):
        if name in ("value", "rows"):
            mine, right = (jnp.where(holds_S1, a, 0) for a in (mine, right))
        most = jnp.max(jnp.abs(mine.astype(jnp.float32) - right.astype(jnp.float32)))
        off[name] = float(most / jnp.maximum(jnp.max(jnp.abs(right)), 1e-30))
    return off


PRODUCTS = {"plain": differences, "gated": gated_differences}


def compared(shapes: tuple[tuple[int, ...], ...], threads: int) -> list[dict[str, Any]]:
    """Every product, shape and type; gated ones last, because nothing takes them by itself yet."""

    def one(case: tuple[str, tuple[int, ...], str]) -> dict[str, Any]:
        name, shape, dtype = case
        with jax.default_matmul_precision("highest"):  # each thread has its own
            apart = PRODUCTS[name](shape, dtype)
        return {"product": name, "shape": shape, "dtype": dtype, "apart": apart}

    # Most of the time goes to compiling, which several threads do at once.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, product(PRODUCTS, shapes, LIMITS)))


def within(row: dict[str, Any]) -> bool:
    """Whether all are close enough; NaN is not."""
    return all(off <= LIMITS[row["dtype"]] for off in row["apart"].values())


def wrong(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are too far off, or no number."""
    return [row for row in rows if not within(row)]


# Tiles to time: of which product, then Mosaic's or Triton's.
CANDIDATES: dict[str, dict[str, tuple[Any, ...]]] = {
    "plain": {
        "mosaic": (
            *(MosaicTiles(128, 128, True, near) for near in (4, 8, 16)),
            *(MosaicTiles(64, 256, False, near) for near in (4, 8, 16)),
            MosaicTiles(64, 128, False), MosaicTiles(64, 128, True), MosaicTiles(64, 192, False),
        ),
        "triton": tuple(TritonTiles(*numbers) for numbers in (
            (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (128, 256, 64, 8, 3),
            (128, 256, 64, 8, 4), (128, 256, 32, 8, 4), (128, 64, 64, 4, 4),
        )),
    },
    "gated": {
        "mosaic": (
            *(MosaicTiles(64, 128, False, near) for near in (4, 8, 16)),
            MosaicTiles(128, 64, True), MosaicTiles(64, 64, False),
        ),
        "triton": tuple(TritonTiles(*numbers) for numbers in (
            (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3),
        )),
    },
}  # fmt: skip


def tables_of(product_name: str, kind: str, tiles: Any) -> Tables:
    """The measured tables with these tiles in place of all others of that product and kind."""
    here = grouped_matmul.tables_here()
    if kind == "triton":
        named = ("rows", "small") if product_name == "plain" else ("gated", "joined")
        triton = triton_products.TABLE._replace(**dict.fromkeys(named, (tiles, tiles)))
        return Tables(None, triton)
    named = ("rows", "matrices") if product_name == "plain" else ("gated", "joined")
    mosaic = mosaic_products.TABLE._replace(**dict.fromkeys(named, (tiles,)))
    return here._replace(mosaic=mosaic)


def timed(name: str, rows: BlockedRows, tables: Tables | None) -> dict[str, Callable[[], Any]]:
    """Calls of a product under these tables, `forward` and with its derivatives, `both`.

    `two passes` is the gated one as two plain products, under the measured tables.
    """
    x, w, b, groups, dy, _ = rows
    multiply: Any = grouped_matmul.grouped_matmul

    def plain(x: Any, w: Any, b: Any) -> Any:
        return multiply(x, w, b, groups, tables=tables)

    def gated(x: Any, w: Any, up: Any) -> Any:
        return gated_matmul(x, w, up, groups, jax.nn.silu, tables=tables)

    def twice(x: Any, w: Any, up: Any) -> Any:
        return multiply(x, w, None, groups, jax.nn.silu) * multiply(x, up, None, groups)

    call = {"plain": plain, "gated": gated, "two passes": twice}[name]
    given = x, w, b if name == "plain" else second(w)

    def both(x: Any, w: Any, last: Any, dy: Any) -> Any:
        y, pull = jax.vjp(call, x, w, last)
        return y, pull(dy)

    forward, pulled = jax.jit(call), jax.jit(both)
    return {"forward": lambda: forward(*given), "both": lambda: pulled(*given, dy)}


def tile_times(
    shapes: tuple[tuple[int, ...], ...], dtype: str, few: bool
) -> Iterator[dict[str, Any]]:
    """Milliseconds by shape, product and tiles, the median of 10; few: of one candidate a kind."""
    for shape in shapes:
        rows = rows_of(shape, dtype)
        yield {"shape": shape, "product": "two passes"} | times_of(timed("two passes", rows, None))
        for name, kinds in CANDIDATES.items():
            for kind, candidates in kinds.items():
                for tiles in candidates[:1] if few else candidates:
                    found = times_of(timed(name, rows, tables_of(name, kind, tiles)))
                    yield {"shape": shape, "product": name, "kernels": kind, "tiles": tiles} | found


def times_of(calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Milliseconds of each call, or the error of tiles that do not fit the shape or the card."""
    found: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            found[name] = 1e3 * median(call)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


def median(call: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of a call that has run once before."""
    jax.block_until_ready(call())
    return float(np.median([seconds(call) for _ in range(repeats)]))


def attention_times(shape: tuple[int, int, int, int, int, bool]) -> dict[str, Any]:
    """Milliseconds of attention and of its derivatives in bfloat16, both ways.

    shape: examples, tokens, heads, heads of keys, width of a head, whether a token sees those
    before it only. apart: the largest difference of values over the largest value.
    """
    batch, tokens, heads, groups, width, causal = shape
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (batch, tokens, count, width), "bfloat16")
        for key, count in zip(keys, (heads, groups, groups), strict=True)
    )
    seen = visible(None, None, batch, tokens) if causal else None

    def plain(q: Any, k: Any, v: Any) -> Any:
        everyone = jnp.ones((batch, tokens, tokens), bool) if seen is None else seen
        return attend(q, KeyValues(k, v), everyone)

    def kernel(q: Any, k: Any, v: Any) -> Any:
        return by_kernel(q, k, v, seen)

    row: dict[str, Any] = {"shape": shape}
    for name, call in (("plain", plain), ("kernel", kernel)):

        def both(q: Any, k: Any, v: Any, call: Any = call) -> Any:
            y, pull = jax.vjp(call, q, k, v)
            return y, pull(y)

        forward, pulled = jax.jit(call), jax.jit(both)
        calls = {"forward": partial(forward, q, k, v), "both": partial(pulled, q, k, v)}
        row[name] = times_of(calls)
    right, found = (jax.jit(call)(q, k, v).astype(jnp.float32) for call in (plain, kernel))
    return row | {"apart": float(jnp.abs(found - right).max() / jnp.abs(right).max())}
