"""Soft-MoA's models: published sizes, what trains, tasks and padding, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.ast import SPECIAL, ASTConfig, token_mask
from moezoo.deploy.specialise import specialise
from moezoo.deploy.task_path import task_path
from moezoo.domains.audio.export import spectrograms
from moezoo.errors import UserError
from moezoo.models.soft_moa.model import SoftMoAConfig, slot_maps
from moezoo.nn import module, surgery
from moezoo.nn.adapter_mixtures import DenseAdapters
from moezoo.nn.adapters import Bottleneck
from moezoo.nn.upcycle import carry_over
from moezoo.train import placement
from moezoo.train.evaluate import usage_by_task
from moezoo.train.mesh import make_mesh
from moezoo.train.schema import MeshConfig
from tests.models.tiny import filled, quick_jit

TASKS = {"event": 5, "room": 3}
FRAMES, MEL = 24, 12
SIZE = (FRAMES, MEL)
TINY = ASTConfig(
    frames=32, mel=MEL, patch=6, stride_time=4, stride_freq=3, width=8, depth=2, heads=2, hidden=12
)
SMALL = SoftMoAConfig(ast=TINY, experts=4, bottleneck=3, kernel=3)
AUDIO = jax.random.normal(jax.random.key(3), (4, FRAMES, MEL))
LENGTHS = jnp.asarray([FRAMES, 9, 24, 13])


def built(config: SoftMoAConfig, tasks: dict[str, int] = TASKS) -> module.ModuleParts:
    return filled(lambda: config.build(tasks, SIZE, nnx.Rngs(0)))


def passed(parts: module.ModuleParts, **options: Any) -> Any:
    def forward(params, stats, audio):
        return module.merge(parts.definition, params, stats)(audio, **options)

    return quick_jit(forward)(parts.params, parts.stats, AUDIO)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, 923_640),
        ({"update": "dense_moa"}, 923_724),
        ({"experts": 14}, 1_827_312),
        ({"experts": 15}, 1_956_408),
        ({"place": "both"}, 1_845_744),
        ({"place": "both", "update": "dense_moa"}, 1_845_912),
        ({"update": "adapter", "bottleneck": 12}, 250_512),
        ({"update": "adapter", "bottleneck": 8}, 176_736),
        ({"update": "adapter", "bottleneck": 6}, 139_848),
        ({"update": "adapter", "bottleneck": 8, "module": "conformer"}, 272_256),
    ],
)
def test_sizes_of_the_papers(changes: dict, trained: int) -> None:
    """Trained parameters besides the head, from shapes."""
    config, classes = SoftMoAConfig(**changes), 50
    parts = module.abstract(lambda: config.build({"event": classes}, (500, 128), nnx.Rngs(0)))
    d, b, n, p = 768, config.bottleneck, config.experts, config.slots
    assert module.count(parts.params) == trained + (d + 1) * classes
    sites = 12 * (2 if config.place == "both" else 1)
    router = d * n * p if config.update == "soft_moa" else (d + 1) * n
    if config.update != "adapter":
        assert trained == sites * (n * (2 * d * b + b + d) + router + 2 * d) + 2 * d


def test_published_checkpoints_have_so_many_tokens() -> None:
    assert [ASTConfig().tokens(f) for f in (1024, 500, 400, 100, 800)] == [1214, 590, 470, 110, 950]


def paths_of(**changes: Any) -> set[str]:
    config = replace(SMALL, sharing="one", **changes)
    parts = module.abstract(lambda: config.build(TASKS, SIZE, nnx.Rngs(0)))
    return set(module.flatten(parts.params))


def test_what_trains() -> None:
    head = paths_of(update="linear")
    assert head == {"norm/scale", "norm/bias"} | {
        f"heads/{task}/{part}" for task in TASKS for part in ("kernel", "bias")
    }
    norms = {f"blocks/{i}/norm1/{part}" for i in range(2) for part in ("scale", "bias")}
    soft = paths_of()
    assert soft >= head | norms
    assert all("/attn/adapter/" in path for path in soft - head - norms)
    behind = {path.replace("norm1", "norm2") for path in norms}
    both = paths_of(place="both")
    assert both >= norms | behind and {p for p in both if "/mlp/adapter/" in p}
    lora = paths_of(update="lora") - head
    assert lora == {
        f"blocks/{i}/attn/{name}/update/{part}"
        for i in range(2)
        for name in "qv"
        for part in ("down", "up")
    }
    everything = paths_of(update="full")
    biases = {path for path in everything if path.endswith("/bias")}
    assert paths_of(update="bitfit") == head | biases
    parts = module.abstract(lambda: replace(SMALL, update="full").build(TASKS, SIZE, nnx.Rngs(0)))
    assert not parts.stats and "pos_embed" in everything


@pytest.mark.slow
def test_a_fresh_adapter_changes_nothing_and_begins_with_a_run() -> None:
    """Every update on a base of all parameters: at first it computes what the base does."""
    base = built(replace(SMALL, update="full", sharing="one"))
    wanted = passed(base)
    learned = module.flatten(base.params)
    for changes in ({}, {"update": "adapter", "module": "conformer"}, {"update": "lora"}):
        config = replace(SMALL, **changes)
        fresh = module.create(lambda config=config: config.build(TASKS, SIZE, nnx.Rngs(1)))
        groups = [carry_over(learned, tree) for tree in (fresh.params, fresh.stats)]
        assert not set(groups[0].unused) & set(groups[1].unused)
        left = [path for group in groups for path in group.fresh]
        assert all("/adapter/" in path or "/update/" in path for path in left), left
        begun = fresh._replace(params=groups[0].params, stats=groups[1].params)
        found = passed(begun)
        for task in TASKS:
            close(found.predictions[task], wanted.predictions[task])


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def separate() -> module.ModuleParts:
    return built(SMALL)


@pytest.mark.slow
def test_tasks_with_adapters_of_their_own(separate: module.ModuleParts) -> None:
    """All together, one alone, and what is cut out for it, are the same numbers."""
    together = passed(separate, frames_B=LENGTHS)
    assert {t: p.shape for t, p in together.predictions.items()} == {
        "event": (4, 5),
        "room": (4, 3),
    }
    (record, *_) = together.records.values()
    tokens = TINY.tokens(FRAMES)
    counts = np.bincount(np.asarray(record.task_N))
    np.testing.assert_array_equal(counts, [4 * tokens] * 2)
    model = module.merge(*separate)
    for number, task in enumerate(TASKS):
        alone = passed(separate, frames_B=LENGTHS, tasks=(task,))
        close(alone.predictions[task], together.predictions[task])
        own = passed(module.split(specialise(model, number).model), frames_B=LENGTHS, tasks=(task,))
        np.testing.assert_array_equal(own.predictions[task], alone.predictions[task])
    changed = jax.tree.map(lambda a: a, separate.params)
    flat = {p: a + 1.0 if "/of/event/" in p else a for p, a in module.flatten(changed).items()}
    other = passed(separate._replace(params=module.unflatten(flat)), frames_B=LENGTHS)
    np.testing.assert_array_equal(other.predictions["room"], together.predictions["room"])
    assert (other.predictions["event"] != together.predictions["event"]).any()


def test_the_path_of_a_task_holds_nothing_of_the_others(separate: module.ModuleParts) -> None:
    path = task_path(module.merge(*separate), "room", spectrograms(SIZE, 8_000, "average"))
    assert not any("event" in name for name in path.weights)
    assert any("attn/adapter/experts" in name for name in path.weights)
    wanted = passed(separate, tasks=("room",)).predictions["room"]
    close(path(AUDIO).logits, wanted)


@pytest.mark.slow
def test_gates_by_task_fold_to_one_adapter() -> None:
    config = replace(SMALL, update="dense_moa", gates="task", sharing="one")
    parts = built(config)
    together = passed(parts)
    own = specialise(module.merge(*parts), 1).model
    assert not surgery.find(own, DenseAdapters)
    adapters = surgery.find(own, Bottleneck)
    assert {a.fc1.kernel.shape for a in adapters.values()} == {(8, 4 * 3)}
    found = passed(module.split(own), tasks=("room",))
    close(found.predictions["room"], together.predictions["room"])
    usage = [usage_by_task(r, 2) for r in together.records.values()]
    assert all((np.ptp(u, axis=1) > 0).all() for u in usage)


@pytest.mark.slow
@pytest.mark.parametrize("update", ["soft_moa", "dense_moa"])
def test_padding_has_no_part(update: str) -> None:
    """Patches behind the last frame give and get nothing, and what tokens get adds up to 1."""
    parts = built(replace(SMALL, update=update, sharing="one"))
    output = passed(parts, frames_B=LENGTHS)
    mask_BT = token_mask(TINY, FRAMES, LENGTHS)
    real = [SPECIAL + 3 * n for n in (5, 3, 5, 4)]  # patches at frames 0, 4, 8, 12, 16
    np.testing.assert_array_equal(mask_BT.sum(1), real)
    for record in output.records.values():
        weights_BTE = np.asarray(record.routing.weights_NK).reshape(4, -1, SMALL.experts)
        np.testing.assert_allclose(weights_BTE.sum(-1), mask_BT, atol=1e-6)
        used = usage_by_task(record, 1)
        np.testing.assert_allclose(used.sum(), mask_BT.sum(), rtol=1e-5)
    maps = slot_maps(output, TINY, FRAMES)
    assert len(maps) == (2 if update == "soft_moa" else 0)
    for dispatch, combine in maps.values():
        assert dispatch.shape == combine.shape == (4, SMALL.experts, 1, 3, 5)
        assert not dispatch[1, ..., 3:].any() and dispatch[1, ..., :3].all()
    seen = passed(
        built(replace(SMALL, update=update, sharing="one", padding="seen")), frames_B=LENGTHS
    )
    assert all(r.routing.mask_N.all() for r in seen.records.values())
    assert (seen.predictions["event"][1] != output.predictions["event"][1]).any()
    close(seen.predictions["event"][0], output.predictions["event"][0])


@pytest.mark.slow
@pytest.mark.parametrize("update", ["soft_moa", "dense_moa"])
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 1, 2), (2, 1, 4), (1, 2, 2)])
def test_every_mesh_gives_the_same(update: str, sizes: tuple[int, int, int]) -> None:
    """Loss and gradients with experts and batch over several devices (data, fsdp, expert)."""
    parts = built(replace(SMALL, update=update))

    def loss(params: Any, stats: Any, audio: jax.Array) -> Any:
        output = module.merge(parts.definition, params, stats)(audio, frames_B=LENGTHS, train=True)
        return sum(jnp.sum(jnp.square(p)) for p in output.predictions.values())

    gradient = quick_jit(jax.value_and_grad(loss))
    value, grads = gradient(parts.params, parts.stats, AUDIO)
    axes = dict(zip(("data", "fsdp", "expert"), sizes, strict=True))
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        trees = [jax.device_put(t, placement.shardings(mesh, t)) for t in parts[1:]]
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        many, there = gradient(*trees, jax.device_put(AUDIO, rows))
    np.testing.assert_allclose(many, value, rtol=1e-4)
    here = module.flatten(grads)
    for path, array in module.flatten(there).items():
        np.testing.assert_allclose(array, here[path], rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update": "prompt"}, "prompt"),
        ({"experts": 0}, "experts is 0"),
        ({"bottleneck": 0}, "bottleneck is 0"),
        ({"module": "conformer"}, "take model.module bottleneck"),
        ({"module": "convpass"}, "Slots have no order"),
        ({"targets": ("x",)}, "name some of q, k, v and o"),
        ({"reference_quirks": ("typo",)}, "reference quirk"),
        ({"reference_quirks": ("double_addition",), "place": "mlp"}, "double_addition"),
        ({"update": "dense_moa", "gates": "task"}, "sharing one"),
    ],
)
def test_impossible_choices(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


def test_refusals_when_built() -> None:
    with pytest.raises(UserError, match="9 mel bands"):
        SMALL.build(TASKS, (FRAMES, 9), nnx.Rngs(0))
    with pytest.raises(UserError, match="smaller than a patch"):
        SMALL.build(TASKS, (5, MEL), nnx.Rngs(0))
    with pytest.raises(UserError, match="at least one task"):
        SMALL.build({}, SIZE, nnx.Rngs(0))
    quirks = replace(SMALL, reference_quirks=("zero_init", "fast_init"))
    with pytest.raises(UserError, match="exclude each other"):
        quirks.build(TASKS, SIZE, nnx.Rngs(0))
