"""Which platform a program is being made for."""

from __future__ import annotations

import jax


def platform() -> str:
    """The name cpu, gpu or tpu: that of the current mesh's devices, else this process's default.

    A program can be compiled for devices that this machine does not have; the mesh that is set
    while it is traced then names them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
