"""Measure moezoo: layers on this machine (moe), a layer compiled for a TPU pod (pod).

Example: python tools/bench.py moe --json bench.json --picture bench.png
Example: python tools/bench.py pod --topology v5p:8x8x8 --json pod.json
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moezoo.command import parse
from moezoo.errors import UserError, run_command, unknown

if TYPE_CHECKING:
    from moezoo.deploy.bench_moe import Case, Growth, Row


@dataclass(frozen=True)
class MoEArguments:
    """Time MoE layers (router included) against a dense network of equal active FLOPs.

    Every layer runs next to the dense network, repeat by repeat; a ratio is the median over the
    repeats.

    Example: python tools/bench.py moe --json bench.json --picture bench.png
    """

    json: Path
    """File for the rows, the versions and the machine."""
    picture: Path | None = None
    """Also draw the ratios over the number of experts into this PNG file."""
    experts: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of experts E, at the same active FLOPs."""
    backends: tuple[str, ...] = ("auto", "capacity")
    """Backends to time at full size."""
    k: int = 4
    """Experts per token."""
    tokens: int = 4096
    """Tokens of one call."""
    width: int = 384
    """Width of a token."""
    hidden: int = 384
    """Hidden units of one expert; the dense network has k times as many."""
    repeats: int = 11
    """Pairs per case."""
    small_tokens: int = 256
    """Tokens of the comparison of all backends, the slow ones too; 0 leaves it out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation."""


def cases_of(a: MoEArguments) -> list[list[Case]]:
    """Groups of cases that are measured together."""
    from moezoo.deploy.bench_moe import Case, Sizes, check
    from moezoo.ops.grouped import BACKENDS

    if a.repeats < 1 or not a.experts or not a.backends:
        raise UserError("--repeats must be at least 1, --experts and --backends not empty.")
    sizes = Sizes(a.tokens, a.width, a.hidden, a.k, a.dtype)
    groups = [[Case(name, e, sizes) for name in a.backends for e in a.experts]]
    if a.small_tokens:
        small = Sizes(a.small_tokens, a.width, a.hidden, a.k, a.dtype)
        middle = sorted(a.experts)[(len(a.experts) - 1) // 2]
        groups.append([Case(name, middle, small) for name in BACKENDS])
    for group in groups:
        check(group)
    return groups


def run_moe(words: list[str]) -> int:
    """Measure, write, print one table."""
    arguments = parse(MoEArguments, words, prog="tools/bench.py moe")
    groups = cases_of(arguments)
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from moezoo.deploy.bench_moe import MODES, measure
    from moezoo.train.files import check_writable

    for file in filter(None, (arguments.json, arguments.picture)):
        check_writable(file.parent)
    rows: list[Row] = []
    growth: list[Growth] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
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
    print_table(arguments, rows, growth)
    return 0


def write(arguments: MoEArguments, rows: list[Row], growth: list[Growth]) -> None:
    """The JSON file, and the picture where one was asked for."""
    from moezoo.deploy.timing import machine, versions
    from moezoo.train.files import write_atomically

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(arguments).items()}
    result = {
        "benchmark": "moe",
        "settings": settings,
        "rows": [row._asdict() for row in rows],
        "growth": [line._asdict() for line in growth],
        "machine": machine(),
        "versions": versions("jax", "jaxlib", "flax", "numpy"),
    }
    write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
    if arguments.picture:
        write_atomically(arguments.picture, picture(arguments, rows))


def print_table(arguments: MoEArguments, rows: list[Row], growth: list[Growth]) -> None:
    """Every row, then what more experts cost."""
    from rich.console import Console
    from rich.table import Table

    table = Table("N", "backend", "E", "mode", "ms", "dense", "ratio", "quartiles")
    for row in rows:
        table.add_row(
            *(str(row.tokens), row.backend, str(row.experts), SHORT[row.mode]),
            *(f"{row.median_ms:.1f}", f"{row.dense_median_ms:.1f}", f"{row.ratio:.2f}"),
            f"{row.ratio_low:.2f} .. {row.ratio_high:.2f}",
        )
    console = Console()
    console.print(table)
    for line in growth:
        change = f"{line.backend} {line.mode}: E={line.experts_from} to {line.experts_to}"
        console.print(f"{change} takes {line.ratio:.2f} times as long")
    console.print(f"wrote {arguments.json}")


def picture(arguments: MoEArguments, rows: list[Row]) -> bytes:
    """Ratios over the number of experts, one panel per mode, as PNG bytes."""
    import io

    from matplotlib.figure import Figure

    from moezoo.deploy.bench_moe import MODES

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(MODES), sharey=True)
    for panel, mode in zip(panels, MODES, strict=True):
        for backend in arguments.backends:
            own = [
                r
                for r in rows
                if (r.backend, r.mode, r.tokens) == (backend, mode, arguments.tokens)
            ]
            own = sorted(own, key=lambda row: row.experts)
            x, y = [r.experts for r in own], [r.ratio for r in own]
            errors = [[r.ratio - r.ratio_low for r in own], [r.ratio_high - r.ratio for r in own]]
            panel.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=backend)
        panel.axhline(1.0, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(arguments.experts), [str(e) for e in sorted(arguments.experts)])
        panel.set_xlabel("experts E")
        panel.set_title(mode)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time / dense FFN of equal active FLOPs")
    panels[0].set_ylim(bottom=0.0)
    panels[0].legend()
    figure.suptitle(
        f"N={arguments.tokens}, D={arguments.width}, F={arguments.hidden}, K={arguments.k}, "
        f"{arguments.dtype}"
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def run_pod(words: list[str]) -> int:
    """One MoE layer compiled for a TPU pod."""
    # Before JAX is imported: with libtpu installed it would look for a TPU in this machine.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from moezoo.deploy.bench_pod import run

    return run(words)


SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd"}
BENCHMARKS = {"moe": run_moe, "pod": run_pod}


def main() -> int:
    """Run the benchmark that the first word names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: tools/bench.py {{{','.join(BENCHMARKS)}}} [options]\n\n{__doc__}")
        return 0 if words else 2
    if words[0] not in BENCHMARKS:
        raise unknown("benchmark", words[0], list(BENCHMARKS))
    return BENCHMARKS[words[0]](words[1:])


if __name__ == "__main__":
    run_command(main)
