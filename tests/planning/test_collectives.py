"""Collectives read out of program texts, and what an exchange moves against the least."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moezoo.ops import exchange, grouped
from moezoo.ops.expert import Backend
from moezoo.planning.collectives import collectives, even_least_bytes, least_bytes, sent
from tests.ops.cases import Shape, arrays, mlp, problem
from tests.ops.test_exchange import mesh_of
from tests.ops.test_grouped import routing_of

GROUPS = "channel_id=1, replica_groups={{0,1},{2,3}}"
LINES = {
    f"%a.1 = f32[4,8]{{1,0}} all-to-all(%x), {GROUPS}, dimensions={{0}}": (
        ("all-to-all", (0, 1), 128, 64.0),
    ),
    f"  %t = (f32[1,8]{{1,0}}, f32[1,8]{{1,0}}) all-to-all(%x, %y), {GROUPS}": (
        ("all-to-all", (0, 1), 64, 32.0),
    ),
    "ROOT %g = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=[2,2]<=[2,2]T(1,0)": (
        ("all-gather", (0, 2), 256, 128.0),
    ),
    "%s = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4]": (
        ("all-gather", (0, 1, 2, 3), 64, 48.0),
    ),
    "%s = ((f32[4]{0}, s8[2]{0}), (f32[8]{0}, s8[4]{0})) all-gather-start(%x, %y), "
    "replica_groups=[2,2]<=[4]": (("all-gather", (0, 1), 36, 18.0),),
    "%d = f32[16]{0} all-gather-done(%s)": (),
    "%r = f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add": (
        ("reduce-scatter", (0, 1, 2, 3), 64, 48.0),
    ),
    "%r = f32[16]{0} all-reduce-start(%x), replica_groups={}, to_apply=%add": (
        ("all-reduce", (0, 1, 2, 3), 64, 96.0),
    ),
    "%p = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]) collective-permute-start(%x), "
    "source_target_pairs={{0,1},{1,0}}": (("collective-permute", (0, 1), 32, 32.0),),
    "%m = f32[16]{0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2], "
    "device_ids=([2,2]T(1,0)) {'axis_0'}, use_global_device_ids=true": (
        ("all-reduce", (0, 1), 64, 64.0),
    ),
    "%n = f32[16]{0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}": (
        ("all-reduce", (0, 2), 64, 64.0),
    ),
    "%v = bf16[6,2,640]{2,1,0} ragged-all-to-all(%x, %o, %i), replica_groups={{0,1}}": (
        ("ragged-all-to-all", (0, 1), 15360, 7680.0),
    ),
    "%q = s32[] all-reduce(%x), replica_groups={{0},{1}}": (),
    "%w = f32[8]{0} async-start(%x), calls=%wrapped": (),
    "%z = f32[8]{0} add(%all-to-all.3, %all-gather.7)": (),
}


@pytest.mark.parametrize("line", LINES)
def test_every_form_of_a_line(line: str) -> None:
    found = [(one.kind, one.members, one.bytes, one.sent) for one in collectives(line, 4)]
    assert tuple(found) == LINES[line]


def test_a_fused_reduce_scatter_is_one() -> None:
    text = """
%all-reduce-scatter.1 (input.1: f32[16]) -> f32[4] {
  %r = f32[16]{0} all-reduce(%input.1), replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %r2 = f32[16]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    assert [one.kind for one in collectives(text, 4)] == ["reduce-scatter", "all-reduce"]


def test_the_axes_of_an_operation() -> None:
    mesh = {"data": 2, "expert": 2}
    text = "%a = f32[8]{0} all-gather(%x), replica_groups="
    for groups, axes in [
        ("{{0,1},{2,3}}", ("expert",)),
        ("[2,2]<=[2,2]T(1,0)", ("data",)),
        ("{}", ("data", "expert")),
    ]:
        assert collectives(text + groups, 4)[0].axes(mesh) == axes


def test_the_least_that_has_to_move() -> None:
    experts_NK = np.asarray([[0, 1], [2, 3], [0, 2], [-1, -1]])  # two devices, two experts each
    np.testing.assert_array_equal(least_bytes(experts_NK, 4, 2, 10), [20.0, 20.0])
    # All pairs of experts, once on each device: on average what the formula says.
    pairs = np.asarray([(a, b) for a in range(4) for b in range(a)] * 2)
    assert least_bytes(pairs, 4, 2, 10).mean() == pytest.approx(even_least_bytes(6, 2, 4, 2, 10))


BALANCED = Shape(n=128, e=8, k=2, d=128, f=4)


def balanced() -> np.ndarray:
    """On each of 4 devices every pair of devices equally often, one token in four at home only."""
    token = np.arange(BALANCED.n)
    first = token % 8
    return np.stack([first, (first + 2 * (token // 8 % 4) + 1) % 8], axis=1)


def compiled(backend: Backend, backward: bool):
    """The layer's program on 4 devices of the expert axis, and its dropped choices."""
    mesh = mesh_of(1, 1, 4)
    rows = NamedSharding(mesh, P("expert"))
    p = problem(BALANCED, seed=0)
    routing = routing_of(balanced(), BALANCED.e)
    args = jax.device_put(arrays((p.params, p.x_ND)), rows)

    def forward(params, x_ND, weights_NK):
        return backend(mlp, params, x_ND, routing._replace(weights_NK=weights_NK))

    def both(*args):
        y_ND, pull, dropped = jax.vjp(lambda *a: tuple(forward(*a)), *args, has_aux=True)
        return y_ND, dropped, pull(jnp.sin(y_ND))

    with jax.set_mesh(mesh):
        weights_NK = jax.device_put(routing.weights_NK, rows)
        program = jax.jit(both if backward else forward).lower(*args, weights_NK).compile()
    return program, int(program(*args, weights_NK)[1])


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2], ids=["forward", "both"])
def test_all_to_all_moves_little_more_than_it_must(passes: int) -> None:
    least = least_bytes(balanced(), BALANCED.e, 4, 4 * BALANCED.d)
    assert least.min() == least.max()
    per_pair = int(least[0]) // (2 * 3 * 4 * BALANCED.d)
    exact = exchange.all_to_all(slots=per_pair, local=grouped.reference)
    program, dropped = compiled(exact, backward=passes == 2)
    found = collectives(program.as_text(), 4)
    assert dropped == 0
    assert 1.0 <= sent(found) / (passes * least[0]) <= 1.2
    # Experts stay where they are: nothing of the size of their matrices is ever gathered.
    assert "all-gather" not in {one.kind for one in found}


def test_gather_moves_all_tokens_and_no_experts() -> None:
    program, dropped = compiled(exchange.gather(grouped.reference), backward=False)
    found = collectives(program.as_text(), 4)
    tokens = 2 * 3 * (BALANCED.n // 4) * 4 * BALANCED.d
    assert dropped == 0
    assert tokens <= sent(found) <= 1.2 * tokens
