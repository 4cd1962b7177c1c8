"""V-MoE's rule for devices: what it refuses."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.train import expert_grid
from moezoo.train.config import MeshConfig
from moezoo.train.mesh import make_mesh


def test_the_mesh_has_every_device_once_and_our_axes():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2), arrange=expert_grid.arrange)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    assert len({d.id for d in mesh.devices.flat}) == len(jax.devices())


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="expert=3"):
        expert_grid.by_expert(np.empty((8, 1), object), 3)
    with pytest.raises(UserError, match="no such axis"):
        expert_grid.arrange(jax.devices(), (2, 1, 2, 2))


def test_devices_with_gaps_are_refused():
    with pytest.raises(UserError, match="fill no box"):
        expert_grid.hardware([jax.devices()[i] for i in (0, 2)])
