"""The kernels of blocks of rows, in Pallas's interpreters, against the plain product of each group.

Mosaic GPU's interpreter comes with JAX 0.11; with older versions those kernels are lowered only.
"""

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
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moezoo.bench import kernels as bench
from moezoo.errors import UserError
from moezoo.nn.layers import gelu, tanh_gelu
from moezoo.ops import grouped, grouped_matmul, mosaic_products
from moezoo.ops.exchange import per_device
from moezoo.ops.expert import Activation
from moezoo.ops.grouped_matmul import Tables, rows_of_block
from moezoo.ops.kernel_activations import evaluated, fuses, steps
from moezoo.ops.routing import route
from moezoo.ops.row_products import one_product
from tests.ops.blocked import CALLS, CARDS, MOSAIC, TRITON, Blocked, card, interpreted


def truth(x: Any, w: Any, b: Any, dy: Any, activation: Activation | None, expert: Any) -> Any:
    """Value of the rows that hold something and all derivatives, in float32 by plain products."""
    own = np.maximum(expert, 0)
    holds = jnp.asarray(expert >= 0)[:, None]

    def value(x: Any, w: Any, b: Any) -> Any:
        y = jnp.einsum("sd,sdf->sf", x, w[own], precision="highest") + b[own]
        y = y if activation is None else activation(y)
        return jnp.where(holds, y, 0.0)

    x, dy = (jnp.where(holds, a, 0.0) for a in (x, dy))
    y, pull = jax.vjp(value, x, w, b)
    return y, *pull(dy)


@partial(jax.jit, static_argnums=(5, 6, 7))
def pulled(
    x: Any, w: Any, b: Any, groups: Any, dy: Any, activation: Any, biased: bool, tables: Tables
) -> Any:
    multiply: Any = grouped_matmul.grouped_matmul

    def product(x: Any, w: Any, b: Any) -> Any:
        return multiply(x, w, b if biased else None, groups, activation, tables=tables)

    y, pull = jax.vjp(product, x, w, b)
    return y, *pull(dy)


def compare(
    sizes: list[int], block: int, d: int, f: int, seed: int, *, biased: bool = True,
    activation: Activation | None = None, dtype: str = "float32", tables: Tables = TRITON,
) -> None:  # fmt: skip
    # Always as many blocks, so that few programs are compiled.
    rng, blocked = np.random.default_rng(seed), Blocked(sizes, block, 2 * len(sizes) + 1)
    x, dy = blocked.of(rng, d), blocked.of(rng, f)
    w, b = rng.normal(size=(len(sizes), d, f)) / d**0.5, rng.normal(size=(len(sizes), f))
    b = b if biased else 0 * b
    arrays = [jnp.asarray(a, dtype) for a in (x, w, b, dy)]
    found = pulled(*arrays[:3], blocked.groups, arrays[3], activation, biased, tables)
    wide = [a.astype(jnp.float32) for a in arrays]
    expected = truth(*wide, activation, blocked.expert)
    holds = blocked.expert >= 0
    for name, ours, theirs in zip(("y", "dx", "dw", "db"), found, expected, strict=True):
        assert ours.dtype == dtype
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
        if name in ("y", "dx"):
            ours, theirs = ours[holds], theirs[holds]
        if name == "db" and not biased:
            theirs = 0 * theirs
        if dtype == "float32":
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
        elif theirs.size:
            assert np.abs(ours - theirs).max() <= 2e-2 * max(np.abs(theirs).max(), 1.0), name


# Sizes E, D, F; blocks of 16 rows.
@given(
    shape=st.sampled_from([(1, 3, 2), (3, 17, 16), (4, 33, 40), (2, 16, 5)]),
    biased=st.booleans(),
    activation=st.sampled_from([None, gelu]),
    seed=st.integers(0, 2**31 - 1),
    data=st.data(),
)
def test_values_and_derivatives(
    shape: tuple[int, ...], biased: bool, activation: Any, seed: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(0, 32), min_size=shape[0], max_size=shape[0]))
    compare(sizes, 16, *shape[1:], seed, biased=biased, activation=activation)


