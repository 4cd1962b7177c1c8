"""Experts that choose their tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.ops.grouped import reference
from moezoo.ops.routing import experts_choose
from tests.ops import oracle
from tests.ops.cases import LOSSLESS, SHAPES, arrays, assert_trees_close, mlp, problem, runner

LAYER = SHAPES[2]  # K = E: a token may get all experts


@pytest.mark.parametrize("slots", [1, 3, 40])
def test_every_expert_takes_its_best_tokens(slots: int) -> None:
    p = problem(LAYER, seed=slots, padded=0.3)
    run = jax.jit(lambda logits, mask: experts_choose(logits, slots=slots, mask_N=mask))
    choice = run(arrays(p.logits_NE), jnp.asarray(p.mask_N))
    real = np.flatnonzero(p.mask_N)
    probs_NE = np.stack([oracle.softmax(row) for row in p.logits_NE])
    chosen: list[dict[int, float]] = [{} for _ in range(LAYER.n)]
    for e in range(LAYER.e):
        for place in oracle.best(probs_NE[real, e], min(slots, len(real))):
            chosen[real[place]][e] = probs_NE[real[place], e]
    for n in range(LAYER.n):
        experts = {int(e): float(w) for e, w in zip(*row(choice, n), strict=True) if e >= 0}
        assert experts == pytest.approx(chosen[n])
    expected_ND = oracle.layer(p.params, p.x_ND, chosen)
    args = (mlp, *arrays((p.params, p.x_ND)), choice.routing)
    assert_trees_close(reference(*args).y_ND, expected_ND)
    cotangent_ND = arrays(p.x_ND + 1.0)
    done = {name: runner(name)(*args[1:], cotangent_ND) for name in LOSSLESS}
    for name, gradients in done.items():
        assert_trees_close(gradients.y_ND, expected_ND)
        assert_trees_close(gradients[2:], done["reference"][2:], rtol=1e-3, atol=1e-4)
        assert int(gradients.dropped) == 0, name


def row(choice, n: int):
    return choice.routing.experts_NK[n], choice.routing.weights_NK[n]


@pytest.mark.slow
def test_gradients_reach_the_logits() -> None:
    p = problem(LAYER, seed=9)

    def loss(logits_NE):
        routing = experts_choose(logits_NE, slots=4).routing
        return jnp.sum(reference(mlp, *arrays((p.params, p.x_ND)), routing).y_ND ** 2)

    slopes = jax.grad(loss)(arrays(p.logits_NE))
    assert np.isfinite(slopes).all() and np.abs(slopes).max() > 1e-3
