"""What backends and experts agree on: an expert's function, and a backend that applies it.

Also the platform that a program is being made for, and every choice of a token by itself
(`each_choice`, `each_input`): attention experts need that (one routing, two products, attention
between them), and so do statistics of single experts. A choice becomes a token of its own with one
expert, so any backend does it, on one device or many, for the work of a layer with the same
choices. Backends with capacity then see choices of rank 0 only: earlier tokens take slots before
later ones, all their choices alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops.routing import Routing, map_rows

Activation = Callable[[Array], Array]  # of each number by itself
Params = Any  # a pytree of arrays with leading axis E (stacked experts) or of one expert


class ExpertLinear(Protocol):
    """Multiplies each row by the matrix of the expert that the row belongs to."""

    def __call__(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        activation: Activation | None = None,
        up: Array | None = None,
    ) -> Array:
        """`x` [..., D], `w` [D, F] of one expert (or [E, D, F] where rows are mixed), `b` [F].

        An activation that is given here, and not applied to the result, costs kernels no pass of
        its own. `up`: a second matrix, like `w`; what x gives through it multiplies the result, and
        kernels read x once for both.
        """
        ...


# One expert's function, `fn(params, x, linear)`: it touches `params` only through `linear`, works
# on each row by itself, perhaps to another width, and closes over no array that is differentiated.
ExpertFn = Callable[[Params, Array, ExpertLinear], Array]


class Applied(NamedTuple):
    """What a backend returns: y_ND in the type of x; `dropped` int32, choices that did not fit."""

    y_ND: Array
    dropped: Array


Backend = Callable[[ExpertFn, Params, Array, Routing], Applied]


def dense(
    x: Array,
    w: Array,
    b: Array | None = None,
    activation: Activation | None = None,
    up: Array | None = None,
) -> Array:
    """The `ExpertLinear` of one expert."""
    y = x @ w
    y = y if b is None else y + b
    y = y if activation is None else activation(y)
    return y if up is None else y * (x @ up)


def count_experts(params: Params) -> int:
    """E, the length of the leading axis of stacked parameters."""
    return jax.tree.leaves(params)[0].shape[0]


def nothing(fn: ExpertFn, params: Params, x_ND: Array) -> Array:
    """What experts give for no tokens: [0, width of their output], in the type of x."""
    return jnp.zeros((0, output_width(fn, params, x_ND)), x_ND.dtype)


def output_width(fn: ExpertFn, params: Params, x_ND: Array) -> int:
    """The width of what one expert makes of a row of `x_ND`."""
    own = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), params)
    row = jax.ShapeDtypeStruct((1, x_ND.shape[1]), x_ND.dtype)
    return jax.eval_shape(lambda p, x: fn(p, x, dense), own, row).shape[1]


def platform() -> str:
    """The name cpu, gpu or tpu: that of the current mesh's devices, else this process's default.

    A program can be compiled for devices that this machine does not have; the mesh that is set
    while it is traced then names them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def nvidia() -> bool:
    """Whether the GPU that programs are being made for is one of NVIDIA's."""
    if platform() != "gpu":
        return False
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return "NVIDIA" in device.device_kind
    return "cuda" in jax.devices()[0].client.platform_version.lower()


def one_each(routing: Routing) -> Routing:
    """The N*K choices as tokens that chose one expert with weight 1; row token * K + rank."""
    n, k = routing.experts_NK.shape
    experts_R1, lot_NK = routing.experts_NK.reshape(n * k, 1), routing.lot_NK
    repeated = map_rows(lambda a: jnp.repeat(a, k, axis=0), routing)
    # A lot belongs to a choice already: each keeps its own.
    return repeated._replace(
        experts_NK=experts_R1,
        weights_NK=(experts_R1 >= 0).astype(jnp.float32),
        lot_NK=None if lot_NK is None else lot_NK.reshape(n * k, 1),
    )


def each_choice(
    apply: Backend, fn: ExpertFn, params: Params, x_ND: Array, routing: Routing
) -> Applied:
    """What each chosen expert makes of its token, before the weight: y [N, K, F].

    0 where a choice went nowhere. Experts may change the width.
    """
    n, k = routing.experts_NK.shape
    x_NKD = jnp.broadcast_to(x_ND[:, None], (n, k, x_ND.shape[1]))
    return each_input(apply, fn, params, x_NKD, routing)


def each_input(
    apply: Backend, fn: ExpertFn, params: Params, x_NKD: Array, routing: Routing
) -> Applied:
    """`each_choice` where every choice's expert has an input of its own: y [N, K, F]."""
    n, k, d = x_NKD.shape
    y_RF, dropped = apply(fn, params, x_NKD.reshape(n * k, d), one_each(routing))
    return Applied(y_RF.reshape(n, k, y_RF.shape[1]), dropped)


def weighted_sum(y_NKD: Array, routing: Routing) -> Array:
    """Sum over a token's choices of weight times output, [N, D] in the type of y.

    Added up in float32 or wider.
    """
    wide = jnp.promote_types(y_NKD.dtype, jnp.float32)
    weighted_NKD = routing.weights_NK[..., None] * y_NKD.astype(wide)
    return jnp.sum(weighted_NKD, axis=1).astype(y_NKD.dtype)
