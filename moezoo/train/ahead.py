"""The first training step, compiled in the background while data sets are being made.

What a step looks like is known before there is data: a domain gives an example of its form and says
what labels mean. If that turns out to be what the data have, the run takes the program that is
there already; else, and whatever goes wrong here, it compiles its own as it always did, and says
what is wrong at its usual place.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.train import mesh as meshes
from moezoo.train import placement, setup, state, together
from moezoo.train.config import Config
from moezoo.train.domain import Classes
from moezoo.train.step import Update

AFTER = 1.0  # seconds: data that are there by then are opened, not made


class Step(Protocol):
    """A training step: how it is run, and what it computes."""

    def __call__(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        """The state after it, and its metrics."""
        ...

    def flops(self, state: Any, batch: Any) -> float:
        """Operations of its matrix products on all devices."""
        ...


class ReadyStep(NamedTuple):
    """A step that is compiled already."""

    call: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
    counted: float

    def __call__(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        return self.call(state, batch)

    def flops(self, state: Any, batch: Any) -> float:
        """As counted when it was compiled."""
        return self.counted


class StepForm(NamedTuple):
    """A configuration's step without its data: the program, and the shapes that it is called with.

    made: the state's shapes and the model's definition.   state, batch: ShapeDtypeStructs with
    shardings.   classes: what its tasks were made of.
    """

    update: Update
    made: state.Created
    state: Any
    batch: dict[str, Any]
    classes: Classes


def form(config: Config, mesh: jax.sharding.Mesh) -> StepForm:
    """The step of a configuration on a mesh, of any devices, from the form of its data."""
    return formed(config, mesh, *config.data.domain.example(config))


def formed(config: Config, mesh: jax.sharding.Mesh, example: Any, classes: Classes) -> StepForm:
    """`form` from an example of the data and what its labels mean."""
    tasks = setup.make_tasks(config, classes)
    optimiser = setup.make_optimiser(config)
    build = setup.make_builder(config, tasks)
    made = state.abstract(build, optimiser, setup.extra_state(config, len(tasks)))
    lie = placement.shardings(mesh, made.state, setup.make_rules(config))
    groups = len(classes.groups or tasks)
    update = setup.make_update(config, made.definition, tasks, optimiser, lie, groups)
    rows = meshes.batch_sharding(mesh)

    def whole(a: Any) -> jax.ShapeDtypeStruct:
        # Labels become int32 or float32 on the way to the device, as `device_put` makes them.
        a = jax.eval_shape(jnp.asarray, a)
        return jax.ShapeDtypeStruct((config.train.batch, *a.shape[1:]), a.dtype, sharding=rows)

    made = made._replace(shardings=lie)
    given = state.target(made.state, lie)
    return StepForm(update, made, given, jax.tree.map(whole, example), classes)


class Ahead:
    """Compiles while its `with` block opens the data; later gives the step, `step`.

    Nothing happens where the block is over within `AFTER` seconds, and in runs of several
    processes, which wait for each other.
    """

    def __init__(self, config: Config, say: Callable[[str], None]):
        self._config, self._say = config, say
        self._opened = threading.Event()
        self._example: tuple[Any, Classes] | None = None
        self._found: tuple[StepForm, Step] | None = None
        # No daemon: an interpreter must not go away under a compiler.
        self._thread = threading.Thread(target=self._work, name="compile ahead")

    def __enter__(self) -> Ahead:
        if together.alone():
            # Here, not in the thread: whoever imports tensorflow-datasets makes the imports of all
            # threads lazy for that time, and on Python 3.11 two of those wait for each other.
            with contextlib.suppress(Exception):  # told where the data are opened
                self._example = self._config.data.domain.example(self._config)
                self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.set()

    def _work(self) -> None:
        if self._opened.wait(AFTER):
            return
        try:
            self._say("While data are made, the first step is compiled.")
            mesh = meshes.make_mesh(self._config.mesh)
            with jax.set_mesh(mesh):  # of this thread
                assert self._example is not None
                found = formed(self._config, mesh, *self._example)
                if not self._opened.is_set():
                    call = found.update.compile(found.state, found.batch)[0]
                    flops = found.update.flops(found.state, found.batch)  # traced already
                    self._found = found, ReadyStep(call, flops)
        except Exception:
            # The run does the same again, and its errors are those that are told.
            self._found = None

    def step(self, own: Update, classes: Classes, given: Any, batch: Any) -> Step:
        """The step for arguments of this form: the one compiled ahead where it fits, else `own`."""
        if self._thread.ident is not None:
            self._thread.join()
        if self._found is None:
            return own
        known, step = self._found
        fits = same_classes(known.classes, classes)
        fits = fits and alike(known.state, given) and alike(known.batch, batch)
        return step if fits else own


def same_classes(one: Classes, other: Classes) -> bool:
    """Whether labels mean the same."""
    if (one.counts, one.names, one.groups) != (other.counts, other.names, other.groups):
        return False
    return one.colours.keys() == other.colours.keys() and all(
        np.array_equal(one.colours[task], other.colours[task]) for task in one.colours
    )


def alike(shapes: Any, arrays: Any) -> bool:
    """Whether arrays have the structure, shapes, types and places that shapes say."""
    if jax.tree.structure(shapes) != jax.tree.structure(arrays):
        return False
    return all(
        (a.shape, a.dtype) == (b.shape, b.dtype) and b.sharding.is_equivalent_to(a.sharding, b.ndim)
        for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(arrays), strict=True)
    )
