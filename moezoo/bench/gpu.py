"""`moezoo bench gpu`: what has to be checked and measured where a GPU is, most important first.

A card is often lent for minutes. So this is a list of stages, each a process of its own that leaves
one file in `--out` when it is done; stages with a file are not run again, and none is begun that
would not end within `--seconds`. Take the folder along and run the same command again to go on.

    values    kernels and layers against the plain products, float32 and bfloat16
    moe       layers of experts beside the dense network of equal active FLOPs
    claim     a model of experts beside its dense baseline, trained from three seeds at once; the
              best one's weights are kept
    gated     layers of gated experts, both products in one pass (`fused`) and in two (`kernels`)
    tiles     each table entry's alternatives on the shapes of the table
    attention cuDNN's beside the plain products
    suite     the fast tests of ops, nn and parity, those of `-m gpu` among them
    claim_... other systems, other ways of routing
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moezoo.bench import baselines, kernels, tokamax_peer
from moezoo.bench.baselines import COMPARISONS, DenseComparison
from moezoo.command import parse
from moezoo.errors import UserError, unknown
from moezoo.files import write_atomically
from moezoo.json_text import json_text
from moezoo.timing import machine, versions

ROOT = Path(__file__).resolve().parents[2]
# Tokens, width, hidden units of an expert, experts, experts per token.
SHAPES = (
    (16384, 2048, 2048, 8, 2),
    (16384, 2048, 2048, 64, 2),
    (32768, 768, 1536, 32, 2),
    (4096, 384, 384, 16, 4),
)
# The same of gated experts, as in OLMoE and in DeepSeek-V2-Lite.
GATED = ((16384, 2048, 1024, 64, 8), (16384, 2048, 1408, 64, 6))
# Examples, tokens, heads, heads of keys, width of a head, and whether a token sees those before it.
ATTENDED = (
    (32, 64, 6, 6, 32, False), (64, 197, 12, 12, 64, False), (64, 1025, 12, 12, 64, False),
    (8, 2048, 16, 16, 128, True), (2, 8192, 32, 8, 128, True),
)  # fmt: skip


@dataclass(frozen=True)
class GPUArguments:
    """Check and measure everything that needs a GPU, as far as the time goes.

    Example: moezoo bench gpu --out gpu --seconds 840
    """

    out: Path
    """Folder for one file per stage; stages whose file is there are done."""
    seconds: float = 840.0
    """Seconds after which no further stage is begun."""
    only: tuple[str, ...] = ()
    """Beginnings of the names of the stages to run, such as values or moe; empty: all."""
    small: bool = False
    """Tiny sizes, to try the script where there is no GPU."""
    runs: Path | None = None
    """Folder of the runs that are trained, with their large checkpoints; default: in `--out`."""


class Stage(NamedTuple):
    """Work that leaves one file: `run(file)`; `expected` seconds on a data centre's card."""

    name: str
    expected: float
    run: Callable[[Path], None]


def sizes(small: bool) -> tuple[tuple[int, ...], ...]:
    """The shapes that are measured."""
    return ((64, 32, 48, 4, 2), (32, 16, 16, 2, 1)) if small else SHAPES


def values(file: Path, small: bool) -> None:
    """Every shape and type; written whole, and an error where one is too far off."""
    shapes = ((48, 24, 40, 3, 2),) if small else kernels.CHECKED
    rows = kernels.compared(shapes, threads=1 if small else 8)
    write(file, {"rows": rows, "limits": kernels.LIMITS})
    wrong = kernels.wrong(rows)
    if wrong:
        raise UserError(f"The kernels give other numbers than the plain product: {wrong}.")


def tiles(file: Path, small: bool) -> None:
    """Milliseconds of a product and of its derivatives by shape and tiles."""
    rows = []
    shapes = sizes(small)[-1:] if small else SHAPES
    for row in kernels.tile_times(shapes, "float32" if small else "bfloat16", few=small):
        rows.append(row)
        write(file.with_suffix(".part"), {"rows": rows})  # known if time runs out
    write(file, {"rows": rows})


def attention(file: Path, small: bool) -> None:
    """Milliseconds by plain products and by the kernel, and how far apart they are."""
    shapes = ATTENDED[:1] if small else ATTENDED
    rows = [kernels.attention_times(shape) for shape in shapes]
    write(file, {"rows": rows})


