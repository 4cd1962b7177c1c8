"""`moezoo bench moe`: MoE layers against one dense feed-forward network of equal active FLOPs.

It prints a table and sentences about growth and draws a picture. Beside the layers stands their
floor, the experts' matrix products alone: tokens lie in order and every expert has the same share
of them, so there is no router, no sort, no gather, no uneven group and no copy of a token. What is
left is what a dropless layer cannot save, the reading of E experts' parameters included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from moezoo.bench import tokamax_peer, torch_peer
from moezoo.command import parse
from moezoo.errors import UserError
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.nn.experts import GatedMLPExperts, MLPExperts
from moezoo.nn.layers import MLP
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter
from moezoo.ops.expert import dense
from moezoo.ops.grouped import BACKENDS, by_name
from moezoo.timing import Compiled, Times, device_seconds, interleave, machine, versions
from moezoo.train.pictures import drawn

NAME = "products"


def check_products(tokens: int, k: int, experts: int) -> None:
    """UserError where the shares would be uneven."""
    if tokens * k % experts or tokens % (tokens * k // experts):
        raise UserError(
            f"The backend {NAME} gives every expert the same share of the tokens in order: "
            f"{experts} experts must divide {tokens} tokens times {k}, and their share the tokens."
        )


class Products(nnx.Module):
    """Every token through K of E experts, N * K / E tokens per expert; recomputed backward."""

    def __init__(
        self, experts: int, width: int, hidden: int, k: int, *, dtype: Any, rngs: nnx.Rngs
    ):
        self.experts = MLPExperts(experts, width, hidden, dtype=dtype, rngs=rngs)
        self.k = k

    def __call__(self, x_ND: Array) -> Array:
        n, experts = x_ND.shape[0], self.experts.count
        rows = n * self.k // experts

        @jax.checkpoint
        def add(y_ND: Array, one: tuple[Array, Any]) -> tuple[Array, None]:
            first, params = one
            x_RD = lax.dynamic_slice_in_dim(x_ND, first, rows)
            y_RD = self.experts.fn(params, x_RD, dense)
            y_RD += lax.dynamic_slice_in_dim(y_ND, first, rows)
            return lax.dynamic_update_slice_in_dim(y_ND, y_RD, first, 0), None

        first_E = jnp.arange(experts) * rows % n
        return lax.scan(add, jnp.zeros_like(x_ND), (first_E, self.experts.stacked()))[0]


MODES = ("forward", "forward+backward")
FACTOR = {"forward": 1, "forward+backward": 3}  # of each product two more in the second
PRODUCTS_OF = {"mlp": 2, "gated": 3}  # products of an expert


@dataclass(frozen=True)
class LayerSizes:
    """Tokens N, width D, hidden units F of one expert, experts per token K, computation type.

    The dense network has K * F hidden units. form: of experts and of that network.
    """

    tokens: int
    width: int
    hidden: int
    k: int
    dtype: str
    form: str = "mlp"


class TimedCase(NamedTuple):
    """One thing to time."""

    backend: str
    experts: int
    sizes: LayerSizes


class TimedRow(NamedTuple):
    """One measured case: milliseconds, and the ratio to the dense network run beside it.

    ratio is the median over the repeats, ratio_low and ratio_high the quartiles. Bytes are those of
    temporaries, as the compiler plans them; None where nothing is compiled. clock: "device", which
    adds up the times of a GPU's kernels by its own clock, or "wall". teraflops: of the experts'
    products, a second.
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
    clock: str
    teraflops: float
    dense_teraflops: float
    form: str = "mlp"


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
    rows: list[TimedRow]
    growth: list[Growth]


