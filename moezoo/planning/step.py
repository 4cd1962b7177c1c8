"""A whole step of a configuration, compiled for a TPU pod that is not there.

The program of a training step is the one that training runs: `train.step` on a state placed by
`train.placement`; that of an evaluation is its forward pass, without the metrics. Nothing is
allocated and nothing runs; the compiler says what one chip would hold, compute and send.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from moezoo.nn import module, surgery
from moezoo.nn.moe import MoE
from moezoo.ops.flops import product_flops
from moezoo.planning.collectives import Collective, collectives, even_least_bytes, sent
from moezoo.planning.layer import by_kind, text_of
from moezoo.planning.roofline import StepBound, TrafficRow, bound, busiest, slices_of, table
from moezoo.train import ahead, chips
from moezoo.train import config as configs
from moezoo.train import mesh as meshes
from moezoo.train.config import Config


class LayerBalance(NamedTuple):
    """What one MoE layer has for an expert and for a device of the expert axis.

    choices: of one expert, in the mean, in a step. expert, device: the load of the busiest over the
    mean if every choice were as likely; a trained router is rarely better.
    """

    experts: int
    choices: float
    expert: float
    device: float


class StepRow(NamedTuple):
    """One step, numbers per chip unless said otherwise.

    source: "compiled", or "shapes" where they are estimated (`planning.shapes`).
    state_bytes: parameters, statistics and optimiser. temporary_bytes: activations, gradients and
    buffers. memory_bytes: all that and the batch. fits: whether that is less than the chip has;
    None for an unknown chip. token_bytes: sent over the expert axis by one MoE layer, on average;
    least_token_bytes: the least for an even load, token_ratio their quotient (None where no tokens
    travel). weight_bytes: everything else that is sent in a step. flops: of matrix products and
    convolutions, gradients and what is computed again included, an even share. traffic and bound:
    see `planning.roofline`.
    """

    topology: str
    step: str
    source: str
    chips: int
    mesh: str
    parameters: int
    moe_layers: int
    batch: int
    parameter_bytes: int
    optimiser_bytes: int
    state_bytes: int
    batch_bytes: int
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
    traffic: list[TrafficRow]
    bound: StepBound
    balance: list[LayerBalance]
    compile_seconds: float

    def asdict(self) -> dict[str, Any]:
        """As plain dictionaries and lists."""
        plain = self._asdict()
        plain["traffic"] = [row._asdict() for row in self.traffic]
        plain["balance"] = [row._asdict() for row in self.balance]
        return plain | {"bound": self.bound._asdict()}


class Traced(NamedTuple):
    """A step before compilation: the program, the operations of its matrix products on all chips,
    its state's shapes, its model, its batch. passes: over the layers, with their gradients'."""

    program: Any
    flops: float
    state: Any
    shardings: Any
    model: Any
    batch: dict[str, Any]
    read: Callable[..., Any]
    form: ahead.StepForm
    passes: int


def mesh_text(shape: Mapping[str, int]) -> str:
    """The axes that split something."""
    return " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1)


def measure(config: Config, topology: str, devices: list[Any], kind: str = "train") -> StepRow:
    """Compile the configuration's step for these devices and read the result.

    kind: a name of `STEPS`. Raises UserError where the parts of the configuration disagree with
    each other or the devices.
    """
    configs.validate(config, len(devices))
    mesh = meshes.make_mesh(config.mesh, devices)
    traced = STEPS[kind](config, mesh)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = traced.program.lower().compile()
    seconds = time.perf_counter() - began
    found = collectives(text_of(compiled), len(devices))
    return row_of(
        config,
        topology,
        traced,
        mesh,
        found,
        Room(held_bytes(compiled), compiled.memory_analysis().temp_size_in_bytes),
        step=kind,
        source="compiled",
        moved=compiled.cost_analysis().get("bytes accessed"),
        compile_seconds=round(seconds, 1),
    )


class Room(NamedTuple):
    """Bytes that a step needs of one chip: all, and what of them is temporary."""

    memory_bytes: int
    temporary_bytes: int


def row_of(
    config: Config,
    topology: str,
    traced: Traced,
    mesh: Any,
    found: Sequence[Collective],
    room: Room,
    *,
    moved: float | None,
    **more: Any,
) -> StepRow:
    """What a step needs, sends and takes at least. moved: bytes of memory that are read or written,
    None where that is not known."""
    chip, count = chips.of_topology(topology), math.prod(mesh.shape.values())
    of = {name: own_bytes(traced.state[name], traced.shardings[name]) for name in traced.state}
    flops = traced.flops / count
    rows = table(found, mesh.shape, slices_of(config.mesh, mesh.shape), chip)
    layers = layers_of(traced)
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(traced.batch))
    return StepRow(
        topology=topology,
        chips=count,
        mesh=mesh_text(mesh.shape),
        parameters=module.count(traced.state["params"]),
        batch=jax.tree.leaves(traced.batch)[0].shape[0],
        parameter_bytes=of["params"],
        optimiser_bytes=of.get("optimiser", 0),
        state_bytes=sum(of.values()),
        batch_bytes=size // meshes.batch_shards(mesh),
        **room._asdict(),
        chip_bytes=None if chip is None else chip.memory,
        fits=None if chip is None or chip.memory is None else room.memory_bytes < chip.memory,
        flops=flops,
        **token_traffic(layers, list(found), mesh, traced.passes),
        collectives=by_kind(list(found)),
        traffic=rows,
        bound=bound(flops, moved, rows, chip),
        balance=balance(layers, mesh.shape["expert"]),
        **more,
    )


def current(mesh: Any) -> Any:
    """A context in which a mesh, which may be an abstract one, is the current one."""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return jax.sharding.use_abstract_mesh(mesh)
    return jax.set_mesh(mesh)


def train_step(config: Config, mesh: jax.sharding.Mesh) -> Traced:
    """The training step of a configuration on a mesh, of any devices."""
    step = ahead.form(config, mesh)
    made = step.made
    with current(mesh):
        traced = step.update.trace(step.state, step.batch)
    model = module.merge(made.definition, made.state["params"], made.state["stats"])
    read, flops = config.data.domain.read, product_flops(traced.jaxpr)
    return Traced(traced, flops, made.state, made.shardings, model, step.batch, read, step, 2)


def evaluation_step(config: Config, mesh: jax.sharding.Mesh) -> Traced:
    """The forward pass of an evaluation, whose predictions stay on the devices."""
    size = config.evaluate.batch or config.train.batch
    config = replace(config, train=replace(config.train, batch=size))
    step, read = ahead.form(config, mesh), config.data.domain.read
    made = step.made

    def forward(params: Any, stats: Any, batch: Any) -> Any:
        return read(module.merge(made.definition, params, stats), batch, train=False).predictions

    with current(mesh):
        given = step.state["params"], step.state["stats"], step.batch
        traced = jax.jit(forward).trace(*given)
    own = {name: made.state[name] for name in ("params", "stats")}
    model = module.merge(made.definition, own["params"], own["stats"])
    flops = product_flops(traced.jaxpr)
    return Traced(traced, flops, own, made.shardings, model, step.batch, read, step, 1)


STEPS: dict[str, Callable[[Config, jax.sharding.Mesh], Traced]] = {
    "train": train_step,
    "evaluation": evaluation_step,
}


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


def token_traffic(
    layers: Sequence[MoELayer], found: list[Collective], mesh: Any, passes: int
) -> Mapping[str, Any]:
    """What MoE layers and everything else send. passes: 2 with gradients, 1 without."""
    shards, peers = meshes.batch_shards(mesh), mesh.shape["expert"]
    # Sums over the expert axis are of gradients, where no other axis has copies of the parameters.
    over_experts = [
        one for one in found if one.axes(mesh.shape) == ("expert",) and one.kind != "all-reduce"
    ]
    moved, count = sent(over_experts), max(len(layers), 1)
    least = sum(
        passes * even_least_bytes(one.tokens // shards, one.k, one.experts, peers, one.token_bytes)
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


def balance(layers: Sequence[MoELayer], peers: int) -> list[LayerBalance]:
    """How evenly experts and devices would be loaded by chance, different layers once each."""
    rows = []
    for one in dict.fromkeys(layers):
        mean = one.tokens * one.k / one.experts
        device = busiest(mean * one.experts / peers, peers)
        rows.append(LayerBalance(one.experts, mean, busiest(mean, one.experts), device))
    return rows


class MoELayer(NamedTuple):
    """N, K and E of one MoE layer, and the bytes of a token where it computes."""

    tokens: int
    k: int
    experts: int
    token_bytes: int


def layers_of(traced: Traced) -> list[MoELayer]:
    """The MoE layers of a model, by an abstract pass over its batch."""
    parts = module.split(traced.model)
    known, found = surgery.find(traced.model, MoE), list[MoELayer]()

    def forward(params: Any, stats: Any, batch: Any) -> Any:
        model = module.merge(parts.definition, params, stats)
        records = traced.read(model, batch, train=True).records
        for path, record in records.items():
            if path not in known:  # soft mixtures send no tokens
                continue
            layer = surgery.get(model, path)
            n, k = record.routing.experts_NK.shape
            leaf = jax.tree.leaves(layer.experts.stacked())[0]
            found.append(MoELayer(n, k, leaf.shape[0], model.config.width * leaf.dtype.itemsize))
        return records

    jax.eval_shape(forward, parts.params, parts.stats, traced.batch)
    return found
