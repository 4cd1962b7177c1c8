"""`moezoo bench gpu`: what has to be checked and measured where a GPU is, most important first.

A card is often lent for minutes. So this is a list of stages, each a process of its own that leaves
one file in `--out` when it is done; stages with a file are not run again, and none is begun that
would not end within `--seconds`. Take the folder along and run the same command again to go on.

    values    kernels and layers against the plain products, float32 and bfloat16
    moe       layers of experts beside the dense network of equal active FLOPs
    tiles     each table entry's alternatives on the shapes of the table
    suite     the fast tests of ops, nn and parity, those of `-m gpu` among them
    claim     a model of experts beside its dense baseline, trained, one file for each seed
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.command import parse
from moezoo.errors import UserError, unknown
from moezoo.json_text import json_text
from moezoo.ops import grouped_matmul
from moezoo.ops.grouped_matmul import Groups, Tiles
from moezoo.timing import machine, seconds, versions
from moezoo.train.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
# Tokens, width, hidden units of an expert, experts, experts per token.
SHAPES = (
    (16384, 2048, 2048, 8, 2),
    (16384, 2048, 2048, 64, 2),
    (32768, 768, 1536, 32, 2),
    (4096, 384, 384, 16, 4),
)
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}  # of the largest number, at highest precision
SMALL = "--data.train 8000 --model.width 192 --model.depth 6 --model.heads 6 --optimiser.lr 1e-3"
SMALL += " --train.steps 3000 --train.batch 32 --evaluate.batch 40"
TINY = "--data.train 8 --data.test 4 --train.steps 2 --optimiser.warmup 1"
EXPERTS = "--model.experts 16 --model.top_k 4 --model.expert_ratio 1.0"
CLAIMS = {"rooms/vit_dense_tiny": "", "rooms/m3vit_tiny": EXPERTS}


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


class Stage(NamedTuple):
    """Work that leaves one file: `run(file)`; `expected` seconds on a data centre's card."""

    name: str
    expected: float
    run: Callable[[Path], None]


def sizes(small: bool) -> tuple[tuple[int, ...], ...]:
    """The shapes that are measured."""
    return ((64, 32, 48, 4, 2), (32, 16, 16, 2, 1)) if small else SHAPES


def rows_of(shape: tuple[int, ...], dtype: str, seed: int = 0) -> tuple[Any, ...]:
    """Rows, matrices, biases, their groups (uneven, one empty) and a cotangent."""
    tokens, width, hidden, experts, k = shape
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(experts)) * (np.arange(experts) != experts // 2)
    size_E = np.floor(shares / shares.sum() * tokens * k).astype(np.int32)
    end_E = jnp.asarray(np.cumsum(size_E), jnp.int32)
    keys = jax.random.split(jax.random.key(seed), 4)
    forms = ((tokens * k, width), (experts, width, hidden), (experts, hidden), (tokens * k, hidden))
    x, w, b, dy = (
        jax.random.normal(key, form, dtype) for key, form in zip(keys, forms, strict=True)
    )
    return x, w / width**0.5, b, Groups(end_E - jnp.asarray(size_E), end_E), dy


def plain(x_SD: Any, w_EDF: Any, b_EF: Any, groups: Groups) -> Any:
    """The same product, one expert after the other over all rows, in float32."""
    index_S = jnp.arange(x_SD.shape[0])[:, None]

    def add(y_SF: Any, own: Any) -> tuple[Any, None]:
        w_DF, b_F, start, end = own
        mine = (index_S >= start) & (index_S < end)
        x = jnp.where(mine, x_SD, 0).astype(jnp.float32)
        y = jnp.matmul(x, w_DF.astype(jnp.float32), precision="highest") + b_F
        return y_SF + jnp.where(mine, y, 0.0), None

    y_SF = jnp.zeros((x_SD.shape[0], w_EDF.shape[2]), jnp.float32)
    each = (w_EDF, b_EF.astype(jnp.float32), *groups)
    return jax.lax.scan(add, y_SF, each)[0].astype(x_SD.dtype)


def differences(shape: tuple[int, ...], dtype: str) -> dict[str, float]:
    """How far the kernels' value and derivatives are off, relative to the largest number."""
    x, w, b, groups, dy = rows_of(shape, dtype)

    def pulled(of: Callable[..., Any]) -> Any:
        y, pull = jax.vjp(lambda *arrays: of(*arrays, groups), x, w, b)
        return y, *pull(dy)

    found = jax.jit(lambda: pulled(grouped_matmul.grouped_matmul))()
    truth = jax.jit(lambda: pulled(plain))()
    names = ("value", "rows", "matrices", "biases")
    apart = {}
    for name, ours, theirs in zip(names, found, truth, strict=True):
        ours, theirs = (np.asarray(a, np.float64) for a in (ours, theirs))
        apart[name] = float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))
    return apart


