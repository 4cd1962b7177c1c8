"""AST blocks with adapters on this machine: soft and dense mixtures against single adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.backbones.ast import ASTBlock, ASTConfig
from moezoo.command import parse
from moezoo.errors import UserError
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.models.soft_moa.model import SoftMoAConfig, dense, single, soft
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.nn.injection import Inserted, freeze, parallel
from moezoo.timing import TimedCall, Times, interleave, machine, versions
from moezoo.train.console import Console


@dataclass(frozen=True)
class AdapterArguments:
    """Time an AST block, frozen but for its adapters beside attention, by the kind of adapter.

    Three pairs: a soft mixture against one adapter of as many trained parameters; a larger soft
    mixture against the smaller one at equally many slots in all; a dense mixture against the one
    adapter that it folds to under constant gates.
    Example: moezoo bench adapters --json adapters.json
    """

    clips: int = 2
    """Clips of a batch."""
    tokens: int = 470
    """Tokens of a clip; 470 are four seconds."""
    width: int = 768
    """Features of a token."""
    hidden: int = 3072
    """Hidden units of the block's MLP."""
    heads: int = 12
    """Attention heads."""
    experts: int = 7
    """Adapters of the smaller mixture."""
    more: int = 15
    """Adapters of the larger one."""
    slots: int = 1
    """Slots of an expert, where a mixture is compared with one adapter."""
    bottleneck: int = 6
    """Hidden units of an adapter."""
    around: Literal["block", "nothing"] = "block"
    """What is timed: a whole block, or its adapter without it."""
    repeats: int = 9
    """Paired repeats."""
    json: Path | None = None
    """File for the numbers."""


class AdapterPair(NamedTuple):
    """Adapters of one line of the table."""

    name: str
    case: nnx.Module
    base: nnx.Module


def pairs(a: AdapterArguments) -> list[AdapterPair]:
    """What is compared with what."""
    sizes = ASTConfig(width=a.width, hidden=a.hidden, heads=a.heads)
    config = SoftMoAConfig(ast=sizes, experts=a.experts, slots=a.slots, bottleneck=a.bottleneck)

    def made(make: Any, **changes: Any) -> Any:
        return make(replace(config, **changes), 1, nnx.Rngs(0))

    smaller, mixture = made(soft), made(dense)
    units = round((module.count(module.split(smaller).params) - a.width) / (2 * a.width + 1))
    total = math.lcm(a.experts, a.more)
    few, many = (made(soft, experts=n, slots=total // n) for n in (a.experts, a.more))
    folded = mixture.folded(jnp.full((a.experts,), 1 / a.experts))
    return [
        AdapterPair(f"soft {a.experts} x {a.slots} / one of {units} units", smaller,
             made(single, bottleneck=units)),
        AdapterPair(f"soft {a.more} x {total // a.more} / soft {a.experts} x {total // a.experts}",
             many, few),
        AdapterPair(f"dense {a.experts} / folded, {a.experts * a.bottleneck} units",
             mixture, folded),
    ]  # fmt: skip


def runs(a: AdapterArguments, adapter: nnx.Module) -> dict[str, TimedCall]:
    """One pass forward, and with it gradients of what trains and of the input."""
    parts = _parts(a, adapter)
    x = jax.random.normal(jax.random.key(2), (a.clips, a.tokens, a.width))

    def forward(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        layer, context = module.merge(parts.definition, params, stats), Context()
        if isinstance(layer, ASTBlock):
            return layer(x, context)
        return layer(x, context).y if hasattr(layer, "wants_context") else layer(x)

    def loss(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(forward(params, stats, x)))

    both, plain = jax.jit(jax.grad(loss, argnums=(0, 2))), jax.jit(forward)
    given = (parts.params, parts.stats, x)
    return {"forward": lambda: plain(*given), "forward+backward": lambda: both(*given)}


def _parts(a: AdapterArguments, adapter: nnx.Module) -> module.ModuleParts:
    """The adapter with random numbers in it: a fresh one would send no gradient down."""
    timed: Any = adapter
    if a.around == "block":
        sizes = ASTConfig(width=a.width, hidden=a.hidden, heads=a.heads)
        timed = ASTBlock(sizes, rngs=nnx.Rngs(0))
        timed.attn = Inserted(timed.attn, adapter, parallel)
        freeze(timed, trained=("norm1/*", "attn/adapter/*"))
    parts = module.split(timed)
    key = jax.random.key(1)
    return parts._replace(
        params=jax.tree.map(lambda p: p + 0.05 * jax.random.normal(key, p.shape), parts.params)
    )


def run(words: list[str]) -> int:
    """Time, print a table, write the file."""
    a, console = parse(AdapterArguments, words, prog="moezoo bench adapters"), Console()
    check_file(a.json)
    least = {"clips": a.clips, "tokens": a.tokens, "repeats": a.repeats}
    for name, value in least.items():
        if value < 1:
            raise UserError(f"--{name} is {value}: at least 1 is needed.")
    rows: list[dict[str, Any]] = []
    for pair in pairs(a):
        case, base = runs(a, pair.case), runs(a, pair.base)
        for mode in case:
            times = measured(console, f"{pair.name}, {mode}", case[mode], base[mode], a.repeats)
            low, middle, high = np.quantile(times.ratios, [0.25, 0.5, 0.75])
            row = {"pair": pair.name, "mode": mode, "ratio": float(middle), "low": float(low)}
            row |= {"high": float(high), "milliseconds": 1e3 * float(np.median(times.case))}
            rows.append(row | {"base_milliseconds": 1e3 * float(np.median(times.base))})
    shown = ("pair", "mode", "milliseconds", "base_milliseconds", "ratio")
    title = f"{a.clips} x {a.tokens} tokens, {a.width} wide, around the adapter: {a.around}"
    console.table(title, ("pair", "", "ms", "ms of the base", "ratio"), [
        tuple(row[name] for name in shown) for row in rows
    ])  # fmt: skip
    if a.json is not None:
        facts = {"machine": machine(), "versions": versions("jax", "jaxlib")}
        write_atomically(a.json, json_text(facts | {"rows": rows}, 2))
    return 0


def measured(console: Console, name: str, case: TimedCall, base: TimedCall, repeats: int) -> Times:
    """The times of one pair, with a line that shows how far it is."""
    last: Times | None = None
    with console.progress(name, repeats, unit="repeats") as bar:
        for number, times in enumerate(interleave(base, {"case": case}, repeats), 1):
            last = times["case"]
            bar.update(number)
    assert last is not None
    return last
