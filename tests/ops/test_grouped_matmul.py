"""The kernels of sorted rows, in Pallas's interpreter, against the plain product of each group."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.export import DisabledSafetyCheck, export
from jax.sharding import AbstractDevice, AbstractMesh

from moezoo.bench import gpu
from moezoo.errors import UserError
from moezoo.ops import grouped, grouped_matmul
from moezoo.ops.grouped_matmul import LEAST, Groups, Tiles, visits
from moezoo.ops.routing import route

SMALL = Tiles(16, 16, 16, 1, 1)  # several tiles where groups are small


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_matmul, "TILES", dict.fromkeys(grouped_matmul.TILES, SMALL))


def of(sizes: list[int]) -> Groups:
    end = np.cumsum(sizes).astype(np.int32)
    return Groups(jnp.asarray(end - np.asarray(sizes, np.int32)), jnp.asarray(end))


def by_group(x: np.ndarray, w: np.ndarray, b: np.ndarray | None, sizes: list[int]) -> np.ndarray:
    """The product in float64, one group after the other; rows of nobody give 0."""
    y, start = np.zeros((len(x), w.shape[2])), 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows] = x[rows] @ w[expert] + (0 if b is None else b[expert])
        start += size
    return y


def derivatives(x: Any, w: Any, dy: Any, sizes: list[int]) -> tuple[np.ndarray, ...]:
    """Of rows, matrices and biases, in float64."""
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros((len(w), w.shape[2]))
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        dx[rows] = dy[rows] @ w[expert].T
        dw[expert], db[expert] = x[rows].T @ dy[rows], dy[rows].sum(0)
        start += size
    return dx, dw, db


@partial(jax.jit, static_argnames="biased")
def pulled(x: Any, w: Any, b: Any, groups: Groups, dy: Any, biased: bool) -> Any:
    def product(x: Any, w: Any, b: Any) -> Any:
        return grouped_matmul.grouped_matmul(x, w, b if biased else None, groups)

    y, pull = jax.vjp(product, x, w, b)
    return y, *pull(dy)


SHAPES = [(5, 1, 3, 2), (48, 3, 17, 16), (70, 4, 33, 40), (64, 2, 16, 5)]  # S, E, D, F


@given(
    shape=st.sampled_from(SHAPES),
    biased=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
    empty=st.floats(0, 1),
)
def test_values_and_derivatives(
    shape: tuple[int, ...], biased: bool, seed: int, empty: float
) -> None:
    s, e, d, f = shape
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(e + 1, 0.5)) * (rng.random(e + 1) >= empty)
    sizes = [int(n) for n in np.floor(shares[:e] * s)]
    x, w, b = rng.normal(size=(s, d)), rng.normal(size=(e, d, f)), rng.normal(size=(e, f))
    dy = rng.normal(size=(s, f))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, w, b, dy)]
    y, dx, dw, db = pulled(*arrays[:3], of(sizes), arrays[3], biased)
    np.testing.assert_allclose(
        y, by_group(x, w, b if biased else None, sizes), rtol=1e-4, atol=1e-5
    )
    expected = derivatives(x, w, dy, sizes)
    np.testing.assert_allclose(dx, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw, expected[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(db, expected[2] if biased else 0 * b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[20, 0, 13], [0, 0, 0], [16, 16, 16], [0, 48, 0]], ids=str)
def test_what_belongs_to_others_has_no_way_in(sizes: list[int]) -> None:
    """NaN in the rows of nobody, and in one expert's rows and matrix, stays where it is."""
    rng = np.random.default_rng(0)
    groups, total = of(sizes), sum(sizes)
    x, dy = rng.normal(size=(64, 8)), rng.normal(size=(64, 24))
    w, b = rng.normal(size=(3, 8, 24)), rng.normal(size=(3, 24))
    x[total:], dy[total:] = np.nan, np.nan
    last = max((e for e, size in enumerate(sizes) if size), default=0)
    mine = slice(int(groups.start_E[last]), int(groups.end_E[last]))
    x[mine], w[last] = np.nan, np.nan
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, w, b, dy)]
    y, dx, dw, _ = pulled(*arrays[:3], groups, arrays[3], True)
    others = np.ones(64, bool)
    others[mine] = False
    assert np.isfinite(y[others]).all() and np.isfinite(dx[others]).all()
    assert not np.asarray(y[total:]).any() and not np.asarray(dx[total:]).any()
    assert np.isfinite(np.delete(dw, last, axis=0)).all()


@given(seed=st.integers(0, 2**31 - 1), experts=st.integers(1, 9), tiles=st.integers(1, 6))
def test_visits_cover_each_row_once(seed: int, experts: int, tiles: int) -> None:
    rng, rows = np.random.default_rng(seed), tiles * LEAST
    ends = np.sort(rng.integers(0, rows + 1, experts))
    sizes = np.diff(ends, prepend=0)
    plan = jax.tree.map(np.asarray, visits(of(list(sizes)), rows, LEAST))
    assert len(plan.expert_V) == tiles + experts
    owner = np.full(rows, -1)
    for expert, tile, start, end in zip(*plan, strict=True):
        here = np.arange(max(start, tile * LEAST), min(end, (tile + 1) * LEAST))
        assert (owner[here] == -1).all()
        owner[here] = expert
    np.testing.assert_array_equal(
        owner, np.repeat(np.arange(experts + 1), [*sizes, rows - ends[-1]])
    )


def test_bfloat16_sums_in_float32() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.integers(-2, 3, (64, 256)), rng.integers(-2, 3, (2, 256, 16))
    made = grouped_matmul.grouped_matmul(
        jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), None, of([40, 20])
    )
    truth = jnp.asarray(by_group(x, w, None, [40, 20]), jnp.bfloat16)  # exact until the last cast
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(made, np.float32), np.asarray(truth, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_are_made_for_a_gpu_without_one(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's training step lowers to Triton's language, with the tiles of the table."""
    monkeypatch.undo()
    card = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), abstract_device=card)

    def loss(params: Any, x_ND: Any, logits_NE: Any) -> Any:
        def one(p: Any, x: Any, linear: Any) -> Any:
            return linear(jax.nn.gelu(linear(x, p["w1"], p["b1"])), p["w2"])

        return grouped.triton(one, params, x_ND, route(logits_NE, k=2)).y_ND.sum()

    def form(*shape: int, kind: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    params = {"w1": form(4, 64, 96), "b1": form(4, 96), "w2": form(4, 96, 64)}
    unstable = [DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    with jax.sharding.use_abstract_mesh(mesh):
        made = export(step, platforms=["cuda"], disabled_checks=unstable)(
            params, form(512, 64), form(512, 4, kind="float32")
        )
    # Two products forward, and backward the rows' and the matrices' derivatives of both.
    assert made.mlir_module().count("@__gpu$xla.gpu.triton(") == 6


def test_a_tpu_has_no_such_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "platform", lambda: "tpu")
    params = {"w": jnp.ones((2, 4, 4))}
    routing = route(jnp.ones((3, 2)), k=1)
    with pytest.raises(UserError, match="triton is for NVIDIA GPUs: take auto or ragged"):
        grouped.triton(lambda p, x, linear: linear(x, p["w"]), params, jnp.ones((3, 4)), routing)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4096, 384, 384, 16, 4), (2048, 768, 1536, 4, 2)], ids=str)
def test_the_tables_tiles_on_a_gpu(
    shape: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with jax.default_matmul_precision("highest"):
        apart = gpu.differences(shape, dtype)
    assert max(apart.values()) < gpu.LIMITS[dtype], apart