def values(file: Path, small: bool) -> None:
    """Every shape and type; written whole, and an error where one is too far off."""
    with jax.default_matmul_precision("highest"):
        cases = product(sizes(small), LIMITS)
        rows = [{"shape": s, "dtype": d, **differences(s, d)} for s, d in cases]
    write(file, {"rows": rows, "limits": LIMITS})
    wrong = [row for row in rows if max(list(row.values())[2:]) > LIMITS[row["dtype"]]]
    if wrong:
        raise UserError(f"The kernels give other numbers than the plain product: {wrong[0]}.")


CANDIDATES = (
    *(Tiles(r, c, i, w, s) for r, c, i, w, s in (
        (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3),
        (128, 128, 32, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4),
        (32, 128, 64, 4, 4), (32, 64, 64, 4, 4),
    )),
)  # fmt: skip


def tiles(file: Path, small: bool) -> None:
    """Milliseconds of a product and of its derivatives by shape and tiles, the median of 10."""
    rows = []
    for shape, tile in product(sizes(small), CANDIDATES[:2] if small else CANDIDATES):
        x, w, b, groups, dy = rows_of(shape, "float32" if small else "bfloat16")
        grouped_matmul.TILES.update(dict.fromkeys(grouped_matmul.TILES, tile))

        def forward(x: Any = x, w: Any = w, b: Any = b, groups: Any = groups) -> Any:
            return grouped_matmul.grouped_matmul(x, w, b, groups)

        def both(x: Any = x, w: Any = w, b: Any = b, groups: Any = groups, dy: Any = dy) -> Any:
            return jax.vjp(lambda *a: grouped_matmul.grouped_matmul(*a, groups), x, w, b)[1](dy)

        row: dict[str, Any] = {"shape": shape, "tiles": tile}
        for name, call in (("forward", forward), ("backward", both)):
            try:
                row[name] = 1e3 * median(jax.jit(call))
            except Exception as error:  # too much shared memory for this card, for example
                row[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        rows.append(row)
        write(file.with_suffix(".part"), {"rows": rows})  # what is known if time runs out
    write(file, {"rows": rows})


def median(call: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of a call that has run once before."""
    jax.block_until_ready(call())
    return float(np.median([seconds(call) for _ in range(repeats)]))


def command(words: list[str], file: Path) -> None:
    """A command of this clone in a process of its own, its output beside the file."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with file.with_suffix(".log").open("w") as log:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, stdout=log, stderr=log)
    if done.returncode:
        raise UserError(f"{' '.join(words)} ended with {done.returncode}: see {log.name}.")


def moe(shape: tuple[int, ...], small: bool) -> Callable[[Path], None]:
    """Layers of one shape beside the dense network, forward and with derivatives."""
    tokens, width, hidden, experts, k = shape

    def run(file: Path) -> None:
        words = f"moezoo bench moe --json {file} --experts {experts} --k {k} --tokens {tokens}"
        words += f" --width {width} --hidden {hidden} --small-tokens 0"
        words += " --repeats 3 --dtype float32" if small else " --repeats 15 --dtype bfloat16"
        command([*words.split(), "--backends", "triton", "blocks", "capacity"], file)

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


def claim(name: str, seed: int, small: bool) -> Callable[[Path], None]:
    """A training run; the file holds its scores."""

    def run(file: Path) -> None:
        folder = file.parent / "runs"
        words = f"train.py {name} --directory {folder} --name {file.stem} --seed {seed}"
        words += f" {TINY}" if small else f" {SMALL} {CLAIMS[name]}"
        command(words.split(), file)
        command(["moezoo evaluate", str(folder / file.stem), "--json", str(file)], file)

    return run


def stages(small: bool) -> Iterator[Stage]:
    """All of them, in the order of their importance."""
    yield Stage("values", 60, lambda file: values(file, small))
    for shape in sizes(small):
        name = "moe_" + "_".join(map(str, shape))
        yield Stage(name, 40, moe(shape, small))
    yield Stage("tiles", 150, lambda file: tiles(file, small))
    yield Stage("suite", 400, lambda file: suite(file, small))
    for seed, name in product(range(3), CLAIMS):
        short = name.partition("/")[2]
        yield Stage(f"claim_{short}_{seed}", 160, claim(name, seed, small))


def write(file: Path, content: dict[str, Any]) -> None:
    """A stage's file, with the machine and the versions."""
    about = {"machine": machine(), "versions": versions("jax", "jaxlib", "flax")}
    write_atomically(file, json_text(content | about, 1))


def run(words: list[str]) -> int:
    """Run what is not done yet, as far as the time goes, and say what is left."""
    given, began = parse(GPUArguments, words, prog="moezoo bench gpu"), time.monotonic()
    if jax.default_backend() != "gpu" and not given.small:
        raise UserError("There is no GPU here: add --small to try the script without one.")
    wanted = list(stages(given.small))
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
