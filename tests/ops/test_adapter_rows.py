"""Rows with adapters of their own: a loop, one batched product and sorted segments, by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.ops import adapter_rows


@pytest.mark.parametrize("tokens", [1, adapter_rows.MANY])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_row_has_the_factors_of_its_slot(tokens: int, grouped: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 2, 5))
    x, slots = rng.normal(size=(5, tokens, 4)), np.array([2, 0, 2, 1, 0])
    apply = adapter_rows._grouped if grouped else adapter_rows.by_row
    given = [jnp.asarray(v, jnp.float32) for v in (x, a, b)]
    y = apply(*given, jnp.asarray(slots, jnp.int32))
    wanted = [x[i] @ a[s] @ b[s] for i, s in enumerate(slots)]
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
