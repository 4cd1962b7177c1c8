"""MLoRE's published code and the outline of our Memorial-MoE, number by number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.models.mlore.model import MLoRE, MLoREConfig
from moezoo.models.taskexpert.model import TaskExpert, TaskExpertConfig
from moezoo.nn import module
from moezoo.ops.interpolate import resize
from moezoo.ops.routing import dense_weights
from moezoo.weights.mlore_names import POINT, from_mlore
from moezoo.weights.names import CONV, TASKS, NameTable, ParameterName, batch_norm, linear, to_ours
from tests.fixtures import load, text
from tests.models.tiny import quick_jit

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


# The outline from which the fixture was made; its tasks keep their names.
MEMORIAL: NameTable = [
    ParameterName("start/{0}", "memory_init.{0}"),
    *(
        line
        for part in ("proj", "conv", "out")
        for line in linear(
            "experts/{0}/experts/{1}/" + part, "levels.{0}.experts.{1}." + part, CONV
        )
    ),
    *batch_norm("experts/{0}/experts/{1}/norm", "levels.{0}.experts.{1}.bn"),
    *linear("decoder/{0}/{1}/router/fc1", "levels.{0}.gates.{1}.fc1", POINT),
    *linear("decoder/{0}/{1}/router/fc2", "levels.{0}.gates.{1}.fc2", POINT),
    *linear("decoder/{0}/{1}/read", "levels.{0}.read.{1}", CONV),
    *linear("decoder/{0}/{1}/write/conv", "levels.{0}.write.{1}.0", CONV),
    *batch_norm("decoder/{0}/{1}/write/norm", "levels.{0}.write.{1}.1"),
    *linear("heads/{0}/conv", "heads.{0}.0", CONV),
    *batch_norm("heads/{0}/norm", "heads.{0}.1"),
    *linear("heads/{0}/out", "heads.{0}.3", CONV),
]


def weights(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors behind `w_flat`, by the reference's names."""
    found, at = {}, 0
    for name, shape in text(arrays["w_manifest"]):  # type: ignore[union-attr]
        size = int(np.prod(shape))
        found[name] = arrays["w_flat"][at : at + size].reshape(shape)
        at += size
    return found


def filled(build, given: dict[str, np.ndarray]) -> tuple[Any, set[str]]:
    """The model with `given` parameters and statistics, and the names it has besides."""
    parts = module.abstract(build)
    flat = module.flatten(parts.params), module.flatten(parts.stats)
    names = set(flat[0]) | set(flat[1])
    assert set(given) <= names, sorted(set(given) - names)[:5]
    made = []
    for group in flat:
        for name in group.keys() & given.keys():
            assert group[name].shape == given[name].shape, name
        zeros = {n: jnp.zeros(a.shape, a.dtype) for n, a in group.items()}
        made.append({n: jnp.asarray(given.get(n, zeros[n])) for n in group})
    trees = (module.unflatten(group) for group in made)
    return module.ModuleParts(parts.definition, *trees), names - set(given)


def nhwc(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -3, -1)


@pytest.fixture(scope="module")
def memorial() -> tuple[dict[str, np.ndarray], dict[str, int]]:
    arrays = load("taskexpert", "ri_mmoe_NOT_AUTHORS_CODE")
    pairs = zip(arrays["tasks"].tolist(), arrays["num_output"].tolist(), strict=True)
    return arrays, dict(pairs)


@pytest.mark.parametrize("mode", ["image", "token"])
def test_memorial_moe(memorial, mode: str) -> None:
    arrays, tasks = memorial
    width, channels, hidden, experts, height, across = arrays["cfg_C_D_Hd_N_H_W"].tolist()
    levels = sum(key.startswith("x") and key[1:].isdigit() for key in arrays)
    config = TaskExpertConfig(
        width=width, depth=levels, heads=1, levels=levels, decoder_width=channels,
        experts=experts, gate=mode, gate_hidden=hidden,  # type: ignore[arg-type]
    )  # fmt: skip
    size = (16 * height, 16 * across)
    state, unknown = to_ours(weights(arrays), MEMORIAL)
    assert not unknown
    parts, own = filled(lambda: config.build(tasks, size, nnx.Rngs(0)), state)
    assert all(name.split("/")[0] in TRUNK for name in own), "every part of the decoder was given"
    maps = [nhwc(arrays[f"x{level}"]) for level in range(levels)]

    def run(params: Any, stats: Any, maps: list) -> Any:
        model: TaskExpert = module.merge(parts.definition, params, stats)
        features, memory = [], {t: model._first(t, maps[0]) for t in tasks}
        for level, x_BHWC in enumerate(maps):
            features.append(model.assemble(level, x_BHWC, memory))
            memory = {t: feature.memory_BHWD for t, feature in features[-1].items()}
        image = jnp.zeros((maps[0].shape[0], *size, 3))
        together = model.decode(maps, tuple(tasks), False)[0]
        return features, memory, together, model.predict(memory, image, False)

    features, memory, together, predictions = quick_jit(run)(parts.params, parts.stats, maps)
    for level, by_task in enumerate(features):
        for task, theirs in zip(tasks, arrays["tasks"].tolist(), strict=True):
            feature, prefix = by_task[task], f"{mode}/level{level}/"
            gate = nhwc(arrays[f"{prefix}gate_{theirs}"])
            shares = dense_weights(feature.routing, gate.shape[-1]).reshape(gate.shape)
            np.testing.assert_allclose(shares, gate, **CLOSE)
            for ours, name in ((feature.mixed_BHWD, "feat"), (feature.memory_BHWD, "memory")):
                np.testing.assert_allclose(ours, nhwc(arrays[f"{prefix}{name}_{theirs}"]), **CLOSE)
    for task, theirs in zip(tasks, arrays["tasks"].tolist(), strict=True):
        np.testing.assert_array_equal(together[task], memory[task])
        found = np.asarray(predictions[task])
        wanted = nhwc(arrays[f"{mode}/pred_{theirs}"])
        np.testing.assert_allclose(found[:, ::7, ::11], wanted, **CLOSE)
        sums = arrays[f"{mode}/pred_abssum_{theirs}"]
        np.testing.assert_allclose(np.abs(found).sum((1, 2), np.float64), sums, rtol=1e-4)


