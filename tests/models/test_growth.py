"""A further task: old tasks unchanged bit for bit, only what is new is trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.models.shared.growth import Grown, add_task
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.train.optim import only
from tests.models import tiny
from tests.models.test_mod_squad import ATTENTION, MLP, config
from tests.models.tiny import SIZE, TASKS, call, image, quick_jit

NEW, MORE = "normals", 3


def whole(parts: module.ModuleParts) -> Any:
    return module.merge(*parts)


@pytest.fixture(scope="module")
def before() -> module.ModuleParts:
    return tiny.parts_of(config())


@pytest.fixture(scope="module")
def grown(before: module.ModuleParts) -> Grown:
    return add_task(whole(before), NEW, 3, experts=MORE, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def trained(grown: Grown) -> module.ModuleParts:
    """After three steps of AdamW with decay and clipping on the new task alone."""
    parts = module.split(grown.model)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    optimiser = only(adamw, grown.free)

    def loss(params, stats):
        model = module.merge(parts.definition, params, stats)
        output = model(image(), tasks=(NEW,), train=True)
        target = jnp.cos(image())
        return jnp.mean((output.predictions[NEW] - target) ** 2), module.updated_stats(model)

    @quick_jit
    def update(params, stats, state):
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, stats)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, value

    params, stats, state = parts.params, parts.stats, optimiser.init(parts.params)
    values = []
    for _ in range(3):
        params, stats, state, value = update(params, stats, state)
        values.append(float(value))
    assert values[-1] < values[0]
    return module.ModuleParts(parts.definition, params, stats)


@pytest.mark.slow
def test_old_tasks_keep_their_bits(before, grown, trained) -> None:
    for task in TASKS:
        expected = call(before, tasks=(task,)).predictions[task]
        for larger in (module.split(grown.model), trained):
            found = call(larger, tasks=(task,))
            np.testing.assert_array_equal(found.predictions[task], expected)


@pytest.mark.slow
def test_old_tasks_do_not_reach_new_experts(before, grown) -> None:
    parts = module.split(grown.model)
    old = call(before, tasks=("depth",)).records
    for path, record in call(parts, tasks=("depth",)).records.items():
        experts = old[path].routing.logits_NE.shape[1]
        assert record.routing.probs_NE.shape[1] == experts + MORE
        assert not np.any(record.routing.probs_NE[:, experts:])
        np.testing.assert_array_equal(record.routing.experts_NK, old[path].routing.experts_NK)


@pytest.mark.slow
def test_only_what_is_new_has_moved(grown, trained) -> None:
    first = module.flatten(module.split(grown.model).params)
    moved = {p for p, a in module.flatten(trained.params).items() if np.any(a != first[p])}
    assert all(
        path.startswith(f"heads/{NEW}") or "router/new" in path or "experts" in path
        or path == "task_bias/bias"
        for path in moved
    )  # fmt: skip
    assert {"task_bias/bias", f"{ATTENTION}/router/new/kernel", f"{MLP}/router/new/kernel"} <= moved
    for path, free in module.flatten(grown.free).items():
        old = np.broadcast_to(~np.asarray(free), first[path].shape)
        here = np.asarray(module.flatten(trained.params)[path])
        np.testing.assert_array_equal(here[old], np.asarray(first[path])[old], err_msg=path)
    stack = f"{ATTENTION}/experts/query/kernel"
    assert np.any(np.asarray(module.flatten(trained.params)[stack] != first[stack])[4:])


@pytest.mark.slow
def test_all_tasks_in_one_batch(grown) -> None:
    parts = module.split(grown.model)
    together = call(parts)
    assert set(together.predictions) == {*TASKS, NEW}
    for task in (*TASKS, NEW):
        alone = call(parts, tasks=(task,)).predictions[task]
        np.testing.assert_allclose(together.predictions[task], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_second_task_and_the_paths_of_all(grown) -> None:
    twice = add_task(grown.model, "edge", 1, rngs=nnx.Rngs(2)).model
    assert twice.tasks == (*TASKS, NEW, "edge")
    router = twice.blocks[1].mlp.router
    x_ND = jax.random.normal(jax.random.key(0), (6, 8))
    for task in range(4):
        routing = router(x_ND, Context(task))
        alone = router.of_task(task)(x_ND, Context(0))
        np.testing.assert_array_equal(routing.experts_NK, alone.experts_NK)
        np.testing.assert_array_equal(routing.weights_NK, alone.weights_NK)


@pytest.mark.slow
def test_what_cannot_grow_is_refused(before, grown) -> None:
    model = whole(before)
    with pytest.raises(UserError, match="has a task depth already"):
        add_task(model, "depth", 1, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="0 channels"):
        add_task(model, "edge", 0, rngs=nnx.Rngs(0))
    single = tiny.config(routing="single").build(TASKS, SIZE, nnx.Rngs(0))
    with pytest.raises(UserError, match="LinearRouter"):
        add_task(single, "edge", 1, rngs=nnx.Rngs(0))
    mixed = ModSquadConfig(width=8, depth=2, heads=2, head_experts=2, experts=2, top_k=1, patch=8,
                           head_channels=4, tam=(0,))  # fmt: skip
    with pytest.raises(UserError, match="TAM"):
        add_task(mixed.build(TASKS, (16, 16), nnx.Rngs(0)), "edge", 1, rngs=nnx.Rngs(0))