def check(cases: list[TimedCase]) -> None:
    """Raise UserError where a case cannot exist."""
    for case in cases:
        if case.sizes.form != "mlp" and case.backend in (NAME, *torch_peer.PEERS):
            raise UserError(
                f"The backend {case.backend} has plain experts only: --form is {case.sizes.form}."
            )
        if case.backend in torch_peer.PEERS:
            torch_peer.check(case.backend, case.sizes.dtype)
        elif case.backend == tokamax_peer.NAME:
            tokamax_peer.check()
        elif case.backend != NAME:
            by_name(case.backend)
        if not 1 <= case.sizes.k <= case.experts:
            raise UserError(
                f"{case.sizes.k} experts per token of {case.experts}: --k must be between 1 and "
                "the smallest of --experts."
            )
        for name in ("tokens", "width", "hidden"):
            if getattr(case.sizes, name) < 1:
                raise UserError(f"--{name} is {getattr(case.sizes, name)}: it must be at least 1.")
        if case.backend == NAME:
            check_products(case.sizes.tokens, case.sizes.k, case.experts)


def measure(cases: list[TimedCase], repeats: int) -> Iterator[Repeat]:
    """Time cases of equal sizes in both modes; yields after every repeat."""
    s = cases[0].sizes
    for mode in MODES:
        dense = compiled(partial(DENSE[s.form], s.width, s.k * s.hidden, dtype=s.dtype), s, mode)
        layers = {case: layer_of(case, mode) for case in cases}
        on_device = by_device(dense, layers, repeats)
        runs = {case: layer.run for case, layer in layers.items()}
        found = interleave(dense.run, runs, repeats) if on_device is None else [on_device] * repeats
        for repeat, times in enumerate(found):
            if repeat + 1 < repeats:
                yield Repeat(mode, [], [])
                continue
            clock = "wall" if on_device is None else "device"
            rows = [row_of(c, mode, t, layers[c], dense, clock) for c, t in times.items()]
            yield Repeat(mode, rows, growth_of(times, mode))


def by_device(
    dense: Compiled, layers: dict[TimedCase, Compiled], repeats: int
) -> dict[TimedCase, Times] | None:
    """Times by a GPU's own clock, each case next to the dense network; None where there is none."""
    times = {}
    for case, layer in layers.items():
        base, own = dense.device(repeats), layer.device(repeats)
        if base is None or own is None:
            return None
        times[case] = Times(np.asarray(own), np.asarray(base))
    return times


def layer_of(case: TimedCase, mode: str) -> Compiled:
    """The case's layer, ready to run."""
    build = moe_builder(case)
    if case.backend not in torch_peer.PEERS:
        return compiled(build, case.sizes, mode)
    params = module.create(lambda: build(nnx.Rngs(0))).params
    runs = torch_peer.runs(params, case.sizes.k, *tokens(case.sizes), case.backend)
    clock = torch_peer.device_seconds if case.backend == "torch_grouped" else None
    return Compiled(runs[mode], None, None, lambda calls: clock and clock(runs[mode], calls))


def row_of(
    case: TimedCase, mode: str, times: Times, layer: Compiled, dense: Compiled, clock: str
) -> TimedRow:
    """The statistics of one case."""
    low, middle, high = (float(q) for q in np.percentile(times.ratios, [25, 50, 75]))
    s, own, base = case.sizes, float(np.median(times.case)), float(np.median(times.base))
    products = FACTOR[mode] * PRODUCTS_OF[s.form]
    flops = products * 2.0 * s.tokens * s.k * s.width * s.hidden
    return TimedRow(
        *(case.backend, case.experts, s.k, s.tokens, s.width, s.hidden, s.dtype, mode),
        median_ms=1e3 * own,
        min_ms=1e3 * float(np.min(times.case)),
        dense_median_ms=1e3 * base,
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
        compile_seconds=layer.seconds,
        temporary_bytes=layer.temporary_bytes,
        dense_temporary_bytes=dense.temporary_bytes,
        clock=clock,
        teraflops=flops / 1e12 / own,
        dense_teraflops=flops / 1e12 / base,
        form=s.form,
    )


def growth_of(times: dict[TimedCase, Times], mode: str) -> list[Growth]:
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


class DenseGated(nnx.Module):
    """One gated MLP for all tokens."""

    def __init__(self, width: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs):
        self.only = GatedMLPExperts(1, width, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x_ND: Array) -> Array:
        return self.only.fn(jax.tree.map(lambda a: a[0], self.only.stacked()), x_ND, dense)


