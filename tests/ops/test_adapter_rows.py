"""Rows with adapters of their own: passes over the bank, a loop, one batched product and sorted
segments, by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.ops import adapter_rows

WAYS = {
    "as chosen": adapter_rows.by_row,
    "grouped": adapter_rows._grouped,
    "loop": adapter_rows._in_a_loop,
    "batched": adapter_rows._batched,
}


def drawn(slots: list[int], bank: int, tokens: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows, both factors and slots, and what is right."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(bank, 4, 2)), rng.normal(size=(bank, 2, 5))
    x = rng.normal(size=(len(slots), tokens, 4))
    nearest = np.clip(slots, 0, bank - 1)
    wanted = np.stack([x[i] @ a[s] @ b[s] for i, s in enumerate(nearest)])
    return [*(np.asarray(v, np.float32) for v in (x, a, b)), np.array(slots, np.int32)], wanted


@pytest.mark.parametrize("tokens", [1, adapter_rows.MANY])
@pytest.mark.parametrize("way", WAYS)
def test_every_row_has_the_factors_of_its_slot(tokens: int, way: str) -> None:
    args, wanted = drawn([2, 0, 2, 1, 0], 3, tokens)
    y = WAYS[way](*map(jnp.asarray, args))
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "slots",
    [
        [3, 0, 7, 1, 5],  # one pass over the bank of 8
        [3, 0, 3, 1, 3],  # three would cost more than a loop
        [-1, 8, 7, 0, 100],  # beyond the bank: the nearest
        [4],
    ],
)
@pytest.mark.parametrize("tokens", [1, 2, adapter_rows.MANY])
def test_whatever_rows_share(slots: list[int], tokens: int) -> None:
    args, wanted = drawn(slots, 8, tokens)
    y = adapter_rows.by_row(*map(jnp.asarray, args))
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


def test_a_batch_without_rows() -> None:
    rows, a, b = jnp.zeros((0, 1, 4)), jnp.ones((3, 4, 2)), jnp.ones((3, 2, 5))
    assert adapter_rows.by_row(rows, a, b, jnp.zeros(0, jnp.int32)).shape == (0, 1, 5)


@given(st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_passes_are_as_many_as_the_most_wanted_adapter_needs(slots: list[int]) -> None:
    args, wanted = drawn(slots, 5, 1)
    turns = [slots[:i].count(s) for i, s in enumerate(slots)]
    x, a, b, slot = map(jnp.asarray, args)
    passes = jnp.asarray(max(turns) + 1)
    y = adapter_rows._in_passes(x, a, b, slot, jnp.asarray(turns), passes)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adapter_rows.by_row(x, a, b, slot), wanted, rtol=1e-4, atol=1e-5)
