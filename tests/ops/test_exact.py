"""Products by parts against float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.ops import exact


@given(seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_three_parts_are_the_number(seed: int, scale: float) -> None:
    array = np.random.default_rng(seed).normal(size=50).astype(np.float32) * np.float32(scale)
    whole = sum(np.asarray(part, np.float64) for part in jax.jit(exact.parts)(array))
    np.testing.assert_allclose(whole, array, rtol=2**-23)


@given(seed=st.integers(0, 2**31 - 1), shape=st.sampled_from([(7, 5, 3), (64, 300, 8), (1, 1, 1)]))
def test_rows_in_bfloat16_lose_nothing(seed: int, shape: tuple[int, int, int]) -> None:
    n, d, e = shape
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, d)), jnp.bfloat16)
    w, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((d, e), (n, e)))

    def run(x: Any, w: Any) -> Any:
        y, pull = jax.vjp(exact.by_parts, x, w)
        return y, *pull(dy)

    y, dx, dw = jax.jit(run)(x, w)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    np.testing.assert_allclose(y, x64 @ w64, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(dw, x64.T @ dy64, rtol=1e-5, atol=2e-5)
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(dx, np.float64), dy64 @ w64.T, rtol=1e-2, atol=1e-4)


def test_a_gpu_multiplies_rows_in_bfloat16_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "platform", lambda: "gpu")
    kernel = jnp.ones((4, 2))

    def text(kind: str) -> str:
        return str(jax.make_jaxpr(exact.exact_product)(jnp.ones((3, 4), kind), kernel))

    assert "reduce_precision" in text("bfloat16") and "reduce_precision" not in text("float32")
