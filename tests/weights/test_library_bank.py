"""Members on the layers of a decoder: merged, routed, and served row by row, against plain sums."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.context import NO_TASK, Context
from moezoo.nn.injection import fold
from moezoo.nn.layers import Linear
from moezoo.weights.library import Library
from moezoo.weights.library_bank import (
    attach_bank,
    attach_merged,
    check_base,
    prototype_routers,
    shares_routers,
)
from moezoo.weights.working_set import WorkingSet
from tests.weights.libraries import decoder, library, sha

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TOKENS = np.random.default_rng(0).integers(0, 20, (3, 5)).astype(np.int32)
SHARES = {"a0": 0.75, "a1": -0.25, "a2": 0.5}


def features(model: Any, context: Context = NO_TASK) -> np.ndarray:
    return np.asarray(model.features(jnp.asarray(TOKENS), context).x_BTD)


def by_hand(held: Library, shares: Mapping[str, float], combination: str) -> Any:
    """The decoder with W + s (sum of what the combination's definition says)."""
    model = decoder()
    factors = {name: held.factors(name) for name in shares}
    for path, form in held.layers.items():
        a, b, s = (
            {n: getattr(f[path], k) for n, f in factors.items()} for k in ("down", "up", "scale")
        )
        if combination == "outputs":
            delta = sum(w * a[n] @ b[n] for n, w in shares.items())
        else:
            ones = dict.fromkeys(shares, 1.0)
            ups = shares if combination == "factors" else ones
            delta = sum(w * a[n] for n, w in shares.items()) @ sum(w * b[n] for n, w in ups.items())
        kernel = surgery.get(model, path).kernel
        kernel.set_value(kernel.get_value() + form.scale * delta)
    return model


@pytest.mark.parametrize("combination", ["outputs", "factors", "downs"])
def test_static_routing_is_the_sum_merged_and_routed(tmp_path: Path, combination: str) -> None:
    held = library(tmp_path / "lib")
    wanted = features(by_hand(held, SHARES, combination))
    merged = decoder()
    attach_merged(merged, held, SHARES, combination)
    np.testing.assert_allclose(features(merged), wanted, **CLOSE)
    fold(merged)
    assert all(isinstance(m, Linear) for m in surgery.find(merged, Linear).values())
    np.testing.assert_allclose(features(merged), wanted, **CLOSE)
    bank = decoder()
    attach_bank(bank, held, held.names, shares_routers(held.names), combination)
    rows = np.stack([list(SHARES.values()), [0, 1, 0], [0, 0, 0]])
    given = features(bank, Context(attributes_RA=jnp.asarray(rows, jnp.float32)))
    np.testing.assert_allclose(given[0], wanted[0], **CLOSE)
    np.testing.assert_allclose(given[2], features(decoder())[2], **CLOSE)
    if combination != "downs":
        alone = features(by_hand(held, {"a1": 1.0}, combination))
        np.testing.assert_allclose(given[1], alone[1], **CLOSE)
    with pytest.raises(UserError, match="2 shares for 3 adapters"):
        features(bank, Context(attributes_RA=jnp.ones((3, 2))))


def test_arrow_is_the_definition_token_by_token(tmp_path: Path) -> None:
    held = library(tmp_path / "lib")
    model = decoder()
    attach_bank(model, held, held.names, prototype_routers(held, held.names, 2))
    layer = surgery.get(model, "layers/0/attn/q")
    x_ND = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    x_ND[3] = 0  # resembles nobody: all have the same score
    y_NO, record = layer.update(jnp.asarray(x_ND))
    factors = [held.factors(n)["layers/0/attn/q"] for n in held.names]
    prototypes = [held.prototypes(n)["layers/0/attn/q"] for n in held.names]
    for n, x in enumerate(x_ND[:3]):
        scores = np.array([abs(x @ p) for p in prototypes])
        best = np.argsort(-scores)[:2]
        weights = np.exp(scores[best]) / np.exp(scores[best]).sum()
        wanted = sum(
            w * 0.5 * (x @ factors[e].down) @ factors[e].up
            for e, w in zip(best, weights, strict=True)
        )
        np.testing.assert_allclose(y_NO[n], wanted, **CLOSE)
    np.testing.assert_allclose(record.routing.weights_NK[3], [1 / 3] * 3, rtol=1e-6)
    with pytest.raises(UserError, match="Cannot choose 4 of 3"):
        prototype_routers(held, held.names, 4)("layers/0/attn/q")


def test_every_row_has_its_own_adapter(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 4)
    model = decoder()
    working = WorkingSet(model, held, resident=2, kept=1)
    wanted = {name: features(by_hand(held, {name: 1.0}, "outputs")) for name in held.names}
    wanted |= {"": features(decoder())}
    for names in (["a0", None, "a1"], ["a1", "a1", "a3"], ["a2", "a3", None], ["a0", "a0", "a0"]):
        slots = working.slots(names)
        served = module.merge(*working.parts)
        given = features(served, Context(slots))
        for row, name in enumerate(names):
            np.testing.assert_allclose(given[row], wanted[name or ""][row], **CLOSE)
    assert len(working.members) == 2 and working.members[-1] == "a0"
    assert working.most_bytes == 4 * held.bytes_of_member()
    read = working.read
    with pytest.raises(UserError, match="asks for 3 different adapters, but 2"):
        working.slots(["a0", "a1", "a2"])
    with pytest.raises(UserError, match="member of the library"):
        working.slots(["a1", "a9"])
    assert working.read == read  # nothing was loaded for a batch that cannot be served


def test_another_base_is_refused(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    check_base(held, decoder(), "tiny", sha(decoder()))
    with pytest.raises(UserError, match="were trained on tiny, whose arrays are others"):
        check_base(held, decoder(1), "other", sha(decoder(1)))
    model = decoder()
    del model.layers[0].attn.q
    with pytest.raises(UserError, match="which other has not"):
        check_base(held, model, "other", sha(decoder()))
