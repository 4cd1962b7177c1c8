"""What answers for removed experts, against least squares written out."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.deploy import novices
from moezoo.deploy.novices import Observations
from moezoo.deploy.usage import Moments, Usage, add, add_moments, observe, observe_inputs
from moezoo.errors import UserError
from moezoo.ops.routing import Routing, route

E, K, D = 4, 2, 5


def observations(seed: int, n: int) -> tuple[Observations, Routing, np.ndarray, np.ndarray]:
    """Tokens, of which some are padding, and outputs that are nearly maps of them."""
    rng = np.random.default_rng(seed)
    x_ND = rng.normal(size=(n, D)).astype(np.float32) + 1
    routing = jax.device_get(
        route(rng.normal(size=(n, E)).astype(np.float32), k=K, mask_N=rng.uniform(size=n) < 0.9)
    )
    maps = rng.normal(size=(E, D, D))
    y_NKD = np.einsum("nd,nkdf->nkf", x_ND, maps[np.maximum(routing.experts_NK, 0)])
    y_NKD = (y_NKD + 0.3 * rng.normal(size=y_NKD.shape) + 2).astype(np.float32)
    usage, moments = add(None, observe(routing, y_NKD)), None
    for part in np.array_split(np.arange(n), 3):  # sums of batches
        some = jax.tree.map(lambda a, part=part: a[part], routing)
        moments = add_moments(moments, observe_inputs(some, x_ND[part], y_NKD[part]))
    return Observations(usage, moments), routing, x_ND, y_NKD


def weighed(routing: Routing, y_NKD: np.ndarray, e: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights g [N] of one expert, 0 where it was not chosen, and its outputs [N, D]."""
    mine_NK = (routing.experts_NK == e) & routing.mask_N[:, None]
    g_N = np.where(mine_NK, routing.weights_NK, 0.0).sum(1)
    return g_N, np.where(mine_NK[..., None], y_NKD, 0.0).sum(1)


def answers(made: novices.Novices, x_ND: np.ndarray, r: int, removed: int) -> np.ndarray:
    gates_NR = np.zeros((len(x_ND), removed), np.float32)
    gates_NR[:, r] = 1.0
    return np.asarray(made(x_ND, gates_NR))


def error(g_N: np.ndarray, y_ND: np.ndarray, answer_ND: np.ndarray) -> float:
    return float(np.sum(g_N[:, None] ** 2 * (y_ND - answer_ND) ** 2))


@given(seed=st.integers(0, 99), n=st.sampled_from([300, 411]))
def test_full_rank_is_weighted_least_squares(seed: int, n: int) -> None:
    seen, routing, x_ND, y_NKD = observations(seed, n)
    made = novices.affine_novices(seen, (1, 3), D)
    for r, e in enumerate((1, 3)):
        g_N, y_ND = weighed(routing, y_NKD, e)
        design = np.concatenate([x_ND, np.ones((n, 1))], axis=1) * g_N[:, None]
        best, *_ = np.linalg.lstsq(design, y_ND * g_N[:, None], rcond=None)
        wanted = x_ND @ best[:-1] + best[-1]
        found = answers(made, x_ND, r, 2)
        # The ridge is a ten-thousandth of the inputs' variance.
        assert error(g_N, y_ND, found) <= 1.001 * error(g_N, y_ND, wanted)
        np.testing.assert_allclose(found, wanted, atol=2e-2)


def test_a_higher_rank_errs_less_and_none_beats_the_best_of_its_rank() -> None:
    seen, routing, x_ND, y_NKD = observations(7, 500)
    g_N, y_ND = weighed(routing, y_NKD, 2)
    mean = error(g_N, y_ND, answers(novices.mean_novices(seen, (2,)), x_ND, 0, 1))
    errors = [
        error(g_N, y_ND, answers(novices.affine_novices(seen, (2,), rank), x_ND, 0, 1))
        for rank in range(1, D + 1)
    ]
    assert mean > errors[0] and all(a > b for a, b in zip(errors, errors[1:], strict=False))
    # Of rank r the least error is that of the truncated fit in the weighted coordinates.
    centred = lambda a: a - np.average(a, axis=0, weights=g_N**2)  # noqa: E731
    x, y = (g_N[:, None] * centred(a) for a in (x_ND, y_ND))
    fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    values = np.linalg.svd(fitted, compute_uv=False)
    for rank, found in enumerate(errors, 1):
        least = np.sum((y - fitted) ** 2) + np.sum(values[rank:] ** 2)
        assert found == pytest.approx(least, rel=1e-3)


def test_an_expert_of_few_tokens_keeps_its_mean() -> None:
    seen, *_, x_ND, _ = observations(1, 20)
    affine, mean = novices.affine_novices(seen, (0, 1), 2), novices.mean_novices(seen, (0, 1))
    gates = np.random.default_rng(0).uniform(size=(20, 2)).astype(np.float32)
    np.testing.assert_allclose(affine(x_ND, gates), mean(x_ND, gates), rtol=1e-5)


def test_several_novices_add_up_and_tokens_of_any_shape_are_read() -> None:
    seen, _, x_ND, _ = observations(3, 320)
    made = novices.affine_novices(seen, (0, 2, 3), 2)
    gates = np.random.default_rng(0).uniform(size=(320, 3)).astype(np.float32)
    parts = sum(gates[:, r : r + 1] * answers(made, x_ND, r, 3) for r in range(3))
    np.testing.assert_allclose(made(x_ND, gates), parts, rtol=1e-4, atol=1e-4)
    rows = made(x_ND.reshape(4, 80, D), gates)
    np.testing.assert_array_equal(rows, made(x_ND, gates))


def test_names_of_novices() -> None:
    assert novices.by_name("mean").moments is False
    kind = novices.by_name("affine:3")
    assert kind.moments and kind.size(10) == 10 * 7
    for name in ("affine", "affine:0", "affine:-1", "affine:x", "maps", ""):
        with pytest.raises(UserError, match="must be mean, or affine:r"):
            novices.by_name(name)
    seen, *_ = observations(0, 50)
    with pytest.raises(UserError, match="tokens have 5 features"):
        novices.by_name("affine:6").make(seen, (0,))


def test_sums_have_the_names_of_their_axes() -> None:
    seen, *_ = observations(0, 60)
    assert isinstance(seen.usage, Usage) and isinstance(seen.moments, Moments)
    assert seen.moments.inputs_EDD.shape == (E, D, D) == seen.moments.both_EDD.shape
