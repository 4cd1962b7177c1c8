"""A batch whose rows ask for different adapters beside one adapter for all, and a library of many.

The decoder is that of `text/skills_tiny` with random adapters of rank 8 on every linear layer, so
nothing has to be trained. All rows of both cases read and make the same number of tokens.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.generate import Settings, generate
from moezoo.command import parse
from moezoo.errors import UserError
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module, surgery
from moezoo.nn.context import Context
from moezoo.nn.layers import Linear
from moezoo.timing import TimedCall, interleave, machine, versions
from moezoo.train.console import Console
from moezoo.weights import library as libraries
from moezoo.weights import library_bank
from moezoo.weights.library import BaseModel, Library, Member, NewMember
from moezoo.weights.peft import Factors
from moezoo.weights.working_set import WorkingSet

MEMBERS = libraries.MEMBERS
SIZES: dict[str, Any] = {
    "vocabulary": 259,
    "width": 128,
    "depth": 4,
    "heads": 4,
    "groups": 2,
    "hidden": 256,
}


@dataclass(frozen=True)
class ServingArguments:
    """Time a decoder whose rows ask for different adapters, and load from a library of many.

    Example: moezoo bench serving --json serving.json
    """

    rows: int = 64
    """Rows of a batch, each with an adapter of its own."""
    prompt: int = 32
    """Tokens of a prompt."""
    new: int = 16
    """Tokens that are made."""
    rank: int = 8
    """Rank of every adapter."""
    members: int = 10_000
    """Adapters that the large library registers; its files are links to those of `rows` adapters,
    so that the disk need not hold them all."""
    repeats: int = 9
    """Paired repeats."""
    json: Path | None = None
    """File for the numbers."""


def decoder() -> Any:
    """The decoder of `text/skills_tiny`, freshly initialised."""
    return DecoderConfig(**SIZES, length=128).build(nnx.Rngs(0))


def random_library(folder: Path, count: int, rank: int) -> Library:
    """A library of adapters of random numbers on every linear layer of `decoder()`."""
    layers = {
        path: layer.kernel.get_value().shape
        for path, layer in surgery.find(decoder(), Linear).items()
        if path.startswith("layers/")
    }
    rng = np.random.default_rng(0)

    def member(number: int) -> NewMember:
        factors = {
            path: Factors(
                rng.normal(size=(d, rank)).astype(np.float32) / d**0.5,
                0.1 * rng.normal(size=(rank, o)).astype(np.float32),
                1.0,
                {},
            )
            for path, (d, o) in layers.items()
        }
        return NewMember(Member(f"adapter_{number:05}"), factors)

    base = BaseModel("random", "0" * 64)
    return libraries.create(folder, base, [member(i) for i in range(count)])


def registered(folder: Path, first: Library, count: int) -> Library:
    """A library of `count` members whose files are links to those of another one."""
    (folder / MEMBERS).mkdir(parents=True)
    files = [first.folder / MEMBERS / f"{name}.safetensors" for name in first.names]
    names = [f"registered_{i:05}" for i in range(count)]
    for i, name in enumerate(names):
        os.link(files[i % len(files)], folder / MEMBERS / f"{name}.safetensors")
    told = [vars(replace(Member(name))) for name in names]
    text = {
        "format": 1,
        "base": first.base._asdict(),
        "layers": {path: form._asdict() for path, form in first.layers.items()},
        "members": told,
    }
    (folder / libraries.MANIFEST).write_text(json_text(text))
    return Library(folder)


def one_for_all(a: ServingArguments, library: Library, tokens_BT: np.ndarray) -> TimedCall:
    """One plain adapter on the decoder, for every row."""
    model = decoder()
    library_bank.attach_merged(model, library, {library.names[0]: 1.0})
    return _timed(a, module.split(model), Context(), tokens_BT)


def one_for_each(a: ServingArguments, library: Library, tokens_BT: np.ndarray) -> TimedCall:
    """A bank of all members, every row with another one."""
    working = WorkingSet(decoder(), library, a.rows)
    slots_B = working.slots(library.names[: a.rows])
    return _timed(a, working.parts, Context(slots_B), tokens_BT)


def _timed(
    a: ServingArguments, parts: module.ModuleParts, context: Context, tokens_BT: np.ndarray
) -> TimedCall:
    settings = Settings(new=a.new)
    return lambda: generate(parts, tokens_BT, settings, context=context)


def many(a: ServingArguments, first: Library, folder: Path) -> dict[str, float]:
    """Opening a library of `members`, and serving batches of ever other ones from it."""
    began = time.perf_counter()
    library = registered(folder, first, a.members)
    wrote = time.perf_counter()
    library = Library(library.folder)
    opened = time.perf_counter()
    before = _memory()
    working = WorkingSet(decoder(), library, a.rows, kept=2 * a.rows)
    batches = np.random.default_rng(0).integers(0, a.members, (20, a.rows))
    working.slots([library.names[i] for i in batches[0]])
    after_first = time.perf_counter()
    for batch in batches[1:]:
        working.slots([library.names[i] for i in batch])
    jax.block_until_ready(working.parts.stats)
    ended = time.perf_counter()
    return {
        "members": a.members,
        "seconds to register": wrote - began,
        "seconds to open": opened - wrote,
        "members read": working.read,
        "milliseconds per batch": 1e3 * (ended - after_first) / (len(batches) - 1),
        "bound in MB": working.most_bytes / 1e6,
        "whole library in MB": a.members * library.bytes_of_member() / 1e6,
        "growth of the process in MB": _memory() - before,
    }


def _memory() -> float:
    """The most memory that the process has had so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def run(words: list[str]) -> int:
    """Time, print tables, write the file."""
    a = parse(ServingArguments, words, prog="moezoo bench serving")
    for name in ("rows", "prompt", "new", "rank", "repeats"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name} is {getattr(a, name)}; it must be at least 1.")
    if a.members < a.rows:
        raise UserError(f"--members is {a.members}; a batch already asks for {a.rows}.")
    check_file(a.json)
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="moezoo-serving-"))
    try:
        return _measured(a, console, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measured(a: ServingArguments, console: Console, folder: Path) -> int:
    library = random_library(folder / "each", a.rows, a.rank)
    tokens_BT = np.random.default_rng(1).integers(0, 259, (a.rows, a.prompt))
    base = one_for_all(a, library, tokens_BT)
    each = one_for_each(a, library, tokens_BT)
    name = f"{a.rows} adapters in {a.rows} rows"
    times = [case for case in interleave(base, {name: each}, a.repeats)][-1][name]
    low, middle, high = np.quantile(times.ratios, [0.25, 0.5, 0.75])
    row = {"case": name, "milliseconds": 1e3 * float(np.median(times.case))}
    row |= {"ratio": float(middle), "low": float(low), "high": float(high)}
    title = f"{a.prompt} tokens read and {a.new} made, against one adapter for all rows"
    console.table(title, tuple(row), [tuple(row.values())])
    large = many(a, library, folder / "many")
    console.table("A library of many", ("what", "value"), list(large.items()))
    if a.json is not None:
        facts = {"machine": machine(), "versions": versions("jax", "jaxlib")}
        write_atomically(a.json, json_text(facts | {"batch": row, "library": large}, 2))
    return 0