DENSE: dict[str, Callable[..., nnx.Module]] = {"mlp": MLP, "gated": DenseGated}
SPARSE: dict[str, Callable[..., Any]] = {"mlp": MLPExperts, "gated": GatedMLPExperts}


def moe_builder(case: TimedCase) -> Callable[..., nnx.Module]:
    """Builds a layer with a linear router and experts of the case's form."""
    s = case.sizes

    def build(rngs: nnx.Rngs) -> nnx.Module:
        if case.backend == NAME:
            sizes = (case.experts, s.width, s.hidden, s.k)
            return Products(*sizes, dtype=s.dtype, rngs=rngs)
        router = LinearRouter(s.width, case.experts, s.k, rngs=rngs)
        experts = SPARSE[s.form](case.experts, s.width, s.hidden, dtype=s.dtype, rngs=rngs)
        if case.backend == tokamax_peer.NAME:
            return MoE(router, experts, tokamax_peer.backend())
        backend = "auto" if case.backend in torch_peer.PEERS else case.backend
        return MoE(router, experts, by_name(backend))

    return build


def tokens(sizes: LayerSizes) -> tuple[Array, Array]:
    """x_ND and the cotangent of y_ND."""
    shape = (sizes.tokens, sizes.width)
    made = (jax.random.normal(jax.random.key(seed), shape).astype(sizes.dtype) for seed in (1, 2))
    return next(made), next(made)


def of_type(params: Any, dtype: str) -> Any:
    """Parameters in the computation's type: a training step converts master weights once for all
    that it does with them. Routers stay in float32.
    """

    def one(path: Any, array: Array) -> Array:
        return array if path[0].key == "router" else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def compiled(build: Callable[..., Any], sizes: LayerSizes, mode: str) -> Compiled:
    """The layer, or the layer and all its derivatives, as a call without arguments.

    Results overwrite those of the call before, as donated state does in training: the time to get
    fresh memory from the system is no property of a layer. On a GPU JAX keeps its memory anyway.
    """
    parts = module.create(lambda: build(rngs=nnx.Rngs(0)))
    params, (x_ND, dy_ND) = of_type(parts.params, sizes.dtype), tokens(sizes)

    def layer(params: Any, x_ND: Array) -> Array:
        y = module.merge(parts.definition, params, parts.stats)(x_ND)
        return jnp.asarray(getattr(y, "y_ND", y))

    def forward(params: Any, x_ND: Array, dy_ND: Array, old: Any) -> Any:
        return layer(params, x_ND)

    def both(params: Any, x_ND: Array, dy_ND: Array, old: Any) -> Any:
        y_ND, pull = jax.vjp(layer, params, x_ND)
        return y_ND, pull(dy_ND.astype(y_ND.dtype))

    function = forward if mode == "forward" else both
    args = (params, x_ND, dy_ND)
    shapes = jax.eval_shape(function, *args, None)
    last = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    donated = () if jax.default_backend() == "gpu" else 3
    lowered = jax.jit(function, donate_argnums=donated, keep_unused=True).lower(*args, last)
    began = time.perf_counter()
    run = lowered.compile()
    seconds = time.perf_counter() - began

    def call() -> Any:
        nonlocal last
        last = run(*args, last)
        return last

    planned = run.memory_analysis()
    return Compiled(
        call,
        round(seconds, 2),
        planned and planned.temp_size_in_bytes,
        lambda calls: device_seconds(run, calls, *args, last),
    )


SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd"}