@interpreted
@settings(max_examples=2)  # the interpreter takes seconds for each
@given(
    sizes=st.lists(st.integers(0, 140), min_size=2, max_size=2),
    seed=st.integers(0, 2**31 - 1),
    activation=st.sampled_from([None, gelu, jax.nn.silu]),
)
@pytest.mark.parametrize("widths", [(128, 192), (64, 128)], ids=str)
def test_values_and_derivatives_on_hopper(
    widths: tuple[int, int], sizes: list[int], seed: int, activation: Any
) -> None:
    fitted = mosaic_products.TABLE, 128, *widths, "bfloat16"
    assert mosaic_products.matrices_fit(*fitted)
    assert mosaic_products.rows_fit(one_product(), *fitted)
    compare(sizes, 128, *widths, seed, activation=activation, dtype="bfloat16", tables=MOSAIC)


def test_what_belongs_to_others_has_no_way_in() -> None:
    """NaN in one expert's rows and matrix stays where it is; `compare` puts it in unused blocks."""
    rng, blocked = np.random.default_rng(0), Blocked([20, 0, 13], 16, 5)
    x, dy = blocked.of(rng, 8), blocked.of(rng, 24)
    w, b = rng.normal(size=(3, 8, 24)), rng.normal(size=(3, 24))
    x[blocked.expert == 2], w[2] = np.nan, np.nan
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, w, b, dy)]
    y, dx, dw, db = pulled(*arrays[:3], blocked.groups, arrays[3], None, True, TRITON)
    assert np.isfinite(y[blocked.expert == 0]).all() and np.isfinite(dx[blocked.expert == 0]).all()
    assert np.isfinite(dw[:2]).all() and np.isfinite(db).all()
    assert not np.asarray(dw[1]).any() and not np.asarray(db[1]).any()


