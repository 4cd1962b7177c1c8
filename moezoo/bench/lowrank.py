"""Linear layers with low-rank updates against the same layer with plain LoRA, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.command import parse
from moezoo.errors import UserError
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.nn.injection import Adapted, freeze
from moezoo.nn.layers import Linear
from moezoo.nn.lowrank import LowRank, lora, mixture, rank_experts
from moezoo.timing import TimedCall, Times, interleave, machine, versions
from moezoo.train.console import Console


@dataclass(frozen=True)
class LowRankArguments:
    """Time a frozen linear layer with SMoRA, its blocks and mixtures, beside plain LoRA.

    Example: moezoo bench lowrank --json lowrank.json
    """

    tokens: int = 1024
    """Tokens of a batch."""
    width: int = 1024
    """Inputs and outputs of the layer."""
    ranks: int = 64
    """Ranks of every update."""
    active: int = 8
    """Ranks that work for a token."""
    repeats: int = 15
    """Paired repeats."""
    json: Path | None = None
    """File for the numbers."""


MakeTimedUpdate = Callable[..., LowRank]  # (inputs, outputs, *, rngs)


def updates(a: LowRankArguments) -> dict[str, MakeTimedUpdate]:
    """The layers to time, by name."""
    smora = partial(rank_experts, ranks=a.ranks, active=a.active, alpha=16.0)
    loras = a.ranks // a.active
    mix = partial(mixture, ranks=a.ranks, experts=loras, alpha=16.0)
    return {
        f"smora {a.ranks}/{a.active}": smora,
        f"smora, blocks of {a.active}": partial(smora, block=a.active, gate="score"),
        f"mixture {loras} x {a.active}, top 1": partial(mix, k=1),
        f"mixture {loras} x {a.active}, soft": partial(mix, k=loras),
    }


def runs(a: LowRankArguments, make: MakeTimedUpdate) -> dict[str, TimedCall]:
    """One layer's forward pass, and with it gradients of its update and its input."""

    def build() -> Adapted:
        rngs = nnx.Rngs(0)
        layer = Adapted(Linear(a.width, a.width, rngs=rngs), make(a.width, a.width, rngs=rngs))
        freeze(layer)
        return layer

    parts = module.create(build)
    update = parts.params["update"]  # a fresh one adds nothing and would send no gradient down
    update["up"] = jax.random.normal(jax.random.key(1), update["up"].shape)
    x = jax.random.normal(jax.random.key(2), (1, a.tokens, a.width))

    def forward(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return module.merge(parts.definition, params, stats)(x).y

    def loss(params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(forward(params, stats, x)))

    both = jax.jit(jax.grad(loss, argnums=(0, 2)))
    plain = jax.jit(forward)
    given = (parts.params, parts.stats, x)
    return {"forward": lambda: plain(*given), "forward+backward": lambda: both(*given)}


def run(words: list[str]) -> int:
    """Time, print a table, write the file."""
    a = parse(LowRankArguments, words, prog="moezoo bench lowrank")
    for name in ("tokens", "width", "active", "repeats"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name} is {getattr(a, name)}; it must be at least 1.")
    check_file(a.json)
    console = Console()
    base = runs(a, partial(lora, ranks=a.ranks, alpha=16.0))
    cases = {name: runs(a, make) for name, make in updates(a).items()}
    rows, table = [], []
    for mode in base:
        last: dict[str, Times] = {}
        with console.progress(mode, a.repeats, unit="repeats") as bar:
            each = interleave(base[mode], {n: c[mode] for n, c in cases.items()}, a.repeats)
            for number, times_so_far in enumerate(each, 1):
                last = times_so_far
                bar.update(number)
        for name, times in last.items():
            low, middle, high = np.quantile(times.ratios, [0.25, 0.5, 0.75])
            milliseconds = 1e3 * float(np.median(times.case))
            rows.append({"update": name, "mode": mode, "milliseconds": milliseconds})
            rows[-1] |= {"ratio": float(middle), "low": float(low), "high": float(high)}
            table.append((name, mode, milliseconds, float(middle)))
    title = f"{a.tokens} tokens, {a.width} wide, against plain LoRA of {a.ranks} ranks"
    console.table(title, ("update", "mode", "ms", "ratio"), table)
    if a.json is not None:
        facts = {"machine": machine(), "versions": versions("jax", "jaxlib")}
        write_atomically(a.json, json_text(facts | {"rows": rows}, 2))
    return 0