def table(rows: list[TimedRow]) -> Table:
    """Every row."""
    columns = ("N", "K", "type", "backend", "E", "mode", "ms", "dense", "ratio", "quartiles")
    made = Table(*columns, "TFLOP/s", "of dense", "compile s", "temporary MB")
    for row in rows:
        seconds = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}"
        made.add_row(
            *(str(row.tokens), str(row.k), row.dtype, row.backend, str(row.experts)),
            *(SHORT[row.mode], f"{row.median_ms:.3g}", f"{row.dense_median_ms:.3g}"),
            *(f"{row.ratio:.2f}", f"{row.ratio_low:.2f} .. {row.ratio_high:.2f}"),
            *(f"{row.teraflops:.3g}", f"{row.teraflops / row.dense_teraflops:.0%}"),
            *(seconds, memory(row)),
        )
    return made


def memory(row: TimedRow) -> str:
    """Temporary bytes, and how many times the dense network's they are."""
    if row.temporary_bytes is None:
        return ""
    times = row.temporary_bytes / row.dense_temporary_bytes if row.dense_temporary_bytes else 0.0
    return f"{row.temporary_bytes / 1e6:.0f} (x {times:.1f})"


def lines(rows: list[TimedRow], growth: list[Growth]) -> Iterator[str]:
    """What more experts cost, and what more tokens cost, in sentences."""
    for g in growth:
        yield (
            f"{g.backend} {g.mode}, N={g.tokens} K={g.k} {g.dtype}: E={g.experts_from} to "
            f"{g.experts_to} takes {g.ratio:.2f} times as long"
        )
    kinds = dict.fromkeys((r.backend, r.mode, r.experts, r.k, r.dtype) for r in rows)
    for backend, mode, experts, k, dtype in kinds:
        kind = (backend, mode, experts, k, dtype)
        own = [r for r in rows if (r.backend, r.mode, r.experts, r.k, r.dtype) == kind]
        own = sorted(own, key=lambda row: row.tokens)
        few, many = own[0], own[-1]
        if many.tokens > few.tokens:
            times = many.median_ms / few.median_ms
            yield (
                f"{backend} {mode}, E={experts} K={k} {dtype}: N={few.tokens} to {many.tokens} "
                f"({many.tokens / few.tokens:g} times) takes {times:.2f} times as long"
            )


def picture(rows: list[TimedRow]) -> bytes:
    """Ratios over the number of experts, PNG bytes: a column per mode, a row per dense network."""
    groups = list(dict.fromkeys((r.tokens, r.k, r.dtype) for r in rows))
    figure = Figure(figsize=(9, 0.6 + 3.0 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), len(MODES), sharey="row", squeeze=False)
    for line, group in zip(panels, groups, strict=True):
        for panel, mode in zip(line, MODES, strict=True):
            own = [r for r in rows if (r.tokens, r.k, r.dtype) == group and r.mode == mode]
            draw(panel, own)
            panel.set_title(f"{mode}: N={group[0]}, K={group[1]}, {group[2]}", fontsize=10)
        line[0].set_ylabel("time / dense")
        line[0].set_ylim(bottom=0.0)
    panels[0, 0].legend()
    experts = "" if rows[0].form == "mlp" else f" of {rows[0].form} experts"
    figure.suptitle(
        f"MoE layer{experts} against the dense FFN of equal active FLOPs, D={rows[0].width}, "
        f"F={rows[0].hidden}"
    )
    return drawn(figure, 120)