TRUNK = ("patch_embed", "cls_token", "pos_embed", "blocks", "norm")


@pytest.fixture(scope="module")
def mlore() -> tuple[dict[str, np.ndarray], module.ModuleParts, dict[str, int]]:
    arrays = load("taskexpert", "mlore_tiny")
    height, width, patch, channels, depth, heads, inner, rank, k, after = arrays["cfg"].tolist()
    pairs = zip(arrays["tasks"].tolist(), arrays["num_output"].tolist(), strict=True)
    tasks = {TASKS.get(task, task): n for task, n in pairs}
    config = MLoREConfig(
        width=channels, depth=depth, heads=heads, patch=patch, levels=len(arrays["route1"]),
        decoder_width=inner, ranks=tuple(arrays["rank_list"].tolist()), task_rank=rank, top_k=k,
        selection="top_k_then_softmax" if after else "softmax_then_top_k",
    )  # fmt: skip
    state, unknown = from_mlore(weights(arrays))
    assert not unknown
    parts, own = filled(lambda: config.build(tasks, (height, width), nnx.Rngs(0)), state)
    assert not own
    return arrays, parts, tasks


def test_mlore_router_and_block(mlore) -> None:
    arrays, parts, tasks = mlore
    first = next(iter(tasks))

    def run(params: Any, stats: Any, x_BHWD: jax.Array) -> Any:
        block = module.merge(parts.definition, params, stats).first[0]
        entered = block.tasks[first].enter(x_BHWD)
        features = block.tasks[first].router.features(entered)
        return features, block({first: x_BHWD}, None, False).maps[first]

    features, y_BHWD = quick_jit(run)(parts.params, parts.stats, nhwc(arrays["moe_in"]))
    np.testing.assert_allclose(features, arrays["moe_routefeat"][..., 0, 0], **CLOSE)
    np.testing.assert_allclose(y_BHWD, nhwc(arrays["moe_out"]), **CLOSE)


@pytest.mark.slow
def test_mlore_as_a_whole(mlore) -> None:
    arrays, parts, tasks = mlore

    def run(params: Any, stats: Any, image: jax.Array) -> Any:
        model: MLoRE = module.merge(parts.definition, params, stats)
        maps, records = model.decode(model.levels(image, None), tuple(tasks), None, False)
        return maps, records, model.predict(maps, image, False), model(image)

    image = nhwc(arrays["input"])
    maps, records, predictions, output = quick_jit(run)(parts.params, parts.stats, image)
    routes = arrays["route1"]  # [level, task, B, K]
    for level, by_task in enumerate(routes):
        routing = records[f"first/{level}"].routing
        found = np.asarray(dense_weights(routing, routes.shape[-1]))
        found = found.reshape(-1, *by_task.shape[::2]).swapaxes(0, 1)  # rows are b * J + j
        np.testing.assert_array_equal(found > 0, by_task > 0)
        np.testing.assert_allclose(found, by_task, **CLOSE)
    np.testing.assert_array_equal(arrays["moe_route"][..., 0, 0, 0], routes[0, 0])
    for task, theirs in zip(tasks, arrays["tasks"].tolist(), strict=True):
        height, width = maps[task].shape[1:3]
        features = np.asarray(resize(maps[task], (4 * height, 4 * width)))
        compare(features, arrays, f"taskfea_{theirs}", (3, 5))
        compare(np.asarray(predictions[task]), arrays, f"pred_{theirs}", (5, 7))
        np.testing.assert_array_equal(predictions[task], output.predictions[task])


def compare(found_BHWC: np.ndarray, arrays: dict, name: str, steps: tuple[int, int]) -> None:
    """Every so many rows and columns, and sums over all of them, relative to the largest."""
    wanted = nhwc(arrays[name])
    sampled = found_BHWC[:, :: steps[0], :: steps[1]]
    np.testing.assert_allclose(sampled, wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max())
    total, kind = np.abs(found_BHWC).sum((1, 2), np.float64), name.split("_")[0]
    sums = arrays[name.replace(kind, "pred_abssum") if kind == "pred" else f"{name}_abssum"]
    np.testing.assert_allclose(total, sums, rtol=1e-4)
    if kind == "pred":
        plain = arrays[name.replace(kind, "pred_sum")]
        added = found_BHWC.sum((1, 2), np.float64)
        np.testing.assert_allclose(added, plain, rtol=1e-4, atol=2e-5 * sums.max())
