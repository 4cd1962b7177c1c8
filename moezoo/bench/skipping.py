"""A vision transformer whose MLPs skip tokens (DyT) beside the one that skips none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moezoo.bench.adapters import measured
from moezoo.command import parse
from moezoo.errors import UserError
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.models.dyt.model import DyTConfig, Skip, complete, gathered, masked
from moezoo.nn import module
from moezoo.timing import TimedCall, machine, versions
from moezoo.train.console import Console


@dataclass(frozen=True)
class SkippingArguments:
    """Time the blocks of a DyT whose MLPs compute some of the tokens, and of one that computes all.

    masked computes all tokens and sets what is skipped to 0; gathered computes a number of rows.
    Example: moezoo bench skipping --json skipping.json
    """

    images: int = 4
    """Images of a batch."""
    side: int = 224
    """Height and width of an image."""
    width: int = 384
    """Features of a token."""
    depth: int = 12
    """Blocks."""
    heads: int = 6
    """Attention heads."""
    patch: int = 16
    """Side of a patch."""
    bottleneck: int = 64
    """Hidden units of an adapter."""
    rooms: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the tokens that there are rows for."""
    repeats: int = 9
    """Paired repeats."""
    json: Path | None = None
    """File for the numbers."""


def encoder(a: SkippingArguments, skip: Skip) -> TimedCall:
    """One pass through all blocks, compiled."""
    sizes: dict[str, Any] = {"width": a.width, "depth": a.depth, "heads": a.heads}
    config = DyTConfig(**sizes, patch=a.patch, bottleneck=a.bottleneck, head_channels=8)
    size = (a.side, a.side)
    parts = module.create(lambda: config.build({"task": 1}, size, nnx.Rngs(0)))

    def run(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return module.merge(parts.definition, params, stats).encode(x, None, skip).x_BTD

    compiled = jax.jit(run)
    x = jax.random.normal(jax.random.key(1), (a.images, *size, 3))
    return lambda: compiled(parts.params, parts.stats, x)


def run(words: list[str]) -> int:
    """Time, print a table, write the file."""
    a, console = parse(SkippingArguments, words, prog="moezoo bench skipping"), Console()
    check_file(a.json)
    for name in ("images", "repeats"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name} is {getattr(a, name)}: at least 1 is needed.")
    if not all(0 < room <= 1 for room in a.rooms):
        raise UserError(f"--rooms is {a.rooms}: give shares above 0, up to 1.")
    ways = {"masked": masked} | {f"gathered, {room:g}": gathered(room) for room in a.rooms}
    base, rows = encoder(a, complete), []
    for name, skip in ways.items():
        times = measured(console, name, encoder(a, skip), base, a.repeats)
        low, middle, high = (float(q) for q in np.quantile(times.ratios, [0.25, 0.5, 0.75]))
        row = {"way": name, "ratio": middle, "low": low, "high": high}
        row |= {"milliseconds": 1e3 * float(np.median(times.case))}
        rows.append(row | {"base_milliseconds": 1e3 * float(np.median(times.base))})
    tokens = (a.side // a.patch) ** 2 + 1
    title = f"{a.images} images of {tokens} tokens, {a.depth} blocks {a.width} wide"
    shown = ("way", "milliseconds", "base_milliseconds", "ratio", "low", "high")
    heads = ("MLPs", "ms", "ms of all tokens", "ratio", "lower quartile", "upper quartile")
    console.table(title, heads, [tuple(row[name] for name in shown) for row in rows])
    if a.json is not None:
        facts = {"machine": machine(), "versions": versions("jax", "jaxlib")}
        write_atomically(a.json, json_text(facts | {"rows": rows}, 2))
    return 0
