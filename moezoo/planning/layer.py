"""Pods on paper: one MoE layer compiled for a TPU pod on a machine without a TPU.

Nothing runs. The compiler says what one chip would hold, compute and send.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.experts import MLPExperts
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter
from moezoo.ops import exchange, grouped
from moezoo.ops.expert import Backend
from moezoo.planning.collectives import Collective, collectives, even_least_bytes, sent
from moezoo.train import chips, placement
from moezoo.train import mesh as meshes
from moezoo.train.schema import MeshConfig

# What a process without a TPU has to say before libtpu is loaded, and leave to load two at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# What libtpu has to be told of a kind: both cores of a TPU v4 are one device, as on Google Cloud.
OWN_WORDS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}
ALIASES = {"v5litepod": "v5e"}  # Google's other word
ONE = (1, 1, 1)  # a host with one chip

# Experts are applied by `ragged` in all of them, the backend of a TPU.
DISPATCHES: dict[str, Backend] = {
    "gather": exchange.gather(grouped.ragged),
    "all_to_all": exchange.all_to_all(local=grouped.ragged),
    "ragged_all_to_all": exchange.ragged_all_to_all(local=grouped.ragged),
    "per_device": exchange.per_device(grouped.ragged),
}


@dataclass(frozen=True)
class PlannedLayer:
    """Sizes of a layer; the defaults are V-MoE-H/14's (arXiv:2106.05974, table 8)."""

    width: int = 1280
    hidden: int = 5120
    experts: int = 64
    k: int = 2
    tokens: int = 257


class LayerRow(NamedTuple):
    """One compiled layer, forward and backward, numbers per chip.

    memory: bytes of arguments, results and temporaries together.
    flops: counted by the compiler; useful_flops: of the chosen experts and the router.
    token_bytes: sent for tokens and sums (operations over the expert axis); least_token_bytes: the
    least for an even load (`collectives.even_least_bytes`), token_ratio their quotient.
    weight_bytes: everything else: experts over fsdp, their gradients over data and fsdp.
    """

    topology: str
    chips: int
    mesh: str
    dispatch: str
    batch: int
    memory_bytes: int
    temporary_bytes: int
    flops: float
    useful_flops: float
    token_bytes: float
    least_token_bytes: float
    token_ratio: float
    weight_bytes: float
    collectives: dict[str, dict[str, float]]
    compile_seconds: float


def devices_of(topology: str, slices: int = 1) -> list[Any]:
    """The chips of so many slices of a topology such as v5p:8x8x8, none of which is there.

    Raises UserError without libtpu, for a slice that does not exist, and for a kind of TPU that
    libtpu does not know.
    """
    kind, _, sides = topology.partition(":")
    if kind in chips.TPUS:
        chips.chips_of_slice(topology)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from importlib.util import find_spec

    if find_spec("libtpu") is None:
        raise UserError(
            "Compiling for a TPU pod needs the package libtpu: pip install 'moezoo[pod]'."
        )
    from jax.experimental import topologies

    try:
        more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        more |= OWN_WORDS.get(kind, {}) | ({"chips_per_host_bounds": ONE} if sides == "1x1" else {})
        name = f"{ALIASES.get(kind, kind)}:{sides}"
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
        return list(found.devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"libtpu gives no topology '{topology}': {first}") from error


def measure(
    topology: str, sizes: MeshConfig, dispatch: str, batch: int, layer: PlannedLayer
) -> LayerRow:
    """Compile the layer's forward and backward pass for `batch` images and read the result.

    Raises UserError where mesh, experts or tokens do not fit each other.
    """
    devices = devices_of(topology)
    mesh = meshes.make_mesh(sizes, devices)
    shards = meshes.batch_shards(mesh)
    if batch < 1 or batch % shards:
        raise UserError(f"--batch is {batch}; it must be a multiple of {shards} for this mesh.")
    began = time.perf_counter()
    compiled = compile_layer(layer, mesh, DISPATCHES[dispatch], batch)
    seconds = time.perf_counter() - began
    found = collectives(text_of(compiled), len(devices))
    memory = compiled.memory_analysis()
    peers, here = mesh.shape["expert"], batch * layer.tokens // shards
    least = 2 * even_least_bytes(here, layer.k, layer.experts, peers, 2 * layer.width)
    moved = sent(one for one in found if one.axes(mesh.shape) == ("expert",))
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return LayerRow(
        topology=topology,
        chips=len(devices),
        mesh=" x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1),
        dispatch=dispatch,
        batch=batch,
        memory_bytes=held,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=float(compiled.cost_analysis()["flops"]),
        useful_flops=useful_flops(layer, here),
        token_bytes=moved,
        least_token_bytes=least,
        token_ratio=moved / least if least else math.nan,
        weight_bytes=sent(found) - moved,
        collectives=by_kind(found),
        compile_seconds=round(seconds, 1),
    )


def compile_layer(
    layer: PlannedLayer, mesh: jax.sharding.Mesh, backend: Backend, batch: int
) -> Any:
    """The program of one MoE layer's output and gradients in bfloat16, router in float32.

    Parameters are float32 and lie where training puts them, tokens [batch * T, D] are split over
    all of data, fsdp and expert. The gradient is that of half the sum of squares.
    """

    def build() -> nnx.Module:
        rngs = nnx.Rngs(0)
        router = LinearRouter(layer.width, layer.experts, layer.k, rngs=rngs)
        sizes = (layer.experts, layer.width, layer.hidden)
        return MoE(router, MLPExperts(*sizes, dtype=jnp.bfloat16, rngs=rngs), backend)

    parts = module.abstract(build)

    def loss(params: Any, x_ND: Array) -> tuple[Array, Any]:
        y_ND, record = module.merge(parts.definition, params, parts.stats)(x_ND)
        return 0.5 * jnp.sum(jnp.square(y_ND.astype(jnp.float32))), (y_ND, record.dropped)

    lie = placement.shardings(mesh, {"params": parts.params})["params"]
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    params = jax.tree.map(lambda a, s: _shape(a.shape, a.dtype, s), parts.params, lie)
    x_ND = _shape((batch * layer.tokens, layer.width), jnp.bfloat16, rows)
    both = jax.value_and_grad(loss, (0, 1), has_aux=True)
    with jax.set_mesh(mesh):
        return jax.jit(both, out_shardings=(None, (lie, rows))).lower(params, x_ND).compile()


def _shape(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def text_of(compiled: Any) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"jax {jax.__version__} cannot print what this libtpu compiled: install the version "
            f"that goes with it, pip install 'moezoo[pod]' ({str(error).splitlines()[0]})."
        ) from error


def useful_flops(layer: PlannedLayer, tokens: int) -> float:
    """Operations of the chosen experts and the router for so many tokens, forward and backward."""
    experts = 2 * 2 * layer.width * layer.hidden * layer.k
    return 3.0 * tokens * (experts + 2 * layer.width * layer.experts)


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    kinds = sorted({one.kind for one in found})
    own = {kind: [one for one in found if one.kind == kind] for kind in kinds}
    return {
        kind: {"count": sum(one.times for one in ones), "sent_bytes": sent(ones)}
        for kind, ones in own.items()
    }
