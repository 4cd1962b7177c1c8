"""`moezoo bench gpu`: what has to be checked and measured where a GPU is, most important first.

A card is often lent for minutes. So this is a list of stages, each a process of its own that leaves
one file in `--out` when it is done; stages with a file are not run again, and none is begun that
would not end within `--seconds`. Take the folder along and run the same command again to go on.

    values    kernels and layers against the plain products, float32 and bfloat16
    moe       layers of experts beside the dense network of equal active FLOPs
    claim     a model of experts beside its dense baseline, trained from three seeds at once
    tiles     each table entry's alternatives on the shapes of the table
    suite     the fast tests of ops, nn and parity, those of `-m gpu` among them
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.command import parse
from moezoo.errors import UserError, unknown
from moezoo.json_text import json_text
from moezoo.nn.layers import gelu
from moezoo.ops import grouped_matmul, mosaic_products, triton_products
from moezoo.ops.grouped_matmul import Groups
from moezoo.ops.mosaic_products import MosaicTiles
from moezoo.ops.triton_products import TritonTiles
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
# Also those in which blocks are partly or never full, widths odd, steps fewer than stages.
CHECKED = (
    *((4096, 384, 384, 16, 4), (2048, 768, 1536, 4, 2), (300, 64, 64, 8, 1), (64, 128, 256, 2, 1)),
    *((1, 128, 128, 4, 2), (1000, 72, 200, 5, 3), (512, 192, 192, 4, 2)),
)
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}  # of the largest number, at highest precision
TINY = "--data.train 8 --data.test 4 --train.steps 2 --train.batch 2 --optimiser.warmup 1"
TINY += " --evaluate.batch 4 --evaluate.pictures 0 --model.width 24 --model.depth 2 --model.heads 2"
CLAIMS = ("rooms/vit_dense_small", "rooms/m3vit_small")
SEEDS = 3


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


class Rows(NamedTuple):
    """Rows in blocks of experts, what multiplies them, a cotangent; holds_S: not empty."""

    x_SD: Any
    w_EDF: Any
    b_EF: Any
    groups: Groups
    dy_SF: Any
    holds_S: Any


def rows_of(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Rows:
    """Uneven groups, one of them empty; NaN in the blocks that are not in use."""
    tokens, width, hidden, experts, k = shape
    rng, rows = np.random.default_rng(seed), tokens * k
    block = grouped_matmul.rows_of_block(rows, experts)
    shares = rng.dirichlet(np.full(experts, 5.0)) * (np.arange(experts) != experts // 2)
    size_E = np.floor(shares / shares.sum() * rows).astype(np.int32)
    count_E = np.maximum(-(-size_E // block), 1)
    last_E, blocks = np.cumsum(count_E), rows // block + experts
    row_PB = np.arange(block) + block * (np.arange(blocks)[:, None])
    expert_P = np.minimum(np.searchsorted(last_E, np.arange(blocks), side="right"), experts - 1)
    begin_E = (last_E - count_E) * block
    holds_S = (row_PB < (begin_E + size_E)[expert_P][:, None]).reshape(-1)
    used_S = np.arange(blocks * block) < last_E[-1] * block
    keys = jax.random.split(jax.random.key(seed), 4)
    s = blocks * block
    forms = ((s, width), (experts, width, hidden), (experts, hidden), (s, hidden))
    x, w, b, dy = (
        jax.random.normal(key, form, dtype) for key, form in zip(keys, forms, strict=True)
    )
    empty = jnp.where(used_S, 0.0, jnp.nan).astype(dtype)[:, None]
    x, dy = (jnp.where(holds_S[:, None], a, empty) for a in (x, dy))
    groups = Groups(*(jnp.asarray(a, jnp.int32) for a in (expert_P, last_E - count_E, last_E)))
    return Rows(x, w / width**0.5, b, groups, dy, jnp.asarray(holds_S))


def plain(rows: Rows, x_SD: Any, w_EDF: Any, b_EF: Any) -> Any:
    """The same product and activation, one expert after the other over all rows, in float32."""
    expert_S = jnp.repeat(rows.groups.expert_P, x_SD.shape[0] // rows.groups.expert_P.shape[0])

    def add(y_SF: Any, own: Any) -> tuple[Any, None]:
        w_DF, b_F, expert = own
        mine_S1 = (rows.holds_S & (expert_S == expert))[:, None]
        x = jnp.where(mine_S1, x_SD, 0).astype(jnp.float32)
        y = jnp.matmul(x, w_DF.astype(jnp.float32), precision="highest") + b_F
        return jnp.where(mine_S1, y, y_SF), None

    y_SF = jnp.zeros((x_SD.shape[0], w_EDF.shape[2]), jnp.float32)
    each = (w_EDF, b_EF.astype(jnp.float32), jnp.arange(w_EDF.shape[0]))
    return jnp.where(rows.holds_S[:, None], gelu(jax.lax.scan(add, y_SF, each)[0]), 0.0)


def differences(shape: tuple[int, ...], dtype: str) -> dict[str, float]:
    """How far the kernels' value and derivatives are off, relative to the largest number."""
    rows = rows_of(shape, dtype)
    x, w, b, groups, dy, holds_S = rows

    def ours(x: Any, w: Any, b: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda *a: grouped_matmul.grouped_matmul(*a, groups, gelu), x, w, b)
        return y, *pull(dy)

    def theirs(x: Any, w: Any, b: Any, dy: Any) -> Any:
        dy = jnp.where(holds_S[:, None], dy, 0.0).astype(jnp.float32)
        y, pull = jax.vjp(lambda *a: plain(rows, *a), x, w, b)
        return y, *pull(dy)

    found, truth = jax.jit(ours)(x, w, b, dy), jax.jit(theirs)(x, w, b, dy)
    apart: dict[str, float] = {}
    for name, mine, exact in zip(
        ("value", "rows", "matrices", "biases"), found, truth, strict=True
    ):
        if name in ("value", "rows"):
            mine, exact = (jnp.where(holds_S[:, None], a, 0) for a in (mine, exact))
        off = jnp.max(jnp.abs(mine.astype(jnp.float32) - exact.astype(jnp.float32)))
        apart[name] = float(off / jnp.maximum(jnp.max(jnp.abs(exact)), 1e-30))
    return apart


