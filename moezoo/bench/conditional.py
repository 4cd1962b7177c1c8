"""A block whose linear maps a condition mixes against the same block without, on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.backbones.conditional import ConditionalBlock, ConditionalMake, DenseMake, MakeMaps
from moezoo.command import parse
from moezoo.domains.pairs.conditions import fold
from moezoo.errors import UserError
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.nn.condition_routers import AttributeRouter
from moezoo.nn.conditional import RowLevel
from moezoo.nn.context import Context
from moezoo.ops.weight_mixtures import Segments
from moezoo.timing import TimedCall, Times, interleave, machine, versions
from moezoo.train.console import Console

ATTRIBUTES = ((1, 1, 0, 1, 1, 0, 0, 0), (1, 1, 0, 1, 0, 1, 0, 1))  # a caption's image and text


@dataclass(frozen=True)
class ConditionalArguments:
    """Time a block with attribute routing, and what a condition leaves of it, beside a dense one.

    Example: moezoo bench conditional --json conditional.json
    """

    batch: int = 32
    """Sequences of a batch."""
    tokens: int = 128
    """Tokens of a sequence; with two rows the second half is under the second one."""
    width: int = 256
    """Features of a token."""
    heads: int = 4
    """Attention heads."""
    experts: int = 8
    """Linear maps in the place of each one."""
    top_k: int = 2
    """Maps that are mixed."""
    rows: int = 1
    """Rows of attributes: 1, or 2 as for captions."""
    repeats: int = 15
    """Paired repeats."""
    json: Path | None = None
    """File for the numbers."""


class ConditionalCase(NamedTuple):
    """Calls by mode, and floating-point operations of the compiled programs by mode."""

    runs: dict[str, TimedCall]
    flops: dict[str, float]


def context_of(a: ConditionalArguments) -> Context:
    """What the block is told: one row of attributes for all tokens, or one for each half."""
    where = Segments() if a.rows == 1 else Segments((a.tokens // 2,), (0, 1))
    rows_RA = jnp.asarray(ATTRIBUTES[: a.rows], jnp.float32)
    return Context(attributes_RA=rows_RA, where=where)


def conditional(a: ConditionalArguments) -> MakeMaps:
    """Maps that an attribute router mixes."""

    def level(rngs: nnx.Rngs) -> RowLevel:
        return RowLevel(AttributeRouter(8, a.width, a.experts, a.top_k, rngs=rngs))

    return ConditionalMake(level, a.experts)


def block_of(a: ConditionalArguments, make: MakeMaps) -> ConditionalBlock:
    """A fresh block."""
    sizes = (a.width, a.heads, 4 * a.width, make)
    return ConditionalBlock(*sizes, layer_scale=1.0, rngs=nnx.Rngs(0))


def specialised(a: ConditionalArguments) -> ConditionalBlock:
    """What the condition leaves of a conditional block."""
    block = block_of(a, conditional(a))
    fold(block, context_of(a), "block")
    return block


def case(
    a: ConditionalArguments, block: ConditionalBlock, modes: tuple[str, ...]
) -> ConditionalCase:
    """The compiled forward pass, and with it gradients of all parameters and of the input."""
    parts = module.split(block)
    x_BTD = jax.random.normal(jax.random.key(2), (a.batch, a.tokens, a.width))
    seen_BTT = jnp.ones((1, a.tokens, a.tokens), bool)

    def forward(params: Any, x_BTD: jax.Array) -> jax.Array:
        return module.merge(parts.definition, params, {})(x_BTD, context_of(a), seen_BTT)[0]

    def loss(params: Any, x_BTD: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(forward(params, x_BTD)))

    every: dict[str, Any] = {"forward": forward, "training": jax.grad(loss, argnums=(0, 1))}
    runs, flops = {}, {}
    for mode in modes:
        compiled = jax.jit(every[mode]).lower(parts.params, x_BTD).compile()
        runs[mode] = partial(compiled, parts.params, x_BTD)
        analysed: Any = compiled.cost_analysis()
        flops[mode] = float(analysed["flops"])
    return ConditionalCase(runs, flops)


def measure(a: ConditionalArguments, console: Console) -> list[dict[str, Any]]:
    """One row per block and mode, over the dense block's."""
    base = case(a, block_of(a, DenseMake()), ("forward", "training"))
    cases = {
        "specialised": case(a, specialised(a), ("forward",)),
        "attribute MoE": case(a, block_of(a, conditional(a)), ("forward", "training")),
    }
    rows = []
    for mode in base.runs:
        own = {name: c.runs[mode] for name, c in cases.items() if mode in c.runs}
        last: dict[str, Times] = {}
        with console.progress(mode, a.repeats, unit="repeats") as bar:
            for number, times_so_far in enumerate(interleave(base.runs[mode], own, a.repeats), 1):
                last = times_so_far
                bar.update(number)
        for name, times in last.items():
            low, middle, high = map(float, np.quantile(times.ratios, [0.25, 0.5, 0.75]))
            flops = cases[name].flops[mode]
            row = {"block": name, "mode": mode, "ratio": middle, "low": low, "high": high}
            row |= {"milliseconds": 1e3 * float(np.median(times.case)), "flops": flops}
            rows.append(row | {"flops_ratio": flops / base.flops[mode]})
    return rows


def check(a: ConditionalArguments) -> None:
    """Raise UserError for sizes that make no block."""
    if a.rows not in (1, 2):
        raise UserError(f"rows is {a.rows}; a sequence has 1 or 2 rows of attributes.")
    for name in ("batch", "tokens", "width", "heads", "experts", "repeats"):
        if getattr(a, name) < 1:
            raise UserError(f"{name} is {getattr(a, name)}; it must be at least 1.")
    if a.width % a.heads:
        raise UserError(f"heads is {a.heads}; it must divide the width {a.width}.")
    if not 1 <= a.top_k <= a.experts:
        raise UserError(f"top_k is {a.top_k}; it must be between 1 and experts, {a.experts}.")


def run(words: list[str]) -> int:
    """Time, print a table, write the file."""
    a = parse(ConditionalArguments, words, prog="moezoo bench conditional")
    check(a)
    check_file(a.json)
    console = Console()
    rows = measure(a, console)
    title = f"{a.batch} x {a.tokens} tokens, {a.width} wide, {a.experts} maps, against dense"
    columns = ("block", "mode", "milliseconds", "ratio", "flops_ratio")
    shown = ("block", "mode", "ms", "ratio", "FLOPs ratio")
    console.table(title, shown, [tuple(row[c] for c in columns) for row in rows])
    if a.json is not None:
        facts = {"machine": machine(), "versions": versions("jax", "jaxlib")}
        write_atomically(a.json, json_text(facts | {"rows": rows}, 2))
    return 0
