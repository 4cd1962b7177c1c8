"""A class for the whole image: its kind, its entry in the manifest, its picture, its path."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from flax import nnx

from moezoo.deploy import kinds, task_path
from moezoo.deploy.load import Predictor, tagged
from moezoo.errors import UserError
from moezoo.models.vmoe import VMoEConfig
from moezoo.nn import module
from moezoo.tasks import registry
from tests.models.tiny import filled

TASK = registry.build("scene", classes=3, names=("bedroom", "office", "playroom"))
SIZE = (8, 8)
CONFIG = VMoEConfig(width=8, depth=2, heads=2, patch=4, mlp_ratio=2.0, experts=4, capacity_factor=4)


def test_images_agree_or_they_do_not():
    kind = kinds.of("scene")
    first, second = np.array([0, 1, 2]), np.array([0, 2, 2])
    np.testing.assert_array_equal(kind.difference(first, second), [0, 100, 0])
    assert [kind.event(level) for level in kind.levels] == ["the predicted class differs"]


def test_the_picture_is_the_photo_with_a_bar_in_the_colour_of_the_class():
    how = kinds.painting(TASK)
    assert how["kind"] == "label" and len(how["colours"]) == 3
    manifest = {"picture": how, "task": {"labels": ["bedroom", "office", "playroom"]}}
    predictor = cast(Any, SimpleNamespace(manifest=manifest, size=SIZE))
    photo = np.full((64, 96, 3), 7, np.uint8)
    picture = Predictor.picture(predictor, np.asarray(1), (64, 96), photo)
    assert picture.shape == photo.shape and (picture[:48] == 7).all() and (photo == 7).all()
    assert picture[-1, 0].tolist() == how["colours"][1]
    assert len(np.unique(picture[52:].reshape(-1, 3), axis=0)) > 2, "letters"
    assert Predictor.picture(predictor, np.asarray(1)).shape == (*SIZE, 3)


@pytest.mark.parametrize("shape", [(8, 200), (300, 20)])
def test_odd_photos_get_a_bar_too(shape):
    assert tagged(np.zeros((*shape, 3), np.uint8), "living room", [1, 2, 3]).shape == (*shape, 3)


def test_the_whole_path_gives_what_the_model_gives():
    parts = filled(lambda: CONFIG.build({"scene": 3}, SIZE, nnx.Rngs(0)))
    model = module.merge(*parts)
    image = np.random.default_rng(0).normal(size=(3, *SIZE, 3)).astype(np.float32)
    path = task_path.task_path(model, "scene", SIZE)
    wanted = jax.jit(lambda x: model(x).predictions["scene"])(image)
    found = path(image)
    np.testing.assert_allclose(found.logits_BHWC, wanted, rtol=1e-5, atol=1e-5)
    assert path.exact and found.violations_B.tolist() == [0, 0, 0]


def test_experts_that_choose_have_no_path_yet():
    choosing = replace(CONFIG, routing="experts_choose")
    parts = filled(lambda: choosing.build({"scene": 3}, SIZE, nnx.Rngs(0)))
    with pytest.raises(UserError, match="decides by 'batch'"):
        task_path.task_path(module.merge(*parts), "scene", SIZE)
