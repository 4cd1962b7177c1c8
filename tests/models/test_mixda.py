"""MixDA: two stages on a frozen decoder, what each trains, and whom imitation teaches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.models.language.model import LanguageConfig
from moezoo.models.mixda.model import MixDAConfig
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.nn.upcycle import carry_over
from tests.models.tiny import filled

DECODER = DecoderConfig(vocabulary=20, width=8, depth=3, heads=2, groups=1, hidden=6, length=16)
TASK = MixDAConfig(
    decoder=DECODER, layers=(0, 2), domains=(1, 0, 2), bottleneck=3, gate_hidden=5, reduction=4
)
DOMAIN = replace(TASK, stage="domain")
TEXT = {"lm": 20}
SIZE = (1, 16)


def parts_of(config: Any) -> module.ModuleParts:
    return filled(lambda: config.build(TEXT, SIZE, nnx.Rngs(0)))


def rows(task: int) -> dict[str, jax.Array]:
    """Two rows of six tokens of one task, the last one padding."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 6)), jnp.int32)
    segments = jnp.ones((2, 6), jnp.int32).at[:, -1].set(0)
    positions = jnp.tile(jnp.arange(6, dtype=jnp.int32), (2, 1))
    task_BT = jnp.full((2, 6), task, jnp.int32)
    return {"tokens": tokens, "segments": segments, "positions": positions, "task": task_BT}


def imitation_and_gradient(parts: module.ModuleParts, task: int) -> tuple[float, dict]:
    def loss(params: Any) -> Any:
        model = module.merge(parts.definition, params, parts.stats)
        return model.read(rows(task), key=jax.random.key(0), train=True).losses["imitation"]

    value, grads = jax.value_and_grad(loss)(parts.params)
    return float(value), module.flatten(grads)


def test_stages_train_what_is_theirs() -> None:
    first, second = (module.split(c.build(TEXT, SIZE, nnx.Rngs(0))) for c in (DOMAIN, TASK))
    assert all("/adapters/" in path for path in module.flatten(first.params))
    trained = set(module.flatten(second.params))
    assert all("/decide/" in path or "/mlp/adapter/" in path for path in trained)
    base = parts_of(LanguageConfig(decoder=DECODER))
    learned = module.flatten(base.params)
    begun = carry_over(learned, first.stats)
    assert not begun.unused and not begun.fresh
    # The second stage takes over the first one's adapters, frozen now.
    whole = parts_of(DOMAIN)
    taken = carry_over(module.flatten(whole.params) | module.flatten(whole.stats), second.stats)
    assert not taken.unused and not taken.fresh


def test_general_text_passes_through_the_network_alone_and_teaches_by_imitation() -> None:
    parts = parts_of(DOMAIN)
    base = parts_of(LanguageConfig(decoder=DECODER))
    stats = carry_over(module.flatten(base.params), parts.stats).params
    parts = parts._replace(stats=stats)
    model = module.merge(*parts)
    dense = module.merge(*base)
    for task, same in ((1, True), (7, True), (0, False)):  # 7: a task that the table lacks
        y = model.read(rows(task), train=False).predictions["lm"].x_BTD
        wanted = dense.read(rows(task), train=False).predictions["lm"].x_BTD
        assert np.allclose(y, wanted, rtol=1e-4, atol=1e-5) == same
    value, grads = imitation_and_gradient(parts, 1)
    assert value > 0 and all(np.abs(g).max() > 0 for g in grads.values())
    value, grads = imitation_and_gradient(parts, 2)
    assert value == 0 and not any(np.abs(g).max() > 0 for g in grads.values())
    assert not model.read(rows(1), train=False).losses


def test_a_domains_text_teaches_its_own_adapter_only() -> None:
    parts = parts_of(replace(DOMAIN, imitation=0.0))

    def loss(params: Any) -> Any:
        model = module.merge(parts.definition, params, parts.stats)
        return jnp.sum(model.read(rows(2), key=None, train=True).predictions["lm"].x_BTD ** 2)

    for path, grad in module.flatten(jax.grad(loss)(parts.params)).items():
        assert not np.abs(grad[0]).max() > 0 and np.abs(grad[1]).max() > 0, path


def test_what_follows_changes_nothing_before_and_shares_add_up() -> None:
    model = module.merge(*parts_of(TASK))
    tokens = rows(0)["tokens"]
    context = Context(0)
    y = model.features(tokens, context).x_BTD
    for record in context.records.values():
        np.testing.assert_allclose(record.routing.weights_NK.sum(-1), 1, rtol=1e-5)
    assert len(context.records) == 2
    other = model.features(tokens.at[:, -1].set(3), Context(0)).x_BTD
    np.testing.assert_allclose(other[:, :-1], y[:, :-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": (3,)}, "from 0 to 2"),
        ({"layers": ()}, "name different layers"),
        ({"domains": (0, 0)}, "there must be one"),
        ({"domains": (1, 3)}, "without a gap"),
        ({"reduction": 9}, "more than the width 8"),
        ({"decoder": replace(DECODER, layers="scanned")}, "unrolled"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(TASK, **changes)
