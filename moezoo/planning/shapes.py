"""A step's needs from the shapes of its arrays, without a compiler: for GPUs, and to rank meshes.

Parameters, moments and their places are exact, operations are counted, and so is what must be sent
(gradients summed, split parameters gathered, tokens exchanged); activations are what
differentiation keeps, before any compiler fuses it. Not in it: what a tensor axis sends, buffers.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moezoo.errors import UserError, unknown
from moezoo.ops.exchange import ROOM
from moezoo.planning.collectives import Collective, even_least_bytes
from moezoo.planning.step import (
    STEPS,
    MoELayer,
    Room,
    StepRow,
    Traced,
    current,
    layers_of,
    row_of,
)
from moezoo.train import chips, placement, setup
from moezoo.train import config as configs
from moezoo.train import mesh as meshes
from moezoo.train import state as states
from moezoo.train.config import Config, MeshConfig

NODE = 8  # GPUs that NVLink joins


class StepShapes(NamedTuple):
    """A step that was traced once, on one device. activations: bytes that its gradient keeps of the
    whole batch, or of one slice of it where batches are computed in slices. copies: of parameters
    in another type, which it keeps too, by shape and bytes of a number."""

    traced: Traced
    kind: str
    layers: list[MoELayer]
    activations: int
    copies: tuple[tuple[tuple[int, ...], int], ...]


def look(config: Config, kind: str) -> StepShapes:
    """Trace the step, `kind` of `STEPS`; nothing is compiled.

    As for one TPU, whose experts do the useful work and no more; others fill blocks of rows.
    """
    mesh: Any = AbstractMesh(
        (1,) * len(meshes.AXES),
        meshes.AXES,
        axis_types=(AxisType.Auto,) * len(meshes.AXES),
        abstract_device=AbstractDevice("TPU", num_cores=1, platform="tpu"),
    )
    traced = STEPS[kind](replace(config, mesh=MeshConfig()), mesh)
    with current(mesh):
        kept = _kept(config, traced) if traced.passes > 1 else (0, ())
    return StepShapes(traced, kind, layers_of(traced), *kept)


def _kept(config: Config, traced: Traced) -> tuple[int, tuple[tuple[tuple[int, ...], int], ...]]:
    """What is there between the forward and the backward pass besides the parameters themselves:
    bytes of activations, and copies of parameters."""
    step, parts = traced.form, config.train.gradient_accumulation
    tasks = setup.make_tasks(config, step.classes)
    groups = len(step.classes.groups or tasks)
    loss = setup.make_loss(config, step.made.definition, tasks, groups)
    trained = states.trained(step.state)

    def pull(trained: Any, stats: Any, batch: Any, key: Any) -> Any:
        return jax.vjp(lambda t: loss(t, stats, batch, key), trained, has_aux=True)[1]

    def slice_of(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((a.shape[0] // parts, *a.shape[1:]), a.dtype)

    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.tree.map(slice_of, step.batch)
    found = jax.tree.leaves(jax.eval_shape(pull, trained, step.state["stats"], batch, key))
    known = Counter((a.shape, a.dtype) for a in jax.tree.leaves(trained))
    like = {a.shape for a in jax.tree.leaves(trained) if len(a.shape) > 1}
    total, copies = 0, list[tuple[tuple[int, ...], int]]()
    for a in found:
        if known[a.shape, a.dtype]:
            known[a.shape, a.dtype] -= 1
        elif a.shape in like:
            copies.append((a.shape, a.dtype.itemsize))
        elif not jax.dtypes.issubdtype(a.dtype, jax.dtypes.extended):
            total += math.prod(a.shape) * a.dtype.itemsize
    return total, tuple(copies)


def estimate(config: Config, topology: str, count: int, seen: StepShapes) -> StepRow:
    """What a chip of so many would hold, compute and send with the configuration's mesh.

    Raises UserError where the parts of the configuration disagree with each other or the devices.
    """
    configs.validate(config, count)
    sizes = meshes.resolve(config.mesh, count)
    mesh: Any = AbstractMesh(sizes, meshes.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    lie: Any = placement.shardings(mesh, seen.traced.form.made.state, setup.make_rules(config))
    traced = seen.traced._replace(shardings=lie)
    found = list(expected(config, traced, seen.layers, mesh))
    bare = row_of(
        config, topology, traced, mesh, found, Room(0, 0),
        step=seen.kind, source="shapes", moved=None, compile_seconds=0.0,
    )  # fmt: skip
    gradients = bare.parameter_bytes if traced.passes > 1 else 0
    pairs = zip(
        jax.tree.leaves(traced.state["params"]), jax.tree.leaves(lie["params"]), strict=True
    )
    part = {leaf.shape: math.prod(place.shard_shape(leaf.shape)) for leaf, place in pairs}
    copied = sum(part[shape] * size for shape, size in seen.copies)
    temporary = gradients + copied + seen.activations // meshes.batch_shards(mesh)
    held = bare.state_bytes + bare.batch_bytes + temporary
    fits = None if bare.chip_bytes is None else held < bare.chip_bytes
    return bare._replace(memory_bytes=held, temporary_bytes=temporary, fits=fits)


def expected(
    config: Config, traced: Traced, layers: list[MoELayer], mesh: Any
) -> Iterator[Collective]:
    """What the step has to send: for every parameter, and for the tokens of every MoE layer."""
    shape, again = mesh.shape, config.train.gradient_accumulation if traced.passes > 1 else 1
    pairs = zip(
        jax.tree.leaves(traced.state["params"]),
        jax.tree.leaves(traced.shardings["params"]),
        strict=True,
    )
    for leaf, place in pairs:
        local = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        split = {axis for axis in place.spec if axis is not None}
        if "fsdp" in split and shape["fsdp"] > 1:
            over = members(shape, ("fsdp",))
            whole = local * shape["fsdp"]
            yield Collective("all-gather", over, whole, traced.passes * again)
            if traced.passes > 1:
                yield Collective("reduce-scatter", over, whole, again)
        copies = tuple(a for a in ("data", "fsdp", "expert") if shape[a] > 1 and a not in split)
        if traced.passes > 1 and copies:
            yield Collective("all-reduce", members(shape, copies), local)
    peers, shards = shape["expert"], meshes.batch_shards(mesh)
    for one in layers if peers > 1 else ():
        least = even_least_bytes(one.tokens // shards, one.k, one.experts, peers, one.token_bytes)
        one_way = ROOM * least / 2 * peers / (peers - 1)
        times = 2 * traced.passes  # there and back
        yield Collective("all-to-all", members(shape, ("expert",)), round(one_way), times)


def members(shape: Any, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The first group of devices along these axes, numbered in the order of the mesh."""
    numbers = np.arange(math.prod(shape.values())).reshape(tuple(shape.values()))
    first = tuple(slice(None) if axis in axes else 0 for axis in shape)
    return tuple(numbers[first].reshape(-1).tolist())


