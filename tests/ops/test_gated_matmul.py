"""Both products of gated experts in one pass, in Pallas's interpreters, against plain products."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.export import DisabledSafetyCheck, export

from moezoo.bench import kernels as bench
from moezoo.nn.experts import gated_mlp
from moezoo.ops import grouped, mosaic_products
from moezoo.ops.gated_matmul import gated_matmul
from moezoo.ops.grouped_matmul import Tables
from moezoo.ops.routing import route
from moezoo.ops.row_products import gated, joined
from tests.ops.blocked import CALLS, CARDS, MOSAIC, TRITON, Blocked, card, interpreted


@partial(jax.jit, static_argnums=5)
def pulled(x: Any, gate: Any, up: Any, groups: Any, dy: Any, tables: Tables) -> Any:
    def product(x: Any, gate: Any, up: Any) -> Any:
        return gated_matmul(x, gate, up, groups, jax.nn.silu, tables=tables)

    y, pull = jax.vjp(product, x, gate, up)
    return y, *pull(dy)


def truth(x: Any, gate: Any, up: Any, dy: Any, expert: np.ndarray) -> Any:
    """The same of rows that hold something, in float32 by plain products."""
    own, holds = np.maximum(expert, 0), jnp.asarray(expert >= 0)[:, None]
    x, dy = (jnp.where(holds, a, 0.0) for a in (x, dy))

    def value(x: Any, gate: Any, up: Any) -> Any:
        times = partial(jnp.einsum, "sd,sdf->sf", precision="highest")
        return jax.nn.silu(times(x, gate[own])) * times(x, up[own])

    y, pull = jax.vjp(value, x, gate, up)
    return y, *pull(dy)


def compare(
    sizes: list[int], block: int, widths: tuple[int, int], seed: int, dtype: str, tables: Tables
) -> None:
    # Always as many blocks, so that few programs are compiled.
    rng, blocked = np.random.default_rng(seed), Blocked(sizes, block, 2 * len(sizes) + 1)
    x, dy = (blocked.of(rng, width) for width in widths)
    gate, up = (rng.normal(size=(len(sizes), *widths)) / widths[0] ** 0.5 for _ in range(2))
    x, gate, up, dy = (jnp.asarray(a, dtype) for a in (x, gate, up, dy))
    found = pulled(x, gate, up, blocked.groups, dy, tables)
    wide = (a.astype(jnp.float32) for a in (x, gate, up, dy))
    holds = blocked.expert >= 0
    names = "y", "dx", "dgate", "dup"
    for name, ours, theirs in zip(names, found, truth(*wide, blocked.expert), strict=True):
        assert ours.dtype == dtype
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
        if name in ("y", "dx"):
            ours, theirs = ours[holds], theirs[holds]
        if dtype == "float32":
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
        elif theirs.size:
            assert np.abs(ours - theirs).max() <= 2e-2 * max(np.abs(theirs).max(), 1.0), name


@given(
    shape=st.sampled_from([(1, 3, 2), (3, 17, 40)]),  # E, D, F; blocks of 16 rows
    seed=st.integers(0, 2**31 - 1),
    data=st.data(),
)
def test_values_and_derivatives(
    shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    """Empty, uneven and large groups, odd widths, NaN where nothing is."""
    sizes = data.draw(st.lists(st.integers(0, 32), min_size=shape[0], max_size=shape[0]))
    compare(sizes, 16, shape[1:], seed, "float32", TRITON)


@interpreted
@settings(max_examples=2)  # the interpreter takes seconds for each
@given(sizes=st.lists(st.integers(0, 140), min_size=2, max_size=2), seed=st.integers(0, 2**31 - 1))
def test_values_and_derivatives_on_hopper(sizes: list[int], seed: int) -> None:
    widths = 128, 64  # several tiles, of another number in the rows' derivative
    for form, (inputs, outputs) in ((gated(jax.nn.silu), widths), (joined(), widths[::-1])):
        fitted = mosaic_products.TABLE, 128, inputs, outputs, "bfloat16"
        assert mosaic_products.rows_fit(form, *fitted)
    compare(sizes, 128, widths, seed, "bfloat16", MOSAIC)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_layer_of_gated_experts_is_the_oracles(tokens: int) -> None:
    """`fused` takes the kernel; `kernels` has two products that meet."""
    keys = jax.random.split(jax.random.key(0), 5)
    names = {"gate": (3, 8, 6), "up": (3, 8, 6), "down": (3, 6, 8)}
    params = {
        name: {"kernel": jax.random.normal(key, form)}
        for key, (name, form) in zip(keys, names.items(), strict=False)
    }
    x_ND, logits_NE = (
        jax.random.normal(key, (tokens, n)) for key, n in zip(keys[3:], (8, 3), strict=True)
    )

    @partial(jax.jit, static_argnums=0)
    @partial(jax.value_and_grad, argnums=(1, 2))
    def pulled(apply: Any, params: Any, x_ND: Any) -> Any:
        return (apply(gated_mlp, params, x_ND, route(logits_NE, k=2)).y_ND ** 2).sum()

    found, wanted = (pulled(apply, params, x_ND) for apply in (grouped.fused, grouped.reference))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    y_ND, expected_ND = (
        apply(gated_mlp, params, x_ND, route(logits_NE, k=2)).y_ND
        for apply in (grouped.kernels, grouped.reference)
    )
    np.testing.assert_allclose(y_ND, expected_ND, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "call"), [("bfloat16", CALLS[0]), ("bfloat16", CALLS[1]), ("float32", CALLS[1])]
)
def test_the_kernels_are_made_for_a_gpu_without_one(dtype: str, call: str) -> None:
    """With the table's tiles; one kernel forward, backward one and those of the matrices."""
    blocked = Blocked([200, 100], 128, 4)

    def step(x: Any, gate: Any, up: Any, dy: Any) -> Any:
        product: Any = gated_matmul
        y, pull = jax.vjp(lambda *a: product(*a, blocked.groups, jax.nn.silu), x, gate, up)
        return y, pull(dy)

    forms = ((512, 128), (2, 128, 192), (2, 128, 192), (512, 192))
    with card(CARDS[call]):
        unstable = [DisabledSafetyCheck.custom_call(name) for name in CALLS]
        lowered = export(jax.jit(step), platforms=["cuda"], disabled_checks=unstable)
        module = lowered(*(jax.ShapeDtypeStruct(form, dtype) for form in forms)).mlir_module()
    counts = {name: module.count(f"@{name}(") for name in CALLS}
    assert counts == dict.fromkeys(CALLS, 0) | {call: 4}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", bench.CHECKED, ids=str)
def test_the_tables_tiles_on_a_gpu(shape: tuple[int, ...], dtype: str) -> None:
    with jax.default_matmul_precision("highest"):
        apart = bench.gated_differences(shape, dtype)
    assert bench.within({"dtype": dtype, "apart": apart}), apart
