"""MoE layers against one dense feed-forward network of equal active FLOPs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.deploy import bench_floor, bench_torch
from moezoo.deploy.timing import Compiled, Times, interleave
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import MLP
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter
from moezoo.ops.grouped import by_name

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

    ratio is the median over the repeats, ratio_low and ratio_high the quartiles. Bytes are those of
    temporaries, as the compiler plans them; None where nothing is compiled.
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
    compile_seconds: float | None
    temporary_bytes: int | None
    dense_temporary_bytes: int | None


class Growth(NamedTuple):
    """Time with the most experts over time with the fewest, median over the repeats."""

    backend: str
    mode: str
    k: int
    tokens: int
    dtype: str
    experts_from: int
    experts_to: int
    ratio: float


class Repeat(NamedTuple):
    """One more repeat is done; the last of a group brings its rows and its growth."""

    label: str
    rows: list[Row]
    growth: list[Growth]


def check(cases: list[Case]) -> None:
    """Raise UserError where a case cannot exist."""
    for case in cases:
        if case.backend == bench_torch.NAME:
            bench_torch.check(case.sizes.dtype)
        elif case.backend != bench_floor.NAME:
            by_name(case.backend)
        if not 1 <= case.sizes.k <= case.experts:
            raise UserError(
                f"{case.sizes.k} experts per token of {case.experts}: --k must be between 1 and "
                "the smallest of --experts."
            )
        for name in ("tokens", "width", "hidden"):
            if getattr(case.sizes, name) < 1:
                raise UserError(f"--{name} is {getattr(case.sizes, name)}: it must be at least 1.")
        if case.backend == bench_floor.NAME:
            bench_floor.check_products(case.sizes.tokens, case.sizes.k, case.experts)


def measure(cases: list[Case], repeats: int) -> Iterator[Repeat]:
    """Time cases of equal sizes in both modes; yields after every repeat."""
    s = cases[0].sizes
    for mode in MODES:
        dense = compiled(
            lambda rngs: MLP(s.width, s.k * s.hidden, dtype=s.dtype, rngs=rngs), s, mode
        )
        layers = {case: layer_of(case, mode) for case in cases}
        runs = {case: layer.run for case, layer in layers.items()}
        for repeat, times in enumerate(interleave(dense.run, runs, repeats)):
            if repeat + 1 < repeats:
                yield Repeat(mode, [], [])
            else:
                rows = [row_of(c, mode, pair, layers[c], dense) for c, pair in times.items()]
                yield Repeat(mode, rows, growth_of(times, mode))


def layer_of(case: Case, mode: str) -> Compiled:
    """The case's layer, ready to run."""
    build = moe_builder(case)
    if case.backend != bench_torch.NAME:
        return compiled(build, case.sizes, mode)
    params = module.create(lambda: build(nnx.Rngs(0))).params
    runs = bench_torch.runs(params, case.sizes.k, *tokens(case.sizes))
    return Compiled(runs[mode], None, None)


def row_of(case: Case, mode: str, times: Times, layer: Compiled, dense: Compiled) -> Row:
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
        compile_seconds=layer.seconds,
        temporary_bytes=layer.temporary_bytes,
        dense_temporary_bytes=dense.temporary_bytes,
    )


def growth_of(times: dict[Case, Times], mode: str) -> list[Growth]:
    """What the most experts cost over the fewest, per backend that has both."""
    found = []
    for backend in dict.fromkeys(case.backend for case in times):
        own = sorted((c for c in times if c.backend == backend), key=lambda c: c.experts)
        few, many, s = own[0], own[-1], own[0].sizes
        if many.experts > few.experts:
            ratio = float(np.median(times[many].case / times[few].case))
            sizes = (s.k, s.tokens, s.dtype, few.experts, many.experts)
            found.append(Growth(backend, mode, *sizes, ratio))
    return found


def moe_builder(case: Case) -> Callable[[nnx.Rngs], nnx.Module]:
    """Builds a layer with a linear router and MLP experts."""
    s = case.sizes

    def build(rngs: nnx.Rngs) -> nnx.Module:
        if case.backend == bench_floor.NAME:
            sizes = (case.experts, s.width, s.hidden, s.k)
            return bench_floor.Products(*sizes, dtype=s.dtype, rngs=rngs)
        router = LinearRouter(s.width, case.experts, s.k, rngs=rngs)
        experts = MLPExperts(case.experts, s.width, s.hidden, dtype=s.dtype, rngs=rngs)
        backend = "auto" if case.backend == bench_torch.NAME else case.backend
        return MoE(router, experts, by_name(backend))

    return build


def tokens(sizes: Sizes) -> tuple[Array, Array]:
    """x_ND and the cotangent of y_ND."""
    shape = (sizes.tokens, sizes.width)
    made = (jax.random.normal(jax.random.key(seed), shape).astype(sizes.dtype) for seed in (1, 2))
    return next(made), next(made)


def compiled(build: Callable[[nnx.Rngs], Any], sizes: Sizes, mode: str) -> Compiled:
    """The layer, or the layer and all its derivatives, as a call without arguments.

    Results overwrite those of the call before, as donated state does in training: the time to get
    fresh memory from the system is no property of a layer.
    """
    parts = module.create(lambda: build(nnx.Rngs(0)))
    x_ND, dy_ND = tokens(sizes)

    def layer(params: Any, x_ND: Array) -> Array:
        y = module.merge(parts.definition, params, parts.stats)(x_ND)
        return jnp.asarray(getattr(y, "y_ND", y))

    def forward(params: Any, x_ND: Array, dy_ND: Array, old: Any) -> Any:
        return layer(params, x_ND)

    def both(params: Any, x_ND: Array, dy_ND: Array, old: Any) -> Any:
        y_ND, pull = jax.vjp(layer, params, x_ND)
        return y_ND, pull(dy_ND.astype(y_ND.dtype))

    function = forward if mode == "forward" else both
    args = (parts.params, x_ND, dy_ND)
    shapes = jax.eval_shape(function, *args, None)
    last = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    lowered = jax.jit(function, donate_argnums=3, keep_unused=True).lower(*args, last)
    began = time.perf_counter()
    run = lowered.compile()
    seconds = time.perf_counter() - began

    def call() -> Any:
        nonlocal last
        last = run(*args, last)
        return last

    planned = run.memory_analysis()
    return Compiled(call, round(seconds, 2), planned and planned.temp_size_in_bytes)