def search(config: Config, topology: str, count: int, seen: StepShapes) -> list[StepRow]:
    """All meshes that the configuration and so many chips allow, the best first.

    data, fsdp and expert vary, tensor and slices stay. Those that fit come first, then those with
    the shortest bound, then those that need least memory. Raises UserError where none is possible.
    """
    rows, refused = [], list[str]()
    tensor = config.mesh.tensor if config.mesh.tensor > 0 else 1
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for fsdp, expert in itertools.product(divisors, divisors):
        if count % (fsdp * expert * tensor):
            continue
        sizes = replace(config.mesh, data=-1, fsdp=fsdp, expert=expert, tensor=tensor)
        try:
            rows.append(estimate(replace(config, mesh=sizes), topology, count, seen))
        except UserError as error:
            refused.append(str(error))
    if not rows:
        why = refused[0] if refused else "no sizes multiply to it."
        raise UserError(f"No mesh of {count} chips is possible for this configuration: {why}")

    def order(row: StepRow) -> tuple[bool, float, int]:
        seconds = row.bound.seconds
        return row.fits is False, math.inf if seconds is None else seconds, row.memory_bytes

    return sorted(rows, key=order)


def count_of(topology: str, config: Config) -> int:
    """The number of chips of a topology such as v5p:2x2x4, of each slice, or of GPUs as in h100:16.

    More than one node of GPUs is as many slices: the slower network lies between them. UserError
    for what is no topology, or no known chip.
    """
    name, _, sides = topology.partition(":")
    slices = config.mesh.slices
    if name not in chips.CARDS and name not in chips.TPUS:
        raise unknown("chip", name, [*chips.TPUS, *chips.CARDS])
    if name in chips.TPUS:
        return chips.chips_of_slice(topology) * slices
    if not (sides.isascii() and sides.isdigit() and int(sides) > 0):
        raise UserError(f"--topology is '{topology}'; say how many GPUs, for example {name}:8.")
    count = int(sides)
    if count > NODE and count != NODE * slices:
        raise UserError(
            f"{topology} is more than one node of {NODE} GPUs: add --mesh.slices "
            f"{max(count // NODE, 2)}, so that the plan knows what crosses the network."
        )
    return count