def values(file: Path, small: bool) -> None:
    """Every shape and type; written whole, and an error where one is too far off."""

    def compared(case: tuple[tuple[int, ...], str]) -> dict[str, Any]:
        with jax.default_matmul_precision("highest"):  # each thread has its own
            return {"shape": case[0], "dtype": case[1], **differences(*case)}

    # Most of the time goes to compiling, which several threads do at once.
    with ThreadPoolExecutor(1 if small else 8) as pool:
        rows = list(pool.map(compared, product(CHECKED[4:] if small else CHECKED, LIMITS)))
    write(file, {"rows": rows, "limits": LIMITS})
    wrong = [row for row in rows if not max(list(row.values())[2:]) <= LIMITS[row["dtype"]]]
    if wrong:
        raise UserError(f"The kernels give other numbers than the plain product: {wrong}.")


CANDIDATES: dict[str, tuple[Any, ...]] = {
    "mosaic": (
        *(MosaicTiles(128, 128, True, near) for near in (4, 8, 16)),
        *(MosaicTiles(64, 256, False, near) for near in (4, 8, 16)),
        MosaicTiles(64, 128, False), MosaicTiles(64, 128, True), MosaicTiles(64, 192, False),
    ),
    "triton": tuple(TritonTiles(*numbers) for numbers in (
        (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
        (128, 256, 32, 8, 4), (128, 64, 64, 4, 4),
    )),
}  # fmt: skip


def with_tiles(kind: str, tiles: Any) -> Any:
    """The tables of both kinds of kernels with these tiles alone; a context."""
    made = ExitStack()
    kernels = triton_products if kind == "triton" else mosaic_products
    made.enter_context(mock.patch.object(grouped_matmul, "kernels_for", lambda *_: kernels))
    changes: dict[str, Any] = {"TILES": dict.fromkeys(triton_products.TILES, tiles)}
    if kind == "mosaic":
        changes = {"ROWS": (tiles,), "MATRICES": (tiles,)}
    made.enter_context(mock.patch.multiple(kernels, **changes))
    return made


def tiles(file: Path, small: bool) -> None:
    """Milliseconds of a product and of its derivatives by shape and tiles, the median of 10."""
    found = []
    for shape in sizes(small):
        x, w, b, groups, dy, _ = rows_of(shape, "float32" if small else "bfloat16")

        def forward(x: Any = x, w: Any = w, b: Any = b, groups: Any = groups) -> Any:
            return grouped_matmul.grouped_matmul(x, w, b, groups)

        def both(x: Any = x, w: Any = w, b: Any = b, groups: Any = groups, dy: Any = dy) -> Any:
            return jax.vjp(lambda *a: grouped_matmul.grouped_matmul(*a, groups), x, w, b)[1](dy)

        for kind, candidates in CANDIDATES.items():
            for one in candidates[:1] if small else candidates:
                row: dict[str, Any] = {"shape": shape, "kernels": kind, "tiles": one}
                for name, call in (("forward", forward), ("backward", both)):
                    try:
                        with with_tiles(kind, one):
                            row[name] = 1e3 * median(jax.jit(call))
                    except Exception as error:  # do not fit this shape or this card
                        row[name] = f"{type(error).__name__}: {str(error)[:200]}"
                found.append(row)
                write(file.with_suffix(".part"), {"rows": found})  # known if time runs out
    write(file, {"rows": found})


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
        backends = ["kernels", "fused", "blocks", "capacity"]
        if not small and find_spec("torch"):
            backends.append("torch_grouped")
        command([*words.split(), "--backends", *backends], file)

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


def claim(file: Path, small: bool) -> None:
    """Every model and seed, all processes at once; the file holds the run folders and their logs.

    Small models leave most of a card idle between their kernels, so that six of them take little
    longer than one. Weights of the first seeds are saved as models beside the file.
    """
    folder = file.parent / "runs"
    runs = list(product(range(1 if small else SEEDS), CLAIMS))
    # The first to come makes the data, which the others then find.
    made = f"train.py {CLAIMS[0]} --directory {folder} --name data {TINY if small else ''}"
    made += " --train.steps 1 --optimiser.warmup 0 --evaluate.pictures 0"
    command(made.split(), file.with_name("data.json"))

    def one(seed: int, name: str) -> Path:
        own = file.with_name(f"{name.partition('/')[2]}_{seed}.json")
        words = f"train.py {name} --directory {folder} --name {own.stem} --seed {seed}"
        command(f"{words} {TINY if small else ''}".split(), own)
        return folder / own.stem

    with ThreadPoolExecutor(len(runs)) as pool:
        done = list(pool.map(lambda run: one(*run), runs))
    for run in done[: len(CLAIMS)]:
        kept = folder / f"{run.name}_saved"
        if not kept.exists():  # it is written whole, so what an earlier call left is good
            words = ["-m", "moezoo", "save", str(run), "--out", str(kept)]
            command(words, file.with_name(f"{kept.name}.json"))
    write(file, {"runs": [str(run) for run in done]})


def stages(small: bool) -> Iterator[Stage]:
    """All of them, in the order of their importance."""
    yield Stage("values", 60, lambda file: values(file, small))
    for shape in sizes(small):
        name = "moe_" + "_".join(map(str, shape))
        yield Stage(name, 40, moe(shape, small))
    yield Stage("claim", 300, lambda file: claim(file, small))
    yield Stage("tiles", 150, lambda file: tiles(file, small))
    yield Stage("suite", 400, lambda file: suite(file, small))


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
