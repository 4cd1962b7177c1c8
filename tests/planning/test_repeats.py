"""Loops in compiled and traced programs count as often as they run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moezoo.ops.flops import product_flops
from moezoo.planning.collectives import collectives, repeats, sent

ROUNDS, D = 5, 8

# The form in which a TPU's compiler leaves loops: no note of rounds, a constant in the condition.
TPU = """HloModule jit_f

%fused (p: f32[4]) -> f32[4] {
  ROOT %n = f32[4]{0} negate(%p)
}

%inside (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[8]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
  %g = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
}

%below (p: (s32[], f32[4])) -> pred[] {
  %it.1 = s32[]{:T(128)} constant(2)
  %limit.1 = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit.1), direction=LT, backend_config={"flags":[]}
}

%outside (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = (s32[], f32[4]) while(%t), condition=%below, body=%inside
}

%data (p: (s32[], f32[4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %j), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w1 = (s32[], f32[4]) while(%t), condition=%below.2, body=%outside, {"known_trip_count":{"n":"3"}}
  %w2 = (s32[], f32[4]) while(%t), condition=%data, body=%fused
}
"""


def test_rounds_are_read_in_every_form() -> None:
    times = repeats(TPU)
    assert times["inside"] == 18 and times["outside"] == 3
    assert times["fused"] == 18 + 1  # in the inner loop, and in one of unknown rounds
    (found,) = collectives(TPU, 2)
    assert found.times == 18 and found.sent == 18 * 32 / 2


def looped(weights, x):
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] ** 2)


def unrolled(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def test_a_loop_sends_what_its_rounds_send() -> None:
    devices = np.array(jax.devices()[:4])
    mesh = jax.sharding.Mesh(devices, ("fsdp",))
    weights = jax.device_put(jnp.ones((ROUNDS, D, D)), NamedSharding(mesh, P(None, "fsdp")))
    x = jax.device_put(jnp.ones((4, D)), NamedSharding(mesh, P("fsdp")))

    def gathered(function):
        found = collectives(jax.jit(function).lower(weights, x).compile().as_text(), 4)
        return sent(one for one in found if one.kind == "all-gather")

    assert gathered(looped) == gathered(unrolled) > 0


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, jax.vmap])
def test_products_are_counted_in_all_rounds(wrap) -> None:
    shapes = jnp.ones((ROUNDS, D, D)), jnp.ones((3, D))
    given = [a[None] for a in shapes] if wrap is jax.vmap else shapes
    assert product_flops(jax.make_jaxpr(wrap(looped))(*given)) == ROUNDS * 2 * 3 * D * D


def test_products_of_gradients_convolutions_branches_and_shards() -> None:
    x, kernel = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 5))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert product_flops(jax.make_jaxpr(convolve)(x, kernel)) == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    one = jnp.ones((D, D))

    def branch(i):
        return jax.lax.cond(i > 0, lambda: one @ one, lambda: one @ one @ one)

    assert product_flops(jax.make_jaxpr(branch)(1)) == 2 * 2 * D**3
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    local = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    assert product_flops(jax.make_jaxpr(local)(one)) == 4 * 2 * 2 * 2 * D
    gradient = jax.grad(looped, argnums=(0, 1))
    weights, x = jnp.ones((ROUNDS, D, D)), jnp.ones((3, D))
    assert product_flops(jax.make_jaxpr(gradient)(weights, x)) == 3 * ROUNDS * 2 * 3 * D * D
