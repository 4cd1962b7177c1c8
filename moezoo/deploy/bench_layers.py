"""The command `tools/bench.py moe`: its arguments, its groups of cases, its file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from moezoo.command import parse
from moezoo.deploy import bench_views
from moezoo.deploy.bench_moe import MODES, Case, Growth, Row, Sizes, check, measure
from moezoo.deploy.timing import machine, versions
from moezoo.errors import UserError
from moezoo.json_text import json_text
from moezoo.ops.grouped import BACKENDS
from moezoo.train.files import check_file, write_atomically


@dataclass(frozen=True)
class MoEArguments:
    """Time MoE layers (router included) against a dense network of equal active FLOPs.

    Every layer runs next to the dense network, repeat by repeat; a ratio is the median over the
    repeats. Options with several values are measured in all combinations.

    Example: python tools/bench.py moe --json bench.json --picture bench.png
    """

    json: Path
    """File for the rows, the versions and the machine."""
    picture: Path | None = None
    """Also draw the ratios over the number of experts into this PNG file."""
    experts: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of experts E, at the same active FLOPs."""
    backends: tuple[str, ...] = ("auto", "capacity")
    """Backends to time at full size; also products (the experts' matrix products alone, the floor)
    and torch_loop where PyTorch is installed."""
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


def cases_of(a: MoEArguments) -> list[list[Case]]:
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
        sizes = Sizes(n, a.width, a.hidden, k, dtype)
        groups.append([Case(name, e, sizes) for name in a.backends for e in a.experts])
    if a.small_tokens:
        small = Sizes(a.small_tokens, a.width, a.hidden, a.k[0], a.dtype[0])
        middle = sorted(a.experts)[(len(a.experts) - 1) // 2]
        groups.append([Case(name, middle, small) for name in BACKENDS])
    for group in groups:
        check(group)
    return groups


def run(words: list[str]) -> int:
    """Measure, write, print one table."""
    arguments = parse(MoEArguments, words, prog="tools/bench.py moe")
    groups = cases_of(arguments)
    for file in (arguments.json, arguments.picture):
        check_file(file)
    rows: list[Row] = []
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
    console.print(bench_views.table(rows))
    for line in [*bench_views.lines(rows, growth), f"wrote {arguments.json}"]:
        console.print(Text(line), soft_wrap=True)
    return 0


def write(arguments: MoEArguments, rows: list[Row], growth: list[Growth]) -> None:
    """The JSON file, and the picture where one was asked for."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(arguments).items()}
    packages = ["jax", "jaxlib", "flax", "numpy"]
    packages += ["torch"] if any(row.backend == "torch_loop" for row in rows) else []
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
        write_atomically(arguments.picture, bench_views.picture(measured))
