"""Which selections can teach a router what to choose: said and measured."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.ops.selection import (
    SELECTIONS,
    Selection,
    check_learns,
    learns,
    renormalised_among,
    softmax_of_all,
    unweighted,
)

N = 5


def gradient(select, k: int, experts: int) -> float:
    """The largest derivative of what experts with outputs of their own give together."""
    logits_NE = jnp.asarray(np.random.default_rng(0).normal(size=(N, experts)), jnp.float32)
    output_E = 1.0 + jnp.arange(experts, dtype=jnp.float32)

    def total(logits_NE):
        selected = select(logits_NE, k)
        return jnp.sum(selected.weights_NK * output_E[selected.experts_NK])

    return float(jnp.abs(jax.grad(total)(logits_NE)).max())


@pytest.mark.parametrize(("k", "experts"), [(1, 1), (1, 3), (2, 3), (3, 3)])
@pytest.mark.parametrize("name", [*SELECTIONS, "softmax_of_all"])
def test_what_is_said_to_learn_has_a_gradient(name: str, k: int, experts: int) -> None:
    select = SELECTIONS.get(name, softmax_of_all)
    k = experts if name == "softmax_of_all" else k
    if learns(select, k, experts):
        check_learns(select, k, experts)
        assert gradient(select, k, experts) > 1e-3
        return
    assert gradient(select, k, experts) < 1e-6
    with pytest.raises(UserError, match="options: .*would never learn; take"):
        check_learns(select, k, experts, "options")


def test_the_advice_learns() -> None:
    for name, select in SELECTIONS.items():
        if learns(select, 1):
            continue
        with pytest.raises(UserError) as caught:
            check_learns(select, 1)
        instead = str(caught.value).partition("take ")[2].partition(",")[0]
        assert learns(SELECTIONS[instead], 1), name


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_usual_selection_learns_for_every_number(k: int) -> None:
    select = renormalised_among(k)
    assert gradient(select, k, 4) > 1e-3
    total_N = select(jnp.zeros((N, 4)), k).weights_NK.sum(axis=1)
    np.testing.assert_allclose(total_N, 0.25 if k == 1 else 1.0, rtol=1e-6)


def test_weights_of_one_are_a_quirk_with_a_name() -> None:
    assert gradient(Selection(unweighted), 2, 3) == 0.0
