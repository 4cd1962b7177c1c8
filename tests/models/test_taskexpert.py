"""Memorial-MoE and MLoRE: tasks by themselves, switches, training, what a path still needs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.deploy import task_path
from moezoo.domains.images.export import photos
from moezoo.errors import UserError
from moezoo.models.mlore.model import MLoREConfig
from moezoo.models.taskexpert.model import TaskExpertConfig
from moezoo.nn import module
from moezoo.ops import balance
from moezoo.train import step
from tests.models import tiny

SIZES: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2, "patch": 4, "levels": 2}
SIZES |= {"decoder_width": 8}
MEMORIAL = TaskExpertConfig(**SIZES, experts=3, gate_hidden=4)
MLORE = MLoREConfig(**SIZES, ranks=(1, 2, 3, 4), task_rank=2, top_k=2)
BOTH = {"memorial": MEMORIAL, "mlore": MLORE}


def memorial(**changes: Any) -> TaskExpertConfig:
    return TaskExpertConfig(**(SIZES | {"experts": 3, "gate_hidden": 4} | changes))


@pytest.fixture(scope="module", params=list(BOTH))
def parts(request) -> module.ModuleParts:
    return tiny.parts_of(BOTH[request.param])


@pytest.mark.slow
def test_a_task_alone_is_what_it_is_among_others(parts):
    together = tiny.call(parts).predictions
    assert {t: p.shape for t, p in together.items()} == {
        task: (tiny.BATCH, *tiny.SIZE, n) for task, n in tiny.TASKS.items()
    }
    for task in tiny.TASKS:
        alone = tiny.call(parts, tasks=(task,)).predictions
        assert list(alone) == [task]
        np.testing.assert_allclose(alone[task], together[task], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_images_do_not_see_each_other(parts):
    image = tiny.image()
    whole = tiny.call(parts).predictions["depth"]
    other = tiny.call(parts, image.at[1:].multiply(3.0)).predictions["depth"]
    np.testing.assert_allclose(other[0], whole[0], rtol=1e-5, atol=1e-5)
    assert not np.allclose(other[1], whole[1], atol=1e-3)


@pytest.mark.slow
def test_training_updates_statistics_and_every_parameter_gets_a_gradient(parts):
    image = tiny.image()

    def run(params, stats, key):
        model = module.merge(parts.definition, params, stats)
        output = model(image, key=key, train=True)
        loss = sum(jnp.mean(jnp.sin(3 * p) * p) for p in output.predictions.values())
        return loss + step.balance_loss(output.records, 2, balance.importance_loss), (
            module.updated_stats(model)
        )

    gradient = tiny.quick_jit(jax.grad(run, has_aux=True))
    gradients, stats = gradient(parts.params, parts.stats, jax.random.key(0))
    flat = module.flatten(gradients)
    # Biases in front of a batch norm are taken out again.
    silent = {n for n, g in flat.items() if float(jnp.abs(g).max()) < 1e-7}
    assert all(name.endswith("bias") for name in silent), silent
    before, after = module.flatten(parts.stats), module.flatten(stats)
    assert before.keys() == after.keys()
    assert all(not np.allclose(before[n], after[n]) for n in before)


def test_records_name_the_tasks_of_their_rows(parts):
    output = tiny.call(parts)
    for name, record in output.records.items():
        assert record.task_N.tolist() == [0, 1] * tiny.BATCH, name
        assert float(record.routing.weights_NK.sum(1).max()) <= 1.0 + 1e-5
    only = tiny.call(parts, tasks=("depth",)).records
    assert all(r.task_N.tolist() == [1] * tiny.BATCH for r in only.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "rows", "mixed"),
    [
        ({"gate": "token", "top_k": 2}, 8, 4),
        ({"gate": "static", "memory_update": "ema", "memory_decay": 0.25}, 1, 4),
        ({"memory": "none", "share_experts": True}, 1, 3),
        ({"memory_init": "zeros", "class_token": False}, 1, 4),
    ],
)
def test_every_switch_of_the_reconstruction(changes, rows, mixed):
    config = memorial(**changes)
    parts = tiny.parts_of(config)
    output = tiny.call(parts)
    for record in output.records.values():
        assert record.routing.probs_NE.shape == (2 * tiny.BATCH * rows, mixed)
        assert record.routing.experts_NK.shape[1] == config.chosen
        np.testing.assert_allclose(record.routing.weights_NK.sum(1), 1.0, rtol=1e-5)
    names = module.flatten(parts.params)
    assert any("read" in n for n in names) == (config.memory == "expert")
    assert any(n.startswith("start/") for n in names) == (
        config.memory == "expert" and config.memory_init == "learned"
    )
    assert any(n.startswith("experts/1/") for n in names) == (not config.share_experts)
    if config.gate == "static":
        weights = output.records["decoder/0"].routing.weights_NK
        np.testing.assert_array_equal(weights[::2], weights[:1].repeat(tiny.BATCH, 0))


@pytest.mark.slow
def test_updates_of_the_memory_by_hand():
    model = module.merge(*tiny.parts_of(memorial(memory_update="ema", memory_decay=0.25)))
    plain = module.merge(*tiny.parts_of(memorial(memory_update="replace")))
    x_BHWC = jax.random.normal(jax.random.key(1), (2, 2, 4, 8))
    memory = {"depth": jax.random.normal(jax.random.key(2), (2, 2, 4, 8))}
    averaged = model.assemble(0, x_BHWC, memory)["depth"].memory_BHWD
    replaced = plain.assemble(0, x_BHWC, memory)["depth"].memory_BHWD
    wanted = 0.25 * memory["depth"] + 0.75 * replaced
    np.testing.assert_allclose(averaged, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BOTH))
def test_a_path_needs_nothing_of_the_other_tasks(name):
    parts = tiny.parts_of(BOTH[name])
    model = module.merge(*parts)
    path = task_path.task_path(model, "depth", photos(tiny.SIZE))
    assert not [n for n in path.weights if "semseg" in n]
    everything = module.flatten(parts.params) | module.flatten(parts.stats)
    unread = set(everything) - set(path.weights)
    assert unread and all("semseg" in n for n in unread), "and of what is shared everything"
    image = np.asarray(tiny.image())
    wanted = np.asarray(tiny.call(parts).predictions["depth"])
    found, size = path(image), np.abs(wanted).max()
    np.testing.assert_allclose(found.logits / size, wanted / size, rtol=1e-4, atol=1e-5)
    assert path.exact and not found.violations_B.any()


def test_the_published_balance_loss_of_mlore_is_that_of_all_tasks_together():
    parts = tiny.parts_of(MLORE)
    output, model = tiny.call(parts), module.merge(*parts)
    found = step.balance_loss(output.records, 2, model.balance_losses["importance"])
    wanted = 0.0
    for record in output.records.values():
        weights = np.zeros((2 * tiny.BATCH, 4))
        rows = np.arange(len(weights))[:, None]
        weights[rows, record.routing.experts_NK] = record.routing.weights_NK
        mean = weights.mean(0)
        wanted += (mean.std(ddof=1) / mean.mean()) ** 2
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: memorial(levels=3), "levels is 3"),
        (lambda: memorial(experts=0), "experts"),
        (lambda: memorial(top_k=5), "top_k is 5"),
        (lambda: memorial(gate="images"), "did you mean image"),
        (lambda: memorial(memory="some"), "memory"),
        (lambda: memorial(memory_decay=2.0), "memory_decay is 2.0"),
        (lambda: memorial(decoder_width=0), "decoder_width is 0"),
        (lambda: MLoREConfig(**SIZES, ranks=()), "ranks is"),
        (lambda: MLoREConfig(**SIZES, ranks=(1, 0), top_k=1), r"ranks\[1\] is 0"),
        (lambda: MLoREConfig(**SIZES, ranks=(1, 2), top_k=3), "top_k is 3"),
        (lambda: MLoREConfig(**(SIZES | {"decoder_width": 3})), "decoder_width is 3"),
        (lambda: MEMORIAL.build({}, tiny.SIZE, nnx.Rngs(0)), "at least one task"),
        (lambda: MEMORIAL.build({"depth": 0}, tiny.SIZE, nnx.Rngs(0)), "depth has 0 channels"),
        (lambda: MEMORIAL.build({"depth": 1}, (9, 16), nnx.Rngs(0)), "9"),
    ],
)
def test_impossible_choices_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.slow
def test_mlore_reads_one_grid_only():
    parts = tiny.parts_of(MLORE)
    with pytest.raises(UserError, match="8x16 pixels only"):
        module.merge(*parts)(tiny.image((16, 16)))
