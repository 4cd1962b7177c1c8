"""A model that this machine has no memory for is refused before anything of it is made."""

from __future__ import annotations

import jax
import optax
import pytest

from moezoo.errors import UserError
from moezoo.train import mesh as meshes
from moezoo.train import placement, state
from moezoo.train.config import MeshConfig
from moezoo.train.domain import Classes
from moezoo.train.setup import make_builder, make_tasks
from tests.train import tiny


def created(mesh: MeshConfig, devices: int, **sizes: float) -> state.Created:
    config = tiny.config("unused", model=tiny.dense(**sizes))
    build = make_builder(config, make_tasks(config, Classes({"semseg": tiny.CLASSES})))
    shape = meshes.make_mesh(mesh, jax.devices()[:devices])
    return state.create(build, optax.adam(1e-3), shape, placement.DEFAULT)


def test_a_model_of_terabytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"The model has [0-9,]{15,} parameters.*smaller model"):
        created(MeshConfig(), 1, width=65_536, mlp_ratio=64.0)


def test_the_bound_is_that_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def few(devices: list) -> float:
        asked.append(len(devices))
        return 30_000.0

    monkeypatch.setattr(state, "available", few)
    for mesh, devices in ((MeshConfig(), 1), (MeshConfig(data=1, fsdp=2), 2)):
        with pytest.raises(UserError, match="--mesh.fsdp"):
            created(mesh, devices, depth=1)
    assert asked == [1, 2]


def test_devices_of_a_cpu_share_its_memory() -> None:
    one, all_of_them = state.available(jax.devices()[:1]), state.available(jax.devices())
    assert one and all_of_them and one == pytest.approx(all_of_them * len(jax.devices()))
    assert 2**28 < one < 2**44
