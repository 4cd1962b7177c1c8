"""Models as users ask them: what comes out is what the model gives, compiled, sharded or not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moezoo
from moezoo.domains.text.inference import TextInference
from moezoo.errors import UserError
from moezoo.front.model import ZooModel
from moezoo.train import mesh as meshes
from moezoo.train.schema import MeshConfig
from tests.fixtures import devices

SMALL = {"width": 24, "depth": 2, "heads": 2, "head_channels": 8}


@pytest.fixture(scope="module")
def model() -> ZooModel:
    return moezoo.create(
        "rooms/m3vit_tiny", tasks=["depth", "semseg"], image_size=(32, 32), model=SMALL
    )


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


def test_predictions_are_the_models_own_after_post_processing(
    model: ZooModel, photos: np.ndarray
) -> None:
    batch = model.prepare(photos)
    output = model._loaded.model(jnp.asarray(batch))
    for name, found in model(photos).items():
        wanted = model.task(name).postprocess(output.predictions[name])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model(batch)["depth"], model(photos)["depth"])


def test_it_runs_inside_of_a_compiled_function(model: ZooModel, photos: np.ndarray) -> None:
    batch = model.prepare(photos)

    @jax.jit
    def mean(images: jax.Array) -> jax.Array:
        return model(images)["depth"].mean()

    np.testing.assert_allclose(mean(batch), model(batch)["depth"].mean(), rtol=1e-5)
    gradient = jax.grad(lambda images: mean(images))(jnp.asarray(batch))
    assert np.isfinite(gradient).all() and np.any(gradient != 0)
    with pytest.raises(UserError, match="Inside of a compiled function the model reads float32"):
        mean(jnp.asarray(photos))


# With two and four rows, as many as there are tasks, counts of tasks must not be cut like rows.
@pytest.mark.parametrize(
    "sizes", [{"data": 2}, {"data": 4}, {"data": 2, "expert": 2}, {"fsdp": 2, "data": 1}]
)
def test_on_a_mesh_it_says_the_same(
    sizes: dict[str, int], model: ZooModel, photos: np.ndarray
) -> None:
    count = int(np.prod(list(sizes.values())))
    mesh = meshes.make_mesh(MeshConfig(**sizes), devices(count))
    alone, used, read = model(photos), model.usage(photos), model.features(photos)
    with jax.set_mesh(mesh):
        found, usage, features = model(photos), model.usage(photos), model.features(photos)
    for task in model.tasks:
        assert found[task].shape == alone[task].shape
        np.testing.assert_allclose(features[task], read[task], rtol=1e-4, atol=1e-5)
        for layer, shares_E in used[task].items():
            # Rows that only fill up the batch count nowhere.
            np.testing.assert_allclose(usage[task][layer], shares_E, atol=1e-6)
    np.testing.assert_allclose(found["depth"], alone["depth"], rtol=1e-4, atol=1e-5)


def test_a_mesh_of_other_axes_is_refused(model: ZooModel, photos: np.ndarray) -> None:
    for mesh in (jax.make_mesh((4,), ("data",)), jax.make_mesh((1, 1, 1, 1), meshes.AXES)):
        with jax.set_mesh(mesh), pytest.raises(UserError, match="make one with moezoo.train.mesh"):
            model(photos)
        with jax.set_mesh(mesh):
            loaded = moezoo.load("rooms/m3vit_tiny")  # whole, wherever that may be
        assert isinstance(loaded, ZooModel)


def test_usage_is_counted_by_hand(model: ZooModel, photos: np.ndarray) -> None:
    usage = model.usage(photos)
    records = model._loaded.model(jnp.asarray(model.prepare(photos))).records
    for number, task in enumerate(model.tasks):
        for layer, record in records.items():
            chosen_NK = np.asarray(record.routing.experts_NK)[np.asarray(record.task_N) == number]
            counts_E = np.bincount(chosen_NK.ravel(), minlength=8)
            np.testing.assert_allclose(usage[task][layer], counts_E / counts_E.sum(), atol=1e-6)
            assert usage[task][layer].sum() == pytest.approx(1.0)


def test_features_are_what_heads_read(model: ZooModel, photos: np.ndarray) -> None:
    own, batch = model._loaded.model, model.prepare(photos)
    features = model.features(photos)
    for task, x_BTD in features.items():
        logits = own.heads[task](x_BTD, (4, 4), False).logits_BHWC
        wanted = own(jnp.asarray(batch)).predictions[task]
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (np.zeros((2, 8, 8), np.uint8), r"Images must be \[batch, height, width, 3\]"),
        (np.zeros((2, 8, 8, 3), np.float64), "Images must be uint8 of any size"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"Images must be \[batch"),
    ],
)
def test_other_forms_are_refused(given: np.ndarray, sentence: str, model: ZooModel) -> None:
    with pytest.raises(UserError, match=sentence):
        model(given)


def test_numbers_that_are_none_are_refused(model: ZooModel, photos: np.ndarray) -> None:
    with pytest.raises(UserError, match="The examples hold numbers that are not finite"):
        model(np.full_like(model.prepare(photos), np.nan))
    with pytest.raises(UserError, match=r"Images must be \[batch"):
        model(jnp.zeros((0, 32, 32, 3)))


def test_photos_inside_of_a_function_and_on_another_device(
    model: ZooModel, photos: np.ndarray
) -> None:
    alone, batch = model(photos)["depth"], model.prepare(photos)
    scaled = jax.jit(lambda s: model(photos)["depth"] * s)(2.0)
    np.testing.assert_allclose(scaled, 2 * alone, rtol=1e-4, atol=1e-5)
    moved = jax.device_put(batch, devices(3)[2])
    np.testing.assert_allclose(model(moved)["depth"], alone, rtol=1e-4, atol=1e-5)


def test_models_are_copied_and_saved_but_not_pickled(model: ZooModel, photos: np.ndarray) -> None:
    first = model(photos)["depth"]
    np.testing.assert_array_equal(copy.deepcopy(model)(photos)["depth"], first)
    with pytest.raises(UserError, match="write it with model.save"):
        pickle.dumps(model)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"score": "reep"}, "Unknown score 'reep': did you mean reap"),
        ({"keep": 2, "total": 4}, "--keep and --total both say how much stays: give one"),
        ({"keep": 2.5}, "--keep is 2.5; it must be a whole number"),
        ({"keep": True}, "--keep is True; it must be a whole number"),
        ({"calibration": "a"}, "--calibration is 'a'; it must be a whole number"),
    ],
)
def test_paths_that_cannot_be_are_refused_at_once(
    options: dict, sentence: str, model: ZooModel
) -> None:
    with pytest.raises(UserError, match=sentence):
        model.task_path("depth", **options)
    with pytest.raises(UserError, match="Unknown task of this model ''"):
        model.export("never", "")


def test_a_path_on_a_mesh_is_a_sentence(model: ZooModel, photos: np.ndarray) -> None:
    mesh, path = meshes.make_mesh(MeshConfig(data=4), devices(4)), model.task_path("depth")
    with jax.set_mesh(mesh), pytest.raises(UserError, match="outside of jax.set_mesh"):
        path(photos)
    np.testing.assert_allclose(path(photos), model(photos)["depth"], rtol=1e-4, atol=1e-4)


def test_other_tasks_are_refused(model: ZooModel, photos: np.ndarray) -> None:
    with pytest.raises(UserError, match="Unknown task of this model 'dept'"):
        model(photos, ["dept"])
    with pytest.raises(UserError, match="No task was asked for"):
        model(photos, [])


def heavy(*names: str) -> list:
    """One system of a domain among the slow tests; the rest of them takes minutes."""
    first, *rest = names
    return [first, *(pytest.param(name, marks=pytest.mark.claims) for name in rest)]


IMAGES = ("vmoe", "mod_squad", "mlore", "taskexpert", "vit_dense", "conditional_moe")


@pytest.mark.slow
@pytest.mark.parametrize("name", heavy(*(f"rooms/{system}_tiny" for system in IMAGES)))
def test_every_system_on_images_answers(name: str) -> None:
    model = moezoo.create(name)
    photos = np.random.default_rng(1).integers(0, 256, (2, 40, 50, 3), np.uint8)
    found, features, usage = model(photos), model.features(photos), model.usage(photos)
    assert set(found) == set(model.tasks) == set(features)
    for task in model.tasks:
        assert len(found[task]) == 2 and len(features[task]) == 2
    for layers in usage.values():
        for shares_E in layers.values():
            assert shares_E.sum() == pytest.approx(1.0, abs=1e-4) or shares_E.sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", heavy("sounds/soft_moa_tiny", "sounds/ast_tiny"))
def test_every_system_on_sounds_answers(name: str) -> None:
    model = moezoo.create(name)
    waves = [np.random.default_rng(2).normal(size=16_000).astype(np.float32) for _ in range(2)]
    found, features = model(waves), model.features(waves)
    assert set(found) == set(model.tasks) == set(features)
    assert all(len(x) == 2 for x in found.values())
    model.usage(waves)


@pytest.mark.slow
@pytest.mark.parametrize("name", heavy("text/smora_tiny", "text/skills_tiny"))
def test_every_system_on_text_answers(name: str) -> None:
    model = moezoo.create(name)
    prompts = ["copy\nab", "reverse\nabcd"]
    assert [type(one) for one in model(prompts)["lm"]] == [str, str]
    assert model.features(prompts)["lm"].shape[0] == 2
    # Padding on the left changes nothing.
    alone = model.features(prompts[:1])["lm"][0]
    np.testing.assert_allclose(model.features(prompts)["lm"][0], alone, rtol=1e-3, atol=1e-4)
    for shares_E in model.usage(prompts)["lm"].values():
        assert shares_E.sum() == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(UserError, match="gives no pictures"):
        model.backdrop("copy")


def test_a_domain_without_an_inference_says_so() -> None:
    from moezoo.train.domain import Classes
    from tests.growth.numbers import numbers

    run = type("Run", (), {"config": numbers("rows")})
    with pytest.raises(UserError, match="cannot be asked yet: give Numbers an `inference`"):
        numbers("rows").data.domain.inference(run, Classes())


@pytest.mark.parametrize("source", ["saved", "in memory"])
def test_a_streamed_model_answers_as_the_one_in_memory(
    model: ZooModel, photos: np.ndarray, source: str, tmp_path: Path
) -> None:
    given: Any = model
    if source == "saved":
        given = model.save(tmp_path / "saved")
        model = moezoo.load(given)  # its matrices are rounded
    streamed = moezoo.streamed(given)
    assert streamed.tasks == model.tasks and streamed.parameters == model.parameters
    for name, wanted in model(photos).items():
        np.testing.assert_allclose(streamed(photos, [name])[name], wanted, rtol=1e-4, atol=1e-5)
    for task, layers in model.usage(photos).items():
        for layer, share_E in layers.items():
            np.testing.assert_array_equal(streamed.usage(photos)[task][layer], share_E)
    with pytest.raises(UserError, match="ask it outside of compiled functions"):
        jax.jit(lambda x: streamed(x, ["depth"]))(model.prepare(photos))
    with (
        jax.set_mesh(meshes.make_mesh(MeshConfig(), jax.devices()[:1])),
        pytest.raises(UserError, match="is for one device: ask it outside of jax.set_mesh"),
    ):
        streamed(photos)


def test_what_cannot_be_streamed(model: ZooModel, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(UserError, match="there.safetensors exists already"):
        moezoo.streamed(model, tmp_path / "there.safetensors")
    with pytest.raises(UserError, match="This model has no MoE layer"):
        moezoo.streamed("rooms/vit_dense_tiny")
    with pytest.raises(UserError, match="A decoder answers in one compiled loop"):
        TextInference.streamed(None, None)  # type: ignore[arg-type]
