"""Expert-by-expert execution: experts' weights stay in a file, and two of them are in memory.

M3ViT's computation reordering (arXiv:2210.14793, section 3.2, figure 4) in software. A layer first
routes all of its tokens and sorts them by expert; then the experts that have tokens are applied one
after another, each to its whole queue, while the weights of the next one are read into the other of
two slots. The memory for experts is thus two slots, whatever their number, and nothing that is in
memory belongs to a task but its router and its head: another task only reads another router.

What works on the file is `Streamed`; `opened` makes one of a saved model without ever holding its
experts. `segments` says how a model is cut in pieces; the pieces are compiled as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.core import Tracer

from moezoo.deploy.pinned import ExpertPlace, rows_in
from moezoo.deploy.segments import (
    CutCall,
    CutProgram,
    ExpertCall,
    StoredLeaf,
    cut,
    run_program,
)
from moezoo.deploy.specialise import copy_of, layers_of
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.moe import MoE
from moezoo.ops.dispatch import Slots, combine, sort_by_expert, sorted_slots, spread
from moezoo.ops.expert import ExpertFn, dense
from moezoo.train import restore, saved, zoo
from moezoo.train.placement import path_name
from moezoo.train.setup import Loaded, classes_of, make_builder, make_tasks
from moezoo.weights import tensor_file
from moezoo.weights.rows import RowFile

# Rows of a queue that one step takes. Few sizes, so that few programs are compiled; a queue is
# whole blocks of the largest, and a rest that is rounded up to the next size.
BLOCKS = (16, 32, 48, 64, 96, 128, 192, 256)
ALIGNED = 64  # bytes; the CPU backend takes arrays that lie so as they are, without a copy
GROUPS = ("params", "stats")


class Streamed:
    """A function of a model's arrays, whose experts come from a file.

    fn: `(params, stats, *given, **static)`, which applies a model that `with_calls` made.
    Calling it is like calling `fn`; where `params` and `stats` have a `segments.StoredLeaf`, the
    file has the array. Raises UserError for models that cannot be cut (`segments.cut`), inside of
    compiled functions, and for a file that was changed meanwhile.

    place: where experts are that were read once. `pinned_host` needs room for all of them in the
    host's memory; on a platform that has no such kind they come from the file as ever.
    """

    def __init__(self, fn: Callable[..., Any], file: RowFile, place: ExpertPlace = "file"):
        self._fn, self._file = fn, file
        self._pinned = rows_in(place, file, jax.local_devices()[0])
        self._programs: dict[Any, CutProgram] = {}
        self._slots: list[np.ndarray] = [np.empty(0, np.uint8)] * 2
        self._views: dict[CutCall, tuple[_Views, ...]] = {}
        self._outputs: Array | None = None
        self._lock = Lock()

    def __call__(self, params: Any, stats: Any, *given: Any, **static: Any) -> Any:
        """What `fn` gives; one call at a time."""
        tree = {"params": params, "stats": stats, "given": given}
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(given)):
            raise UserError(
                "A streamed model reads its file between compiled pieces: ask it outside of "
                "compiled functions, or load it as a whole."
            )
        with self._lock:
            program = self._program(tree, static)
            found = run_program(program, tree, self._apply)
            self._file.check_unchanged()
            return found

    def _program(self, tree: Any, static: Mapping[str, Any]) -> CutProgram:
        leaves, structure = jax.tree.flatten(tree)
        shapes = tuple((a.shape, a.dtype) for a in leaves)
        key = (structure, shapes, tuple(sorted(static.items())))
        if key not in self._programs:

            def whole(tree: Any) -> Any:
                return self._fn(tree["params"], tree["stats"], *tree["given"], **static)

            program = cut(whole, tree)
            self._make_room([segment.call for segment in program.segments if segment.call])
            self._programs[key] = program
        return self._programs[key]

    def _make_room(self, calls: Sequence[CutCall]) -> None:
        """Two slots that are large enough for every expert of these calls, and places in them."""
        if self._pinned is not None:  # its rows go to the device by themselves
            return
        size = max(_bytes(self._file, call) for call in calls)
        if self._slots[0].nbytes < size:
            # On pages of their own, which begin at a multiple of any alignment.
            self._slots = [tensor_file.own_pages((size,), np.uint8) for _ in range(2)]
            calls = [*self._views, *calls]
        for call in calls:
            self._views[call] = tuple(_views(self._file, call, slot) for slot in self._slots)

    def _apply(self, call: CutCall, x_ND: Array, experts_NK: Array, weights_NK: Array) -> Array:
        """The weighted sum of what each token's experts give, [N, width], in the type of x."""
        sent = _sent(x_ND, experts_NK, experts=call.experts)
        # The one place where the host waits for the device: it has to know whom to read.
        live = np.flatnonzero(counts := np.asarray(sent.count_E))
        starts = np.cumsum(counts) - counts
        y_SD = self._taken((len(sent.x_SD), *call.row.shape), call.row.dtype)
        running: _Running | None = None
        for turn, expert in enumerate(live):
            weights = self._load(call, int(expert), turn % 2)
            y_SD, token = _queue(call, y_SD, sent.x_SD, weights, starts[expert], counts[expert])
            if running is not None:
                running.wait()  # its slot is the next one to be filled
            running = _Running(weights, token)
        if running is not None:
            running.wait()
        self._outputs = y_SD
        return _collected(y_SD, weights_NK, sent.slots, dtype=x_ND.dtype)

    def _taken(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Room for outputs, of any content: that of the last layer, where it has the same size.

        Fresh memory costs a tenth of a layer's time, until the system has brought its pages.
        """
        room, self._outputs = self._outputs, None
        fits = room is not None and (room.shape, room.dtype) == (shape, dtype)
        return room if room is not None and fits else jnp.zeros(shape, dtype)

    def _load(self, call: CutCall, expert: int, slot: int) -> list[Any]:
        """One expert's weights, read into a slot whose last user has finished."""
        if self._pinned is not None:
            return self._pinned.on_device([operand.name for operand in call.operands], expert)
        views = self._views[call][slot]
        for name, view in views:
            self._file.read(name, expert, view)
        arrays = [view for _, view in views]
        # A CPU computes on the slot itself; elsewhere every block of a queue would send it anew.
        return arrays if jax.default_backend() == "cpu" else jax.device_put(arrays)


class _Running(NamedTuple):
    """An expert that is at work: its weights, and a number that is there when it has finished."""

    weights: list[Any]
    token: Array

    def wait(self) -> None:
        # Without waiting the host would run ahead: it would overwrite the weights of an expert that
        # is at work, and on a GPU hold every expert.
        self.token.block_until_ready()
        for array in self.weights:
            if isinstance(array, Array):
                array.delete()


_Views = list[tuple[str, np.ndarray]]  # by name, where the arrays of one expert lie in a slot


def _views(file: RowFile, call: CutCall, slot: np.ndarray) -> _Views:
    views, at = [], 0
    for operand in call.operands:
        form = file.form(operand.name)
        view = slot[at : at + form.bytes].view(form.dtype).reshape(form.shape)
        views.append((operand.name, view))
        at += form.bytes + -form.bytes % ALIGNED
    return views


def _bytes(file: RowFile, call: CutCall) -> int:
    """Of one expert in a slot."""
    sizes = (file.form(operand.name).bytes for operand in call.operands)
    return sum(size + -size % ALIGNED for size in sizes)


class _Sent(NamedTuple):
    """Tokens in order of their experts, and behind them room for a block; how many of each."""

    x_SD: Array
    slots: Slots
    count_E: Array


@partial(jax.jit, static_argnames="experts")
def _sent(x_ND: Array, experts_NK: Array, *, experts: int) -> _Sent:
    plan = sort_by_expert(experts_NK, experts)
    slots = sorted_slots(plan, experts_NK.shape[1])
    x_SD = jnp.pad(spread(x_ND, slots), ((0, BLOCKS[-1]), (0, 0)))
    return _Sent(x_SD, slots, plan.end_E - plan.start_E)


@partial(jax.jit, static_argnames="dtype")
def _collected(y_SD: Array, weights_NK: Array, slots: Slots, *, dtype: Any) -> Array:
    return combine(y_SD, weights_NK, slots).astype(dtype)


def blocks_of(rows: int) -> list[tuple[int, int]]:
    """How a queue is cut: first row and size of each block, sizes out of `BLOCKS`.

    Only the last block may reach over the end of the queue.
    """
    most = BLOCKS[-1]
    whole = [(first, most) for first in range(0, rows - most + 1, most)]
    done = len(whole) * most
    if done == rows:
        return whole
    return [*whole, (done, next(size for size in BLOCKS if size >= rows - done))]


def _queue(
    call: CutCall, y_SD: Array, x_SD: Array, weights: Sequence[Any], start: int, rows: int
) -> tuple[Array, Array]:
    """Put what an expert makes of its rows into `y_SD`, which is used up."""
    token = None
    dtypes = tuple(operand.dtypes for operand in call.operands)
    for first, size in blocks_of(int(rows)):
        step = _step(call.fn, call.tree, dtypes, size)
        y_SD, token = step(y_SD, x_SD, np.int32(start + first), list(weights))
    assert token is not None
    return y_SD, token


@cache
def _step(
    fn: ExpertFn, tree: Any, dtypes: tuple[tuple[np.dtype, ...], ...], rows: int
) -> Callable[..., tuple[Array, Array]]:
    def step(
        y_SD: Array, x_SD: Array, start: Array, weights: Sequence[Array]
    ) -> tuple[Array, Array]:
        params = tree.unflatten([_converted(w, d) for w, d in zip(weights, dtypes, strict=True)])
        y_RD = fn(params, lax.dynamic_slice_in_dim(x_SD, start, rows), dense)
        # Rows behind the queue are the next experts', who come later and overwrite them.
        y_SD = lax.dynamic_update_slice_in_dim(y_SD, y_RD.astype(y_SD.dtype), start, 0)
        return y_SD, y_RD[0, 0]

    return jax.jit(step, donate_argnums=0)


def _converted(array: Array, dtypes: Sequence[np.dtype]) -> Array:
    for dtype in dtypes:
        array = array.astype(dtype)
    return array


def with_calls(model: nnx.Module) -> Any:
    """A copy of the model whose MoE layers leave their experts to a `Streamed`.

    Raises UserError where it has no MoE layer.
    """
    made = copy_of(model)
    for path, layer in with_layers(made).items():
        layer.apply = ExpertCall(path, layer.apply)
    return made


def with_layers(model: nnx.Module) -> dict[str, MoE]:
    """The MoE layers of a model by path; UserError where it has none."""
    layers = layers_of(model)
    if not layers:
        raise UserError("This model has no MoE layer: nothing can be streamed, load it as a whole.")
    return layers


def of_experts(model: nnx.Module) -> Callable[[str], bool]:
    """Whether a path, such as `params/blocks/1/mlp/experts/fc1/kernel`, is one of experts."""
    prefixes = tuple(f"{group}/{path}/experts/" for group in GROUPS for path in layers_of(model))
    return lambda name: name.startswith(prefixes)


def write(model: nnx.Module, path: Path) -> Path:
    """Write all of a model's arrays, in the types they have, as a file for `Streamed`.

    Raises UserError where the disk does not take it.
    """
    parts = module.split(model)
    arrays = module.flatten({"params": parts.params, "stats": parts.stats})
    planned = {
        name: tensor_file.Planned(a.shape, np.dtype(a.dtype), partial(np.asarray, a))
        for name, a in sorted(arrays.items())
    }
    try:
        tensor_file.write(path, planned)
    except OSError as error:
        raise UserError(f"Could not write {path}: {error.strerror}.") from error
    return path


def emptied(model: nnx.Module, file: RowFile) -> Any:
    """The model with shapes in the place of its experts, for `with_calls`; all else from the file.

    Raises UserError where the file's arrays are not this model's.
    """
    parts = module.split(model)
    tree = {"params": parts.params, "stats": parts.stats}
    left = of_experts(model)

    def shape(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name = path_name(path)
        if left(name):
            return StoredLeaf(leaf.shape, leaf.dtype, name)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    held = saved.read_file(file.tensors, jax.tree_util.tree_map_with_path(shape, tree), left)
    return module.merge(parts.definition, held["params"], held["stats"])


def streamed(
    model: nnx.Module, weights_file: Path | str, place: ExpertPlace = "file"
) -> Callable[[Any, str | tuple[str, ...]], Any]:
    """A model of several tasks whose experts stay in a file: `(batch, task) -> predictions`.

    model: `(batch, tasks=(...))` to an output with `predictions` by task; its arrays may be shapes
    only (`nn.module.abstract`), and none of them is kept. weights_file: all of its arrays by path
    (`write`, or a saved model's weights.safetensors). Another task compiles its own pieces at its
    first call, and reads the same experts. place: as of `Streamed`. Raises UserError as
    `Streamed` and `emptied`.
    """
    file = RowFile(weights_file)
    parts = module.split(with_calls(emptied(model, file)))

    def forward(params: Any, stats: Any, batch: Any, *, tasks: tuple[str, ...]) -> Any:
        return module.merge(parts.definition, params, stats)(batch, tasks=tasks).predictions

    run = Streamed(forward, file, place)

    def ask(batch: Any, task: str | tuple[str, ...]) -> Any:
        if isinstance(task, str):
            return run(parts.params, parts.stats, batch, tasks=(task,))[task]
        return run(parts.params, parts.stats, batch, tasks=tuple(task))

    return ask


class StreamedRun(NamedTuple):
    """A trained model whose experts are shapes, and the file that they are in."""

    loaded: Loaded
    file: RowFile


def opened(folder: Path) -> StreamedRun:
    """A saved model (`train.saved`) whose experts stay in its file.

    Raises UserError where the folder's files are damaged or those of another model.
    """
    saved.verify(folder)
    config = restore.read_config(folder)
    tasks = make_tasks(config, classes_of(folder, config))
    model = module.merge(*module.abstract(make_builder(config, tasks)))
    with_layers(model)
    file = RowFile(folder / zoo.WEIGHTS)
    model = emptied(model, file)
    return StreamedRun(Loaded(config, tasks, model, zoo.read_about(folder).step), file)


def moved(loaded: Loaded, path: Path) -> StreamedRun:
    """A model in memory, whose arrays are written to `path` and whose experts stay there.

    Raises UserError where the disk does not take them.
    """
    with_layers(loaded.model)
    file = RowFile(write(loaded.model, path))
    return StreamedRun(loaded._replace(model=emptied(loaded.model, file)), file)