def command(words: list[str], file: Path) -> None:
    """A command of this clone in a process of its own, its output beside the file."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with file.with_suffix(".log").open("w") as log:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, stdout=log, stderr=log)
    if done.returncode:
        raise UserError(f"{' '.join(words)} ended with {done.returncode}: see {log.name}.")


def moe(shape: tuple[int, ...], form: str, small: bool) -> Callable[[Path], None]:
    """Layers of one shape beside the dense network, forward and with derivatives."""
    tokens, width, hidden, experts, k = shape

    def run(file: Path) -> None:
        words = f"moezoo bench moe --json {file} --experts {experts} --k {k} --tokens {tokens}"
        words += f" --width {width} --hidden {hidden} --small-tokens 0 --form {form}"
        words += " --repeats 3 --dtype float32" if small else " --repeats 15 --dtype bfloat16"
        backends = ["kernels", "fused"]
        if form == "mlp":
            backends += ["blocks", "capacity"]
            backends += ["torch_grouped"] if find_spec("torch") and not small else []
        backends += [tokamax_peer.NAME] if tokamax_peer.installed() else []
        command(["-m", *words.split(), "--backends", *backends], file)

    return run


def suite(file: Path, small: bool) -> None:
    """The tests of ops, nn and parity on the card; the file names those that failed."""
    env = os.environ | {"MOEZOO_PLATFORM": "cpu" if small else "cuda", "PYTHONPATH": str(ROOT)}
    folders = ["tests/ops/test_soft.py"] if small else ["tests/ops", "tests/nn", "tests/parity"]
    words = [sys.executable, "-m", "pytest", "-n", "4", "-m", "not slow", "-rf", *folders]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    file.with_suffix(".log").write_text(done.stdout + done.stderr)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    write(file, {"exit": done.returncode, "failed": failed, "last": lines[-1:]})


def claim(one: DenseComparison, file: Path, runs: Path | None, small: bool) -> None:
    """The models of one comparison; the best of the first one is kept beside the file."""
    place = (runs or file.parent / "runs").resolve()
    found = baselines.trained(one, place, file, small, command)
    kept = {}
    if baselines.SPARSE in one.models:
        by = f"one {jax.devices()[0].device_kind}"
        kept = {"kept": str(baselines.keep_best(found, place, file, by, command))}
    write(file, {"models": found, "runs": str(place)} | kept)


def stages(small: bool, runs: Path | None = None) -> Iterator[Stage]:
    """All of them, in the order of their importance. runs: where models are trained."""
    yield Stage("values", 90, lambda file: values(file, small))
    for shape in sizes(small):
        name = "moe_" + "_".join(map(str, shape))
        yield Stage(name, 40, moe(shape, "mlp", small))
    first, *others = (
        Stage(one.name, one.expected, partial(_claimed, one, runs, small)) for one in COMPARISONS
    )
    yield first
    for shape in sizes(small)[:1] if small else GATED:
        name = "gated_" + "_".join(map(str, shape))
        yield Stage(name, 60, moe(shape, "gated", small))
    yield Stage("tiles", 200, lambda file: tiles(file, small))
    yield Stage("attention", 60, lambda file: attention(file, small))
    yield Stage("suite", 400, lambda file: suite(file, small))
    yield from others


def _claimed(one: DenseComparison, runs: Path | None, small: bool, file: Path) -> None:
    claim(one, file, runs, small)


def write(file: Path, content: dict[str, Any]) -> None:
    """A stage's file, with the machine and the versions."""
    about = {"machine": machine(), "versions": versions("jax", "jaxlib", "flax")}
    write_atomically(file, json_text(content | about, 1))


def run(words: list[str]) -> int:
    """Run what is not done yet, as far as the time goes, and say what is left."""
    given, began = parse(GPUArguments, words, prog="moezoo bench gpu"), time.monotonic()
    # Most stages have processes of their own, which need the card's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() != "gpu" and not given.small:
        raise UserError("There is no GPU here: add --small to try the script without one.")
    wanted = list(stages(given.small, given.runs))
    for name in given.only:
        if not any(stage.name.startswith(name) for stage in wanted):
            raise unknown("stage", name, [stage.name for stage in wanted])
    given.out.mkdir(parents=True, exist_ok=True)
    failed, left = [], []
    for stage in wanted:
        file = given.out / f"{stage.name}.json"
        if file.exists() or given.only and not stage.name.startswith(given.only):
            continue
        if time.monotonic() - began + stage.expected > given.seconds:
            left.append(stage.name)
            continue
        started = time.monotonic()
        try:
            stage.run(file)
            print(f"{stage.name}: {time.monotonic() - started:.0f} s", flush=True)
        except Exception as error:  # the stages after it are worth their time all the same
            failed.append(stage.name)
            print(f"{stage.name} failed: {str(error)[:500]}", flush=True)
    print(f"left: {', '.join(left) or 'nothing'}; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0