def test_bfloat16_sums_in_float32() -> None:
    rng, blocked = np.random.default_rng(0), Blocked([40, 20], 16, 6)
    x, w = rng.integers(-2, 3, (blocked.rows, 256)), rng.integers(-2, 3, (2, 256, 16))
    made = grouped_matmul.grouped_matmul(
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(w, jnp.bfloat16),
        None,
        blocked.groups,
        tables=TRITON,
    )
    own = blocked.expert >= 0
    exact = np.einsum("sd,sdf->sf", x[own], w[blocked.expert[own]])  # until the last cast
    assert made.dtype == jnp.bfloat16
    rounded = jnp.asarray(exact, jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(np.asarray(made, np.float32)[own], rounded)


@pytest.mark.parametrize("activation", [gelu, tanh_gelu, jax.nn.silu, jax.nn.relu])
def test_activations_inside_the_kernels(activation: Activation) -> None:
    """The steps that the kernels run, erf by a polynomial, and what is left to XLA."""
    x = jnp.linspace(-8, 8, 4096)
    (made,) = evaluated(steps(activation, x.shape), x)
    assert np.abs(np.asarray(made - activation(x))).max() < 1e-4
    assert fuses(activation)
    assert not fuses(lambda x: jnp.cumsum(x, axis=0))


def test_blocks_are_as_large_as_an_average_group() -> None:
    assert [rows_of_block(n, 8) for n in (8192, 1024, 1023, 200, 1)] == [128, 128, 64, 16, 16]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", CARDS)
@pytest.mark.parametrize("moving", [0, 4], ids=["kernels", "fused"])
def test_the_kernels_are_made_for_a_gpu_without_one(dtype: str, call: str, moving: int) -> None:
    """A layer's training step lowers to a GPU's language, with the table's tiles."""
    triton = CALLS[1]
    call = call if dtype == "bfloat16" else triton

    def loss(params: Any, x_ND: Any, logits_NE: Any) -> Any:
        def one(p: Any, x: Any, linear: Any) -> Any:
            return linear(linear(x, p["w1"], p["b1"], gelu), p["w2"])

        apply = grouped.fused if moving else grouped.auto
        return apply(one, params, x_ND, route(logits_NE, k=2)).y_ND.sum()

    def form(*shape: int, kind: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    params = {"w1": form(4, 128, 192), "b1": form(4, 192), "w2": form(4, 192, 128)}
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    with card(CARDS[call]):
        unstable = [DisabledSafetyCheck.custom_call(name) for name in CALLS]
        module = export(step, platforms=["cuda"], disabled_checks=unstable)(
            params, form(512, 128), form(512, 4, kind="float32")
        ).mlir_module()
    # Two products forward, and backward the rows' and the matrices' derivatives of both; `fused`
    # also has tokens to slots and back, and the derivatives of either.
    counts = {name: module.count(f"@{name}(") for name in CALLS}
    products = {CALLS[0]: 0, triton: moving} | {call: 6 + (moving if call == triton else 0)}
    assert counts == products


def test_an_export_for_any_number_of_tokens_has_no_kernels() -> None:
    """A program that serves all platforms and sizes is made of plain operations."""
    (n,) = jax.export.symbolic_shape("n")
    params = {"w": jax.ShapeDtypeStruct((4, 128, 128), "bfloat16")}
    rows = jax.ShapeDtypeStruct((n, 128), "bfloat16"), jax.ShapeDtypeStruct((n, 4), "float32")

    def call(params: Any, x_ND: Any, logits_NE: Any) -> Any:
        routing = route(logits_NE, k=2)
        return grouped.auto(lambda p, x, linear: linear(x, p["w"]), params, x_ND, routing).y_ND

    with card(CARDS["mosaic_gpu_v2"]):
        module = export(jax.jit(call), platforms=["cuda"])(params, *rows).mlir_module()
    assert not any(call in module for call in CARDS)


def test_kernels_are_not_left_to_the_compiler_to_split() -> None:
    """On several cards a `shard_map` around them splits tokens, else plain operations are taken."""
    device = AbstractDevice(device_kind=CARDS[CALLS[0]], num_cores=132, platform="gpu")
    auto = (AxisType.Auto,)
    mesh = AbstractMesh((2,), ("data",), axis_types=auto, abstract_device=device)
    params = {"w": jax.ShapeDtypeStruct((4, 128, 128), "bfloat16")}
    rows = jax.ShapeDtypeStruct((512, 128), "bfloat16"), jax.ShapeDtypeStruct((512, 4), "float32")

    def call(apply: Any) -> str:
        def layer(params: Any, x_ND: Any, logits_NE: Any) -> Any:
            routing = route(logits_NE, k=2)
            return apply(lambda p, x, linear: linear(x, p["w"]), params, x_ND, routing).y_ND

        lowered = jax.jit(layer).trace(params, *rows).lower(lowering_platforms=("cuda",))
        return lowered.as_text()

    with jax.sharding.use_abstract_mesh(mesh):
        assert CALLS[0] not in call(grouped.auto)
        assert CALLS[0] in call(per_device(grouped.auto))


def test_a_tpu_has_no_such_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "platform", lambda: "tpu")
    params = {"w": jnp.ones((2, 4, 4))}
    routing = route(jnp.ones((3, 2)), k=1)
    with pytest.raises(UserError, match="kernels is for NVIDIA GPUs: take auto or ragged"):
        grouped.kernels(lambda p, x, linear: linear(x, p["w"]), params, jnp.ones((3, 4)), routing)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", bench.CHECKED, ids=str)
def test_the_tables_tiles_on_a_gpu(shape: tuple[int, ...], dtype: str) -> None:
    with jax.default_matmul_precision("highest"):
        apart = bench.differences(shape, dtype)
    assert bench.within({"dtype": dtype, "apart": apart}), apart
