"""Experts on several devices: every device runs a backend on its own tokens."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from moezoo.ops.expert import Applied, Backend, ExpertFn, Params
from moezoo.ops.routing import Routing


def per_device(backend: Backend, axes: tuple[str, ...] = ("data", "fsdp", "expert")) -> Backend:
    """Run `backend` on each device's own tokens, with all experts gathered there.

    The tokens are split over those of `axes` that the mesh of `jax.set_mesh` has; sorting and
    looping then stay inside a device. Without a mesh, on one device, or where the tokens cannot be
    split evenly, this is `backend` itself, as it is inside another `shard_map`. A backend that may
    drop choices does so by the tokens of one device.
    """

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        split = _axes_to_split(axes)
        n = x_ND.shape[0]
        parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in split)
        if parts == 1 or n == 0 or n % parts:
            return backend(fn, params, x_ND, routing)

        def body(params: Params, x_ND: Array, routing: Routing) -> tuple[Array, Array]:
            y_ND, dropped = backend(fn, params, x_ND, routing)
            return y_ND, jax.lax.psum(dropped, split)

        rows, everywhere = PartitionSpec(split), PartitionSpec()
        scale_NE = jnp.broadcast_to(routing.noise_scale_NE, routing.logits_NE.shape)
        on_each_device = jax.shard_map(
            body,
            in_specs=(everywhere, rows, rows),
            out_specs=(rows, everywhere),
            axis_names=set(split),
            check_vma=False,
        )
        return Applied(*on_each_device(params, x_ND, routing._replace(noise_scale_NE=scale_NE)))

    return apply


def _axes_to_split(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `axes` that the current mesh has, in more than one part and not yet split."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {axis for axis in mesh.axis_names if axis not in mesh.manual_axes}
    return tuple(axis for axis in axes if axis in free and mesh.shape[axis] > 1)
