"""`moezoo bench stream`: a MoE layer whose experts stay in a file beside the same one in memory.

For every number of experts fresh processes each do one thing: the peak of anonymous memory (RssAnon
of /proc/self/status, which leaves out pages of files) while the streamed layer runs, the same for
the resident layer, and times of both in paired repeats, with tasks in turn and one after the other.
Growth is counted from before the layer is there, so it holds weights, activations and programs.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array

from moezoo.command import parse
from moezoo.deploy import stream
from moezoo.errors import UserError
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.nn.experts import MLPExperts
from moezoo.nn.moe import MoE
from moezoo.nn.routers import MultiGateRouter
from moezoo.ops.grouped import by_name
from moezoo.timing import TimedCall, interleave, machine, versions
from moezoo.train import saved
from moezoo.train.console import Console
from moezoo.weights.rows import RowFile

MIB = 2**20
TASKS = 2
STATUS = Path("/proc/self/status")
EVERY = 1e-3  # seconds between two looks at the memory
# What is freed goes back to the system at once (glibc). What an allocator keeps would count, too,
# and differs by tens of MiB from one process to the next.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
Measure = Literal["all", "streamed", "resident", "times"]


@dataclass(frozen=True)
class StreamArguments:
    """Peak memory and time of a MoE layer with experts in a file, beside all experts in memory.

    Example: moezoo bench stream --json stream.json --picture stream.png
    """

    experts: tuple[int, ...] = (4, 16, 64)
    """Numbers of experts."""
    tokens: int = 1024
    """Tokens of a batch."""
    width: int = 768
    """Width of a token."""
    hidden: int = 3072
    """Hidden units of an expert."""
    k: int = 2
    """Experts per token."""
    repeats: int = 9
    """Paired repeats."""
    processes: int = 5
    """Fresh processes for each peak of memory, of which the largest counts."""
    measure: Measure = "all"
    """One measurement in this process, of the first number of experts, as a line of JSON."""
    file: Path | None = None
    """The layer's weights, for one measurement."""
    json: Path | None = None
    """File for the numbers."""
    picture: Path | None = None
    """File for a picture of them."""


class StreamRow(NamedTuple):
    """One number of experts: MiB of growth, milliseconds, and ratios of paired repeats.

    throughput: of the streamed layer divided by that of the resident one.   in_turn: the time of
    two tasks in turn divided by that of one after the other.
    """

    experts: int
    weights_mib: float
    streamed_mib: float
    resident_mib: float
    streamed_ms: float
    resident_ms: float
    throughput: float
    in_turn: float


HEADER = ("E", "weights", "streamed", "resident", "ms", "ms resident", "throughput", "in turn")


class TaskLayer(nnx.Module):
    """A MoE layer with one router per task, as a model of one task a call."""

    def __init__(self, a: StreamArguments):
        rngs, experts = nnx.Rngs(0), a.experts[0]
        router = MultiGateRouter(TASKS, a.width, experts, k=a.k, rngs=rngs)
        stack = MLPExperts(experts, a.width, a.hidden, rngs=rngs)
        self.moe = MoE(router, stack, by_name("auto"))

    def __call__(self, x_ND: Array, task: int) -> Array:
        return self.moe(x_ND, Context(task_B=task)).y_ND


def empty(a: StreamArguments) -> Any:
    """The layer as shapes only."""
    return module.merge(*module.abstract(partial(TaskLayer, a)))


def streamed_layer(a: StreamArguments) -> Callable[[Array, int], Array]:
    """`(x_ND, task) -> y_ND` with experts from the file."""
    assert a.file is not None
    file = RowFile(a.file)
    parts = module.split(stream.with_calls(stream.emptied(empty(a), file)))

    def forward(params: Any, stats: Any, x: Array, *, task: int) -> Array:
        return module.merge(parts.definition, params, stats)(x, task)

    run = stream.Streamed(forward, file)
    return lambda x, task: run(parts.params, parts.stats, x, task=task)


