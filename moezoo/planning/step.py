"""The whole training step of a configuration, compiled for a TPU pod that is not there.

The program is the one that training runs: `train.step` on a state placed by `train.placement`.
Nothing is allocated and nothing runs; the compiler says what one chip would hold, compute and send.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from moezoo.nn import module, surgery
from moezoo.nn.moe import MoE
from moezoo.ops.flops import product_flops
from moezoo.planning.collectives import Collective, collectives, even_least_bytes, sent
from moezoo.planning.layer import by_kind, text_of
from moezoo.train import ahead, chips
from moezoo.train import config as configs
from moezoo.train import mesh as meshes
from moezoo.train.config import Config


class StepRow(NamedTuple):
    """One compiled step, numbers per chip unless said otherwise.

    state_bytes: parameters, statistics and optimiser. memory_bytes: those, the batch and all
    temporaries. fits: whether that is less than the chip has; None for an unknown chip.
    token_bytes: sent over the expert axis by one MoE layer, forward and backward, on average;
    least_token_bytes: the least for an even load, token_ratio their quotient (None where no tokens
    travel). weight_bytes: everything else that is sent in a step. flops: of matrix products and
    convolutions, gradients and what is computed again included, an even share.
    """

    topology: str
    chips: int
    mesh: str
    parameters: int
    moe_layers: int
    batch: int
    state_bytes: int
    memory_bytes: int
    temporary_bytes: int
    chip_bytes: float | None
    fits: bool | None
    flops: float
    token_bytes: float
    least_token_bytes: float
    token_ratio: float | None
    weight_bytes: float
    collectives: dict[str, dict[str, float]]
    compile_seconds: float


class Lowered(NamedTuple):
    """A step before compilation: the program, the operations of its matrix products on all chips,
    its state's shapes, its model, its batch."""

    program: Any
    flops: float
    state: Any
    shardings: Any
    model: Any
    batch: dict[str, Any]
    read: Callable[..., Any]


def measure(config: Config, topology: str, devices: list[Any]) -> StepRow:
    """Compile the configuration's step for these devices and read the result.

    Raises UserError where the parts of the configuration disagree with each other or the devices.
    """
    configs.validate(config, len(devices))
    mesh = meshes.make_mesh(config.mesh, devices)
    lowered = lower(config, mesh)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = lowered.program.compile()
    seconds = time.perf_counter() - began
    found = collectives(text_of(compiled), len(devices))
    memory, held = compiled.memory_analysis(), held_bytes(compiled)
    room = chip_bytes(topology)
    return StepRow(
        topology=topology,
        chips=len(devices),
        mesh=" x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1),
        parameters=module.count(lowered.state["params"]),
        batch=config.train.batch,
        state_bytes=own_bytes(lowered.state, lowered.shardings),
        memory_bytes=held,
        temporary_bytes=memory.temp_size_in_bytes,
        chip_bytes=room,
        fits=None if room is None else held < room,
        flops=lowered.flops / len(devices),
        **traffic(lowered, found, mesh),
        collectives=by_kind(found),
        compile_seconds=round(seconds, 1),
    )


def lower(config: Config, mesh: jax.sharding.Mesh) -> Lowered:
    """Trace the step of a configuration on a mesh, of any devices."""
    step = ahead.form(config, mesh)
    made = step.made
    with jax.set_mesh(mesh):
        traced = step.update.trace(step.state, step.batch)
        program, flops = traced.lower(), product_flops(traced.jaxpr)
    model = module.merge(made.definition, made.state["params"], made.state["stats"])
    read = config.data.domain.read
    return Lowered(program, flops, made.state, made.shardings, model, step.batch, read)


def held_bytes(compiled: Any) -> int:
    """Bytes that a compiled program needs of one device: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def own_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of one device's part of a tree."""

    def part(a: jax.ShapeDtypeStruct, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(a.shape)) * a.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(part, tree, shardings)))


def chip_bytes(topology: str) -> float | None:
    """Memory of one chip of a topology, None where it is not known here."""
    chip = chips.of_topology(topology)
    return None if chip is None else chip.memory


def traffic(
    lowered: Lowered, found: list[Collective], mesh: jax.sharding.Mesh
) -> Mapping[str, Any]:
    """What MoE layers and everything else send."""
    shards, peers = meshes.batch_shards(mesh), mesh.shape["expert"]
    layers = list(layers_of(lowered))
    over_experts = [one for one in found if one.axes(mesh.shape) == ("expert",)]
    moved, count = sent(over_experts), max(len(layers), 1)
    least = sum(
        # Forward and backward.
        2 * even_least_bytes(one.tokens // shards, one.k, one.experts, peers, one.token_bytes)
        for one in layers
    )
    least /= count
    return {
        "moe_layers": len(layers),
        "token_bytes": moved / count,
        "least_token_bytes": least,
        "token_ratio": moved / count / least if least else None,
        "weight_bytes": sent(found) - moved,
    }


class MoELayer(NamedTuple):
    """N, K and E of one MoE layer, and the bytes of a token where it computes."""

    tokens: int
    k: int
    experts: int
    token_bytes: int


def layers_of(lowered: Lowered) -> list[MoELayer]:
    """The MoE layers of a model, by an abstract pass over its batch."""
    parts = module.split(lowered.model)
    known, found = surgery.find(lowered.model, MoE), list[MoELayer]()

    def forward(params: Any, stats: Any, batch: Any) -> Any:
        model = module.merge(parts.definition, params, stats)
        records = lowered.read(model, batch, train=True).records
        for path, record in records.items():
            if path not in known:  # soft mixtures send no tokens
                continue
            layer = surgery.get(model, path)
            n, k = record.routing.experts_NK.shape
            leaf = jax.tree.leaves(layer.experts.stacked())[0]
            found.append(MoELayer(n, k, leaf.shape[0], model.config.width * leaf.dtype.itemsize))
        return records

    jax.eval_shape(forward, parts.params, parts.stats, lowered.batch)
    return found
