"""Linear layers with a LoRA that all tasks share and one of each task's own (MTLoRA).

Agiza, Neseem, Reda: "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning",
CVPR 2024, arXiv:2403.20320. A layer has several outputs, its streams: the shared one, which goes
on to the next layers, and one for every task. With P = W x + b, S = s B A x of the shared LoRA and
T_t = s_t B_t A_t x_t of a task's, x_t what the task's stream has here, the modes of the published
code are

    matrix      shared P + S                 task t  P + T_t
    matrixv2    shared P + S                 task t  P + S + T_t
    addition    shared P + LN(sum_t P + T_t) task t  P + T_t
    lora_only   shared P + S                 no streams of tasks

In the published code P and S are always those of the shared x, so that nothing but LoRAs ever sees
a task's own features; here (`base_reads` "own") a task's P and S are of
its x_t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.layers import LayerNorm, Linear
from moezoo.nn.lowrank import LowRank
from moezoo.nn.surgery import MixtureSize

LN_EPSILON = 1e-5  # PyTorch's


class Streams(NamedTuple):
    """What a layer gives: for everybody, and for each of the tasks asked for."""

    shared: Array
    tasks: dict[str, Array]


class Parts(NamedTuple):
    """Of a stream: what the frozen layer gives (P), the shared LoRA (S; 0 without one)."""

    base: Array
    shared: Array | float


# (a task's parts, its own T_t) -> the task's stream
StreamOf = Callable[[Parts, Array], Array]


def without_shared(parts: Parts, own: Array) -> Array:
    """P + T."""
    return parts.base + own


def with_shared(parts: Parts, own: Array) -> Array:
    """P + S + T."""
    return parts.base + parts.shared + own


class Mode(NamedTuple):
    """How streams are made. shared: "lora" or "sum" (of the tasks'); of_task: None: no streams."""

    shared: str
    of_task: StreamOf | None


MODES = {
    "matrix": Mode("lora", without_shared),
    "matrixv2": Mode("lora", with_shared),
    "addition": Mode("sum", without_shared),
    "lora_only": Mode("lora", None),
}


def added(update: LowRank, x: Array) -> Array:
    """What a LoRA without a router gives for x [..., D]."""
    y_NO, _ = update(x.reshape(-1, x.shape[-1]))
    return y_NO.reshape(*x.shape[:-1], y_NO.shape[-1]).astype(x.dtype)


def folded(base: Linear, *updates: LowRank | None) -> Linear:
    """A new linear layer: `base` with the LoRAs added to its kernel, in float32."""
    kernel = base.kernel.get_value().astype(jnp.float32)
    for update in updates:
        kernel = kernel if update is None else kernel + update.delta()
    inputs, outputs = kernel.shape
    bias = base.bias is not None
    made = Linear(inputs, outputs, bias=bias, dtype=base.dtype, rngs=nnx.Rngs(0))
    made.kernel.set_value(kernel.astype(base.kernel.get_value().dtype))
    if bias:
        made.bias.set_value(base.bias.get_value())
    return made


class SharedLinear(nnx.Module):
    """y = W x + b + s B A x, the same for every task."""

    def __init__(self, base: Linear, shared: LowRank):
        self.base, self.shared = base, shared

    def __call__(self, x: Array) -> Array:
        return self.base(x) + added(self.shared, x)

    def of_task(self, task: int) -> Linear:
        """One linear layer: the decision is nobody's."""
        return folded(self.base, self.shared)


class SummedShared(nnx.Module):
    """The shared stream of mode `addition`: P + LN(sum of the tasks' streams)."""

    def __init__(self, outputs: int):
        self.norm = LayerNorm(outputs, LN_EPSILON)

    def __call__(self, base: Array, tasks: Sequence[Array]) -> Array:
        return base + self.norm(jnp.stack(tasks).sum(0))


class TaskLinear(nnx.Module):
    """A frozen linear layer with a shared LoRA, if somebody reads it, and one of each task.

    mode: a name of `MODES` whose tasks have streams. base_reads: whether a task's P and S are of
    its "own" features or, as published, of the "shared" ones.
    """

    def __init__(
        self,
        base: Linear,
        shared: LowRank | None,
        own: Mapping[str, LowRank],
        *,
        mode: str = "matrix",
        base_reads: str = "own",
    ):
        if MODES[mode].of_task is None:
            raise ValueError(f"mode {mode} has no streams of tasks")
        self.base, self.shared = base, shared
        self.own = nnx.Dict(own)
        self.names, self.mode, self.base_reads = tuple(own), mode, base_reads
        summed = MODES[mode].shared == "sum"
        self.sum = SummedShared(base.kernel.get_value().shape[1]) if summed else None

    @property
    def mixture_size(self) -> MixtureSize:
        """Of the tasks' LoRAs one is at work for a task."""
        return MixtureSize("task", len(self.names), 1)

    def streams(self, x: Array, by_task: Mapping[str, Array], names: Sequence[str]) -> Streams:
        """The shared stream of x [..., D], and those of the tasks `names`.

        by_task: what a task's stream has here; x where it is missing.
        """
        here = self._parts(x)
        # The sum is over all tasks, whoever asks.
        wanted = self.names if self.sum is not None else tuple(names)
        tasks = {name: self._of(name, x, here, by_task.get(name, x)) for name in wanted}
        if self.sum is not None:
            shared = self.sum(here.base, list(tasks.values()))
            return Streams(shared, {name: tasks[name] for name in names})
        return Streams(here.base + here.shared, tasks)

    def _parts(self, x: Array) -> Parts:
        return Parts(self.base(x), 0.0 if self.shared is None else added(self.shared, x))

    def _of(self, name: str, x: Array, here: Parts, x_task: Array) -> Array:
        same = x_task is x or self.base_reads == "shared"
        parts = here if same else self._parts(x_task)
        of_task: Any = MODES[self.mode].of_task
        return of_task(parts, added(self.own[name], x_task))

    def of_task(self, task: int) -> Any:
        """Two linear layers, or itself where the shared stream is a sum over all tasks."""
        if self.sum is not None:
            return self
        name = self.names[task]
        also = self.shared if MODES[self.mode].of_task is with_shared else None
        shared = folded(self.base, self.shared)
        if self.base_reads == "own":
            return TwoLinear(shared, folded(self.base, also, self.own[name]))
        return TwoLinear(shared, folded(self.base, also), self.own[name])


class TwoLinear(nnx.Module):
    """What a `TaskLinear` is for one task: one matrix for the shared stream, one for the task's.

    beside: the task's LoRA where the matrix reads the shared features, as published.
    """

    def __init__(self, shared: Linear, own: Linear, beside: LowRank | None = None):
        self.shared, self.own, self.beside = shared, own, beside

    def streams(self, x: Array, by_task: Mapping[str, Array], names: Sequence[str]) -> Streams:
        """As `TaskLinear.streams`, for the one task there is."""
        (name,) = names
        x_task = by_task.get(name, x)
        own = self.own(x_task) if self.beside is None else self.own(x) + added(self.beside, x_task)
        return Streams(self.shared(x), {name: own})
