"""V-MoE's table of placements and its meshes of devices, entry by entry."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from moezoo.models.vmoe.model import VMoEConfig
from moezoo.nn import module
from moezoo.train import expert_grid, placement
from moezoo.train.config import MeshConfig
from moezoo.train.mesh import make_mesh
from moezoo.weights.vmoe_names import to_reference
from tests import fixtures
from tests.fixtures import folder


class Core(NamedTuple):
    """What the rule reads of a TPU core."""

    id: int
    core_on_chip: int
    coords: tuple[int, int, int]
    process_index: int = 0


def described() -> dict[str, Any]:
    return json.loads((folder("vmoe") / "partition_rules.json").read_text())


def unfolded(names: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(spec) for name, spec in names.items()}


def test_rules() -> None:
    """The reference's own pattern as a rule of ours gives the reference's table."""
    table = described()
    mesh = make_mesh(MeshConfig(expert=2), fixtures.devices(8))
    rules = [
        placement.PlacementRule(pattern, lambda shape, mesh, axes=tuple(axes): axes)
        for pattern, axes in table["rule"]
    ]
    rules.append(placement.PlacementRule("", placement.whole))
    shapes = {name: jax.ShapeDtypeStruct((2, 2, 2), np.float32) for name in table["params"]}
    found = placement.shardings(mesh, module.unflatten(shapes), rules)
    specs = {name: sharding.spec for name, sharding in module.flatten(found).items()}
    assert {name: tuple(spec) for name, spec in specs.items()} == unfolded(table["params"])


def test_our_table_places_the_same_leaves_over_the_experts() -> None:
    """A model of ours under the reference's names: the same arrays lie over the expert axis."""
    table = unfolded(described()["params"])
    blocks = {int(n.split("_")[1].split("/")[0]) for n in table if "encoderblock_" in n}
    sparse = {int(n.split("_")[1].split("/")[0]) for n in table if "/Moe/" in n}
    config = VMoEConfig(
        width=8, depth=len(blocks), heads=2, patch=4, experts=4, moe_blocks=tuple(sparse)
    )
    parts = module.abstract(lambda: config.build({"scene": 3}, (8, 8), nnx.Rngs(0)))
    mesh = make_mesh(MeshConfig(expert=2), fixtures.devices(8))
    specs = module.flatten(placement.shardings(mesh, parts.params))
    marked = {
        path: np.full(leaf.shape, float("expert" in specs[path].spec[:1]))
        for path, leaf in module.flatten(parts.params).items()
    }
    names, unknown = to_reference(marked, "scene", config.heads)
    assert not unknown and names.keys() == table.keys()
    assert {name: bool(a.all()) for name, a in names.items()} == {
        name: "expert" in spec for name, spec in table.items()
    }


def test_meshes_of_one_process() -> None:
    devices = fixtures.devices(8)
    for parts, wanted in described()["auto_logical_mesh_8_cpu_devices"].items():
        count = np.size(wanted)
        grid = expert_grid.by_expert(expert_grid.hardware(devices[:count]), int(parts))
        assert [[d.id for d in row] for row in grid] == wanted
        mesh = make_mesh(MeshConfig(expert=int(parts)), devices[:count], expert_grid.arrange)
        along = np.vectorize(lambda d: d.id)(mesh.devices)[:, 0, :, 0]
        np.testing.assert_array_equal(along.T, wanted)


def test_meshes_of_tpu_slices() -> None:
    cases = described()["auto_logical_mesh_tpu_device_ids"]
    assert cases
    for name, wanted in cases.items():
        box, parts = name.removeprefix("cxyz=(").split(")|partitions=")
        c, x, y, z = (int(n) for n in box.split(","))
        cores = [
            Core(i, i % c, (i // c % x, i // c // x % y, i // c // x // y))
            for i in range(c * x * y * z)
        ]
        grid = expert_grid.by_expert(expert_grid.hardware(cores), int(parts))
        assert [[core.id for core in row] for row in grid] == wanted, name
