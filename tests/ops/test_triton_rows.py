"""The kernels that move rows, in Pallas's interpreter, against the gathers of `dispatch`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.ops import dispatch, triton_rows
from moezoo.ops.dispatch import block_slots, sort_by_expert


@jax.jit
def both(x: Any, weights: Any, experts_NK: Any, dy: Any) -> Any:
    """Values and derivatives of tokens to slots and back, by the kernels and by plain gathers."""
    made = block_slots(sort_by_expert(experts_NK, 4), experts_NK.shape[1], 16)

    def through(of: Any) -> Any:
        def there_and_back(x: Any, weights: Any) -> Any:
            y_SD = of.spread(x, made.slots)
            return of.combine(y_SD * 2 + 1, weights, made.slots).astype(x.dtype)

        y, pull = jax.vjp(there_and_back, x, weights)
        return of.spread(x, made.slots), y, *pull(dy)

    return through(triton_rows), through(dispatch)


@given(
    shape=st.sampled_from([(1, 1, 1), (5, 3, 2), (40, 33, 3), (64, 1030, 1), (17, 16, 4)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_rows_go_and_come_back_as_by_plain_gathers(
    shape: tuple[int, int, int], dtype: str, seed: int
) -> None:
    n, d, k = shape
    rng = np.random.default_rng(seed)
    experts = jnp.asarray(rng.permuted(np.tile(np.arange(-1, 4), (n, 1)), axis=1)[:, :k], jnp.int32)
    x, dy = (jnp.asarray(rng.normal(size=(n, d)), dtype) for _ in range(2))
    # Padding: tokens that no expert has may be NaN, and so may weights that go nowhere.
    x = jnp.where((experts >= 0).any(axis=1)[:, None], x, jnp.nan)
    weights = jnp.where(experts >= 0, jnp.asarray(rng.normal(size=(n, k)), jnp.float32), jnp.nan)
    ours, theirs = both(x, weights, experts, dy)
    limits = (1e-5, 1e-5) if dtype == "float32" else (2e-2, 2e-2)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and np.isfinite(np.asarray(a, np.float32)).all()
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=limits[0], atol=limits[1]
        )


@pytest.mark.parametrize("rows", [1, 100, 4096])
@pytest.mark.parametrize("width", [1, 96, 2048, 3000])
def test_tiles_cover_all_numbers(rows: int, width: int) -> None:
    tile = triton_rows._Tile(rows, width)
    assert tile.down * tile.rows >= rows and tile.across * tile.columns >= width
    assert tile.rows * tile.columns <= triton_rows.NUMBERS