def resident_layer(a: StreamArguments) -> Callable[[Array, int], Array]:
    """`(x_ND, task) -> y_ND` with all experts in memory, as training has them."""
    assert a.file is not None
    parts = module.split(empty(a))
    target = {"params": parts.params, "stats": parts.stats}
    held = saved.read_file(RowFile(a.file).tensors, target)

    @partial(jax.jit, static_argnames="task")
    def run(params: Any, x: Array, task: int) -> Array:
        return module.merge(parts.definition, params, held["stats"])(x, task)

    return lambda x, task: run(held["params"], x, task)


def anonymous() -> int:
    """Bytes of this process's memory that are no pages of files."""
    for line in STATUS.read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise UserError(f"{STATUS} does not tell RssAnon: this benchmark needs Linux 4.5 or later.")


@contextmanager
def peak() -> Iterator[list[int]]:
    """A list whose only number is the largest anonymous memory while the block runs, in bytes."""
    found, ended = [anonymous()], threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY):
            found[0] = max(found[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def give_back() -> None:
    """Return to the system what compilers have freed, where the C library knows how.

    It would stay with this process, and be more where more sizes of blocks were compiled.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def batch(a: StreamArguments) -> Array:
    """Tokens [N, D]."""
    return jax.random.normal(jax.random.key(1), (a.tokens, a.width))


def growth(a: StreamArguments, make: Callable[[StreamArguments], Any]) -> dict[str, float]:
    """MiB that the memory has grown by at its largest, from before the layer is made.

    Of calls whose programs are compiled already.
    """
    x_ND = batch(a).block_until_ready()
    before = anonymous()
    layer = make(a)

    def calls() -> None:
        for task in (0, 1) * 6:
            layer(x_ND, task).block_until_ready()

    calls()
    give_back()
    with peak() as found:
        calls()
    return {"mib": (found[0] - before) / MIB}


def times(a: StreamArguments) -> dict[str, float]:
    """Medians: milliseconds of a call, and ratios of what ran side by side."""
    x_ND, streamed, resident = batch(a), streamed_layer(a), resident_layer(a)
    np.testing.assert_allclose(streamed(x_ND, 0), resident(x_ND, 0), rtol=1e-4, atol=1e-5)

    def calls(*tasks: int) -> TimedCall:
        return lambda: [streamed(x_ND, task) for task in tasks]

    one = {"streamed": lambda: streamed(x_ND, 0)}
    *_, pairs = interleave(lambda: resident(x_ND, 0), one, a.repeats)
    *_, turns = interleave(calls(0, 0, 1, 1), {"turn": calls(0, 1, 0, 1)}, a.repeats)
    pair = pairs["streamed"]
    return {
        "streamed_ms": 1e3 * float(np.median(pair.case)),
        "resident_ms": 1e3 * float(np.median(pair.base)),
        "throughput": 1 / float(np.median(pair.ratios)),
        "in_turn": float(np.median(turns["turn"].ratios)),
    }


MEASURES: dict[str, Callable[[StreamArguments], dict[str, float]]] = {
    "streamed": partial(growth, make=streamed_layer),
    "resident": partial(growth, make=resident_layer),
    "times": times,
}


def in_fresh_process(a: StreamArguments, measure: str, experts: int, file: Path) -> Any:
    """What `measure` gives for a number of experts in a process of its own."""
    words = ["--measure", measure, "--experts", str(experts), "--file", str(file)]
    for name in ("tokens", "width", "hidden", "k", "repeats"):
        words += [f"--{name}", str(getattr(a, name))]
    command = [sys.executable, "-m", "moezoo", "bench", "stream", *words]
    own = {} if MEASURES[measure] is times else MALLOC  # which costs time
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    if done.returncode:
        raise UserError(f"The process for {measure} of {experts} experts failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row_of(a: StreamArguments, experts: int, told: Callable[[str], None]) -> StreamRow:
    """All measurements of a number of experts; writes their weights to a temporary file."""
    sizes = StreamArguments(
        experts=(experts,), tokens=a.tokens, width=a.width, hidden=a.hidden, k=a.k
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layer.safetensors"
        stream.write(module.merge(*module.create(partial(TaskLayer, sizes))), file)
        found: dict[str, Any] = {}
        for name in MEASURES:
            told(name)
            runs = a.processes if MEASURES[name] is not times else 1
            every = [in_fresh_process(a, name, experts, file) for _ in range(runs)]
            # Of a peak that lasts for less than a look and the next: some are missed, none made up.
            found[name] = {key: max(one[key] for one in every) for key in every[0]}
        return StreamRow(
            experts=experts,
            weights_mib=file.stat().st_size / MIB,
            streamed_mib=found["streamed"]["mib"],
            resident_mib=found["resident"]["mib"],
            **found["times"],
        )


def picture(a: StreamArguments, rows: list[StreamRow]) -> bytes:
    """Memory and throughput over the number of experts, PNG bytes."""
    from matplotlib.figure import Figure  # a third of a second, which single measurements save

    from moezoo.train.pictures import drawn

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    experts = [row.experts for row in rows]
    for label in ("weights", "resident", "streamed"):
        mib = [getattr(row, f"{label}_mib") for row in rows]
        style = {"color": "grey", "linestyle": ":"} if label == "weights" else {"marker": "o"}
        left.plot(experts, mib, label=label, **style)
    left.set_ylabel("growth of anonymous memory, MiB")
    left.set_yscale("log")
    left.legend()
    right.plot(experts, [row.throughput for row in rows], marker="o", label="streamed / resident")
    right.plot(experts, [1 / row.in_turn for row in rows], marker="o", label="tasks in turn / one")
    right.set_ylabel("throughput")
    right.set_ylim(0, 1.3)
    right.legend(loc="lower left")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(experts, [str(e) for e in experts])
        panel.set_xlabel("experts E")
        panel.grid(alpha=0.3)
    figure.suptitle(f"Experts from a file: N={a.tokens}, D={a.width}, F={a.hidden}, K={a.k}")
    return drawn(figure, 120)


def check(a: StreamArguments) -> None:
    """UserError for sizes that cannot be, and where memory cannot be read."""
    for name in ("tokens", "width", "hidden", "k", "repeats", "processes"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name} is {getattr(a, name)}; it must be at least 1.")
    if not a.experts or min(a.experts) < a.k:
        raise UserError(f"--experts is {a.experts}; give numbers of at least {a.k}, the --k.")
    if (a.measure == "all") == (a.file is not None):
        raise UserError("--file is for one --measure, which needs it: give both or neither.")
    if not STATUS.exists():
        raise UserError(f"Memory is read from {STATUS}, which is only there on Linux.")
    check_file(a.json)
    check_file(a.picture)


def run(words: list[str]) -> int:
    """Measure, print a table, write the files."""
    a = parse(StreamArguments, words, prog="moezoo bench stream")
    check(a)
    if a.measure != "all":
        print(json.dumps(MEASURES[a.measure](a)))
        return 0
    console, rows = Console(), []
    for experts in a.experts:
        rows.append(row_of(a, experts, lambda what, e=experts: console.say(f"E={e}: {what}")))
    title = f"{a.tokens} tokens, {a.width} wide, {a.hidden} hidden, {a.k} of E experts"
    console.table(title, HEADER, [[f"{value:.3g}" for value in row] for row in rows])
    low, high = (f(row.streamed_mib for row in rows) for f in (min, max))
    console.say(f"Streamed memory grows by {high / low - 1:.1%} between its extremes.")
    if a.json is not None:
        facts = {"machine": machine(), "versions": versions("jax", "jaxlib")}
        sizes = {name: getattr(a, name) for name in ("tokens", "width", "hidden", "k")}
        told = [row._asdict() for row in rows]
        write_atomically(a.json, json_text(facts | {"sizes": sizes, "rows": told}, 2))
    if a.picture is not None:
        write_atomically(a.picture, picture(a, rows))
    return 0
