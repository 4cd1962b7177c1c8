"""MoE layers against one dense feed-forward network of equal active FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.deploy.timing import Run, Times, interleave
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import MLP
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter
from moezoo.ops.grouped import BACKENDS, by_name

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Sizes:
    """Tokens N, width D, hidden units F of one expert, experts per token K, computation type.

    The dense network has K * F hidden units.
    """

    tokens: int
    width: int
    hidden: int
    k: int
    dtype: str


class Case(NamedTuple):
    """One thing to time."""

    backend: str
    experts: int
    sizes: Sizes


class Row(NamedTuple):
    """One measured case: milliseconds, and the ratio to the dense network run beside it.

    ratio is the median over the repeats, ratio_low and ratio_high the quartiles.
    """

    backend: str
    experts: int
    k: int
    tokens: int
    width: int
    hidden: int
    dtype: str
    mode: str
    median_ms: float
    min_ms: float
    dense_median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


class Growth(NamedTuple):
    """Time with the most experts over time with the fewest, median over the repeats."""

    backend: str
    mode: str
    experts_from: int
    experts_to: int
    ratio: float


class Progress(NamedTuple):
    """One more repeat is done; the last of a group brings its rows and its growth."""

    label: str
    rows: list[Row]
    growth: list[Growth]


def check(cases: list[Case]) -> None:
    """Raise UserError where a case cannot exist."""
    for case in cases:
        by_name(case.backend)
        if not 1 <= case.sizes.k <= case.experts:
            raise UserError(
                f"{case.sizes.k} experts per token of {case.experts}: --k must be between 1 and "
                "the smallest of --experts."
            )
        for name in ("tokens", "width", "hidden"):
            if getattr(case.sizes, name) < 1:
                raise UserError(f"--{name} is {getattr(case.sizes, name)}: it must be at least 1.")


def measure(cases: list[Case], repeats: int) -> Iterator[Progress]:
    """Time cases of equal sizes in both modes; yields after every repeat."""
    s = cases[0].sizes
    for mode in MODES:
        dense = runner(lambda rngs: MLP(s.width, s.k * s.hidden, dtype=s.dtype, rngs=rngs), s, mode)
        runs = {case: runner(moe_builder(case), s, mode) for case in cases}
        for repeat, times in enumerate(interleave(dense, runs, repeats)):
            if repeat + 1 < repeats:
                yield Progress(mode, [], [])
            else:
                rows = [row_of(case, mode, pair) for case, pair in times.items()]
                yield Progress(mode, rows, growth_of(times, mode))


def row_of(case: Case, mode: str, times: Times) -> Row:
    """The statistics of one case."""
    low, middle, high = (float(q) for q in np.percentile(times.ratios, [25, 50, 75]))
    s = case.sizes
    return Row(
        *(case.backend, case.experts, s.k, s.tokens, s.width, s.hidden, s.dtype, mode),
        median_ms=1e3 * float(np.median(times.case)),
        min_ms=1e3 * float(np.min(times.case)),
        dense_median_ms=1e3 * float(np.median(times.base)),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
    )


def growth_of(times: dict[Case, Times], mode: str) -> list[Growth]:
    """What the most experts cost over the fewest, per backend that has both."""
    found = []
    for backend in BACKENDS:
        own = sorted((c for c in times if c.backend == backend), key=lambda c: c.experts)
        if len(own) > 1:
            ratio = float(np.median(times[own[-1]].case / times[own[0]].case))
            found.append(Growth(backend, mode, own[0].experts, own[-1].experts, ratio))
    return found


def moe_builder(case: Case) -> Callable[[nnx.Rngs], nnx.Module]:
    """Builds a layer with a linear router and MLP experts."""
    s = case.sizes

    def build(rngs: nnx.Rngs) -> nnx.Module:
        router = LinearRouter(s.width, case.experts, s.k, rngs=rngs)
        experts = MLPExperts(case.experts, s.width, s.hidden, dtype=s.dtype, rngs=rngs)
        return MoE(router, experts, by_name(case.backend))

    return build


def runner(build: Callable[[nnx.Rngs], Any], sizes: Sizes, mode: str) -> Run:
    """A call without arguments that runs the layer, or the layer and all its derivatives.

    Results overwrite those of the call before, as donated state does in training: the time to get
    fresh memory from the system is no property of a layer.
    """
    parts = module.create(lambda: build(nnx.Rngs(0)))
    shape = (sizes.tokens, sizes.width)
    x_ND = jax.random.normal(jax.random.key(1), shape).astype(sizes.dtype)
    dy_ND = jax.random.normal(jax.random.key(2), shape).astype(sizes.dtype)

    def layer(params: Any, x_ND: Array) -> Array:
        y = module.merge(parts.definition, params, parts.stats)(x_ND)
        return jnp.asarray(getattr(y, "y_ND", y))

    def forward(params: Any, x_ND: Array, dy_ND: Array, old: Any) -> Any:
        return layer(params, x_ND)

    def both(params: Any, x_ND: Array, dy_ND: Array, old: Any) -> Any:
        y_ND, pull = jax.vjp(layer, params, x_ND)
        return y_ND, pull(dy_ND.astype(y_ND.dtype))

    function = forward if mode == "forward" else both
    run = jax.jit(function, donate_argnums=3, keep_unused=True)
    args = (parts.params, x_ND, dy_ND)
    shapes = jax.eval_shape(function, *args, None)
    last = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def call() -> Any:
        nonlocal last
        last = run(*args, last)
        return last

    return call