def draw(panel, rows: list[TimedRow]) -> None:
    """One curve per backend, quartiles as bars."""
    for backend in dict.fromkeys(row.backend for row in rows):
        own = sorted((r for r in rows if r.backend == backend), key=lambda row: row.experts)
        x, y = [r.experts for r in own], [r.ratio for r in own]
        errors = [[r.ratio - r.ratio_low for r in own], [r.ratio_high - r.ratio for r in own]]
        panel.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=backend)
    experts = sorted({row.experts for row in rows})
    panel.axhline(1.0, color="grey", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_xticks(experts, [str(e) for e in experts])
    panel.set_xlabel("experts E")
    panel.grid(alpha=0.3)


@dataclass(frozen=True)
class MoEArguments:
    """Time MoE layers (router included) against a dense network of equal active FLOPs.

    Every layer runs next to the dense network, repeat by repeat; a ratio is the median over the
    repeats. Options with several values are measured in all combinations.

    Example: moezoo bench moe --json bench.json --picture bench.png
    """

    json: Path
    """File for the rows, the versions and the machine."""
    picture: Path | None = None
    """Also draw the ratios over the number of experts into this PNG file."""
    experts: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of experts E, at the same active FLOPs."""
    backends: tuple[str, ...] = ("auto", "capacity")
    """Backends to time at full size; also products (the experts' matrix products alone, the floor),
    where PyTorch is installed torch_loop and on a GPU torch_grouped, and tokamax where that is."""
    k: tuple[int, ...] = (4,)
    """Experts per token."""
    tokens: tuple[int, ...] = (4096,)
    """Tokens of one call."""
    width: int = 384
    """Width of a token."""
    hidden: int = 384
    """Hidden units of one expert; the dense network has k times as many."""
    repeats: int = 11
    """Pairs per case."""
    small_tokens: int = 256
    """Tokens of the comparison of all backends, the slow ones too; 0 leaves it out."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Types of the computation."""
    form: Literal["mlp", "gated"] = "mlp"
    """Experts of two matrices with biases, or gated ones of three without, as in decoders."""


def cases_of(a: MoEArguments) -> list[list[TimedCase]]:
    """Groups of cases that are measured together: those of one dense network."""
    several = {"experts": a.experts, "backends": a.backends, "k": a.k}
    several |= {"tokens": a.tokens, "dtype": a.dtype}
    empty = [name for name, values in several.items() if not values]
    if a.repeats < 1 or empty:
        raise UserError(
            f"--{empty[0]} is empty."
            if empty
            else f"--repeats is {a.repeats}: at least 1 is needed."
        )
    groups = []
    for n, k, dtype in product(a.tokens, a.k, a.dtype):
        sizes = LayerSizes(n, a.width, a.hidden, k, dtype, a.form)
        groups.append([TimedCase(name, e, sizes) for name in a.backends for e in a.experts])
    if a.small_tokens:
        small = LayerSizes(a.small_tokens, a.width, a.hidden, a.k[0], a.dtype[0], a.form)
        middle = sorted(a.experts)[(len(a.experts) - 1) // 2]
        groups.append([TimedCase(name, middle, small) for name in BACKENDS])
    for group in groups:
        check(group)
    return groups


def run(words: list[str]) -> int:
    """Measure, write, print one table."""
    arguments = parse(MoEArguments, words, prog="moezoo bench moe")
    groups = cases_of(arguments)
    for file in (arguments.json, arguments.picture):
        check_file(file)
    rows: list[TimedRow] = []
    growth: list[Growth] = []
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        total = len(groups) * len(MODES) * arguments.repeats
        task = bar.add_task("compiling", total=total)
        for group in groups:
            for step in measure(group, arguments.repeats):
                rows += step.rows
                growth += step.growth
                label = f"N={group[0].sizes.tokens} {step.label}"
                bar.update(task, advance=1, description=label)
    write(arguments, rows, growth)
    console = Console(highlight=False)
    console.print(table(rows))
    for line in [*lines(rows, growth), f"wrote {arguments.json}"]:
        console.print(Text(line), soft_wrap=True)
    return 0


def write(arguments: MoEArguments, rows: list[TimedRow], growth: list[Growth]) -> None:
    """The JSON file, and the picture where one was asked for."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(arguments).items()}
    packages = ["jax", "jaxlib", "flax", "numpy"]
    packages += ["torch"] if any(row.backend in torch_peer.PEERS for row in rows) else []
    packages += [tokamax_peer.NAME for row in rows[:1] if tokamax_peer.NAME in arguments.backends]
    result = {
        "benchmark": "moe",
        "settings": settings,
        "rows": [row._asdict() for row in rows],
        "growth": [line._asdict() for line in growth],
        "machine": machine(),
        "versions": versions(*packages),
    }
    write_atomically(arguments.json, json_text(result, 1))
    if arguments.picture:
        measured = [row for row in rows if row.tokens in arguments.tokens]
        write_atomically(arguments.picture, picture(measured))
