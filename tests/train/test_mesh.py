"""The mesh, the batch on it, and processes that should meet."""

from __future__ import annotations

import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from moezoo.errors import UserError
from moezoo.train import mesh as meshes
from moezoo.train.schema import MeshConfig
from tests.fixtures import ROOT


@pytest.mark.parametrize(
    "sizes, count, expected",
    [
        ({}, 8, (8, 1, 1, 1)),
        ({}, 1, (1, 1, 1, 1)),
        ({"expert": 4}, 8, (2, 1, 4, 1)),
        ({"data": 2, "expert": 4}, 8, (2, 1, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, 8, (1, 4, 1, 2)),
        ({"data": 1}, 1, (1, 1, 1, 1)),
        ({"slices": 2, "expert": 2}, 8, (4, 1, 2, 1)),
        ({"slices": 4, "fsdp_slices": 2, "fsdp": 4}, 8, (2, 4, 1, 1)),
    ],
)
def test_sizes_resolve(sizes, count, expected):
    assert meshes.resolve(MeshConfig(**sizes), count) == expected


@pytest.mark.parametrize(
    "sizes, count, part",
    [
        ({"expert": 3}, 8, "a multiple of 3 devices, but there are 8"),
        ({"data": 2, "expert": 2}, 8, "exactly 4 devices, but there are 8"),
        ({"data": 16}, 8, "exactly 16 devices, but there are 8"),
        ({"expert": 16}, 8, "a multiple of 16 devices, but there are 8"),
        ({"fsdp": -1}, 8, "only one axis may be -1"),
        ({"tensor": 0}, 8, "mesh.tensor is 0"),
        ({"tensor": -2}, 8, "mesh.tensor is -2"),
        ({"slices": 3}, 8, "mesh.slices is 3"),
        ({"slices": 0}, 8, "mesh.slices is 0"),
        ({"fsdp_slices": 2, "fsdp": 2}, 8, "must be a multiple of 2 for mesh.fsdp_slices=2"),
        ({"slices": 2, "expert_slices": 2, "fsdp": 2}, 8, "does not divide the expert axis of 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes, count, part):
    with pytest.raises(UserError, match=part):
        meshes.resolve(MeshConfig(**sizes), count)


def test_mesh_has_auto_axes_and_every_device_once():
    mesh = meshes.make_mesh(MeshConfig(data=2, expert=4))
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
    assert mesh.devices.shape == (2, 1, 4, 1)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


def test_one_device_is_an_ordinary_mesh():
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    placed = meshes.place(mesh, {"image": np.ones((3, 2), np.float32)}, 3)
    assert placed["image"].sharding.is_fully_replicated and placed["image"].shape == (3, 2)


def test_slices_split_the_data_axis_outermost():
    mesh = meshes.make_mesh(MeshConfig(fsdp=2, slices=2))
    ids = np.vectorize(lambda d: d.id)(mesh.devices)
    assert set(ids[:2].flat) == {0, 1, 2, 3} and set(ids[2:].flat) == {4, 5, 6, 7}


def test_an_axis_over_slices_has_their_devices_in_its_outer_part():
    mesh = meshes.make_mesh(MeshConfig(fsdp=4, expert=2, slices=2, fsdp_slices=2))
    ids = np.vectorize(lambda d: d.id)(mesh.devices)
    assert ids.shape == (1, 4, 2, 1)
    assert set(ids[0, :2].flat) == {0, 1, 2, 3} and set(ids[0, 2:].flat) == {4, 5, 6, 7}
    both = MeshConfig(data=2, fsdp=2, expert=2, slices=4, expert_slices=2)
    ids = np.vectorize(lambda d: d.id)(meshes.make_mesh(both).devices)
    # Slices 0 and 1 hold the two halves of the expert axis of the first half of the data.
    assert {frozenset(ids[d, :, e].flat) for d in range(2) for e in range(2)} == {
        frozenset(pair) for pair in ({0, 1}, {2, 3}, {4, 5}, {6, 7})
    }
    assert ids[0, :, 0].flatten().tolist() == [0, 1] and ids[0, 0, 1, 0] == 2


def test_devices_of_real_slices_are_grouped_by_slice():
    devices = [SimpleNamespace(id=i, slice_index=i % 2) for i in range(4)]
    assert [[d.id for d in part] for part in meshes._slices(devices, 2)] == [[0, 2], [1, 3]]
    with pytest.raises(UserError, match="lie in 2 pod slices"):
        meshes._slices(devices, 4)
    with pytest.raises(UserError, match="lie in 2 pod slices"):
        meshes._slices(devices, 1)


def test_a_shape_that_the_hardware_has_no_place_for(monkeypatch):
    def refuse(*args, **options):
        raise NotImplementedError("Failed to find assignment\nfor logical axis 2")

    monkeypatch.setattr(meshes.mesh_utils, "create_device_mesh", refuse)
    with pytest.raises(UserError, match=r"data=2, fsdp=1, expert=4, tensor=1 in a slice.*axis 2;"):
        meshes.make_mesh(MeshConfig(expert=4))


@pytest.mark.parametrize("sizes", [{}, {"expert": 4}, {"fsdp": 2, "tensor": 2}])
def test_batch_is_split_over_data_fsdp_and_expert(sizes):
    mesh = meshes.make_mesh(MeshConfig(**sizes))
    shards = meshes.batch_shards(mesh)
    assert shards == 8 // mesh.shape["tensor"]
    batch = {"image": np.arange(16 * 3.0).reshape(16, 3), "label": np.arange(16)}
    assert meshes.rows(mesh, 16) == tuple(range(16))
    placed = meshes.place(mesh, batch, 16)
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        shard = placed[name].addressable_shards[0].data
        assert shard.shape == (16 // shards, *array.shape[1:])


HOST = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from moezoo.train import join
from moezoo.train import mesh as meshes
from types import SimpleNamespace
index, port, timeout, apart = (int(word) for word in sys.argv[1:])
hosts = dict(coordinator=f"127.0.0.1:{port}", count=2, index=index, timeout=timeout)
join.initialise_distributed(SimpleNamespace(**hosts))
from moezoo.train.schema import MeshConfig
sizes = MeshConfig(expert=2)
def between(devices, shape):
    return np.reshape([devices[i] for i in (0, 2, 1, 3)], shape)
# On a pod most shapes lay devices of several hosts between each other.
mesh = meshes.make_mesh(sizes, arrange=between) if apart else meshes.make_mesh(sizes)
rows = meshes.rows(mesh, 8)
batch = np.arange(16.0).reshape(8, 2)
placed = meshes.place(mesh, {"x": batch[list(rows)]}, 8)["x"]
for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, batch[shard.index])
total = jax.jit(lambda x: (x * np.arange(8)[:, None]).sum())(placed)
print("rows", *rows, "sum", float(total))
"""


def start_host(index: int, port: int, timeout: int, apart: bool = False) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOST, str(index), str(port), str(timeout), str(int(apart))]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("apart", "shares"), [(False, ("0 1 2 3", "4 5 6 7")), (True, ("0 1 4 5", "2 3 6 7"))]
)
def test_two_processes_share_one_batch(apart: bool, shares: tuple[str, str]) -> None:
    port = free_port()
    hosts = [start_host(index, port, 60, apart) for index in range(2)]
    outputs = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    for index, (out, _) in enumerate(outputs):
        said = "All 2 processes are here, 2 devices in this one." in out
        assert said == ("Waiting for 2 processes" in out) == (index == 0), "only the first speaks"
        assert f"rows {shares[index]} sum 588.0" in out
