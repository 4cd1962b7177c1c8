"""A class for the whole image: its kind, its entry in the manifest, its picture, its path."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from flax import nnx

from moezoo.deploy import export, task_path
from moezoo.deploy.manifest import Facts
from moezoo.deploy.plan import Plan
from moezoo.deploy.runtime.drawing import BLANK, tagged
from moezoo.deploy.runtime.load import Predictor, load_export
from moezoo.domains.images.export import photos
from moezoo.errors import UserError
from moezoo.models.vmoe.model import VMoE, VMoEConfig, slots_of
from moezoo.nn import module, surgery
from moezoo.nn.batch_routers import ExpertsChooseRouter
from tests.deploy.conftest import constants
from tests.models.tiny import filled
from tests.tasks.tables import build

NAMES = ("bedroom", "office", "playroom")
TASK = build("scene", classes=3, names=NAMES)
SIZE = (8, 8)
CONFIG = VMoEConfig(width=8, depth=2, heads=2, patch=4, mlp_ratio=2.0, experts=4, capacity_factor=4)
IMAGE = np.random.default_rng(0).normal(size=(3, *SIZE, 3)).astype(np.float32)
ABOUT = Facts(labels=NAMES)


def built(config: VMoEConfig) -> VMoE:
    return module.merge(*filled(lambda: config.build({"scene": 3}, SIZE, nnx.Rngs(0))))


def test_images_agree_or_they_do_not():
    kind = TASK.prediction
    first, second = np.array([0, 1, 2]), np.array([0, 2, 2])
    np.testing.assert_array_equal(kind.difference(first, second), [0, 100, 0])
    assert [kind.event(level) for level in kind.levels] == ["the predicted class differs"]


def test_the_picture_is_the_photo_with_a_bar_in_the_colour_of_the_class():
    how = TASK.painting()
    assert how["kind"] == "label" and len(how["colours"]) == 3
    manifest = {"picture": how, "task": {"labels": ["bedroom", "office", "playroom"]}}
    predictor = cast(Any, SimpleNamespace(manifest=manifest))
    photo = np.full((64, 96, 3), 7, np.uint8)
    picture = Predictor.picture(predictor, np.asarray(1), (64, 96), photo)
    assert picture.shape == photo.shape and (picture[:48] == 7).all() and (photo == 7).all()
    assert picture[-1, 0].tolist() == how["colours"][1]
    assert len(np.unique(picture[52:].reshape(-1, 3), axis=0)) > 2, "letters"
    assert Predictor.picture(predictor, np.asarray(1)).shape == (*BLANK, 3)


@pytest.mark.parametrize("shape", [(8, 200), (300, 20)])
def test_odd_photos_get_a_bar_too(shape):
    assert tagged(np.zeros((*shape, 3), np.uint8), "living room", [1, 2, 3]).shape == (*shape, 3)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["tokens_choose", "experts_choose", "soft"])
def test_the_whole_path_gives_what_the_model_gives(routing):
    model = built(replace(CONFIG, routing=routing))
    path = task_path.task_path(model, "scene", photos(SIZE))
    wanted = jax.jit(lambda x: model(x).predictions["scene"])(IMAGE)
    found = path(IMAGE)
    np.testing.assert_allclose(found.logits, wanted, rtol=1e-5, atol=1e-5)
    assert path.exact and found.violations_B.tolist() == [0, 0, 0]


@pytest.mark.slow
def test_experts_that_choose_lose_experts_as_others_do():
    model = built(replace(CONFIG, routing="experts_choose", capacity_factor=1.0))
    whole = task_path.task_path(model, "scene", photos(SIZE))
    assert whole.layers["blocks/1/mlp"].decision == "row"
    plan = Plan("scene", {"blocks/1/mlp": (0, 1, 3)}, {"blocks/1/mlp": 4})
    means = constants({"blocks/1/mlp": np.zeros((4, 8), np.float32)})
    cut = task_path.pruned(whole, plan, means)(IMAGE)
    # Every expert takes its slots in every image, so each image misses the one that is gone.
    assert (np.asarray(cut.violations_B) == slots_of(model.config, model.row)).all()
    silent = dict(whole.weights)
    for name in ("kernel", "bias"):
        path = f"blocks/1/mlp/experts/fc2/{name}"
        silent[path] = silent[path].at[2].set(0)
    wanted = whole.call(silent, IMAGE).logits
    np.testing.assert_allclose(cut.logits, wanted, rtol=1e-5, atol=1e-5)


def test_experts_that_choose_among_all_images_have_no_path():
    model = built(replace(CONFIG, routing="experts_choose"))
    router = ExpertsChooseRouter(8, 4, 2, rngs=nnx.Rngs(0))
    surgery.replace(model, "blocks/1/mlp/router", router)
    with pytest.raises(UserError, match="decides by 'batch'"):
        task_path.task_path(model, "scene", photos(SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["experts_choose", "soft"])
def test_an_export_of_every_routing_gives_the_stored_answers(tmp_path, routing):
    path = task_path.task_path(built(replace(CONFIG, routing=routing)), "scene", photos(SIZE))
    content = export.Content(path, TASK, ABOUT, {}, {}, IMAGE)
    assert load_export(export.write(tmp_path / "made", content)).self_check() <= 1e-5
