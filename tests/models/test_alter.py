"""The reconstruction of ALTER: each adapter learns its task alone, then a gate learns to mix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.models.alter.model import ALTERConfig
from moezoo.models.language.model import LanguageConfig
from moezoo.nn import module
from moezoo.nn.upcycle import carry_over
from tests.models.test_mixda import DECODER, parts_of, rows

GATE = ALTERConfig(decoder=DECODER, layers=(0, 2), tasks=3, bottleneck=4)
ADAPTERS = replace(GATE, stage="adapters")


def features(parts: module.ModuleParts, params: Any, task: int) -> jax.Array:
    model = module.merge(parts.definition, params, parts.stats)
    return model.read(rows(task), train=False).predictions["lm"].x_BTD


def test_a_task_teaches_its_own_adapter_and_another_task_none() -> None:
    parts = parts_of(ADAPTERS)
    assert all("/adapters/" in path for path in module.flatten(parts.params))
    for task in (0, 2, 5):
        grads = jax.grad(lambda p, task=task: jnp.sum(features(parts, p, task) ** 2))(parts.params)
        for path, grad in module.flatten(grads).items():
            moved = {j for j in range(3) if np.abs(grad[j]).max() > 0}
            assert moved == {task} & {0, 1, 2}, path


def test_the_gate_is_told_no_task_and_alone_trains() -> None:
    parts = parts_of(GATE)
    assert all("/decide/" in path for path in module.flatten(parts.params))
    first, second = (features(parts, parts.params, task) for task in (0, 2))
    np.testing.assert_array_equal(first, second)
    grads = jax.grad(lambda p: jnp.sum(features(parts, p, 0) ** 2))(parts.params)
    assert all(np.abs(grad).max() > 0 for grad in module.flatten(grads).values())


def test_stages_take_over_what_was_before() -> None:
    base, first, second = (parts_of(c) for c in (LanguageConfig(decoder=DECODER), ADAPTERS, GATE))
    begun = carry_over(module.flatten(base.params), first.stats)
    assert not begun.unused and not begun.fresh
    taken = carry_over(module.flatten(first.params) | module.flatten(first.stats), second.stats)
    assert not taken.unused and not taken.fresh


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"layers": (4,)}, "from 0 to 2"), ({"tasks": 1}, "nothing to choose")],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(GATE, **changes)
