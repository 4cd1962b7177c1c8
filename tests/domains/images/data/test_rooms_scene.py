"""What is in the scenes: classes, colours, words; and that a seed fixes all of it."""

from __future__ import annotations

import numpy as np
import pytest

from moezoo.domains.images.data.rooms import names
from moezoo.domains.images.data.rooms.layout import Placed
from moezoo.domains.images.data.rooms.render import View, record, render, render_record
from moezoo.domains.images.data.rooms.scene import Scene, draw, generator, sample, worth_seeing
from moezoo.domains.images.data.rooms.visibility import cast
from moezoo.domains.images.data.rooms.workers import Job, render_all


def same(a: dict, b: dict) -> bool:
    return all(np.array_equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def test_an_example_depends_on_seed_split_and_index_alone() -> None:
    first = render_record(3, "train", 5, 24, 32)
    assert same(first, render_record(3, "train", 5, 24, 32))
    for other in ((4, "train", 5), (3, "test", 5), (3, "train", 6)):
        assert first["image"] != render_record(*other, 24, 32)["image"]


@pytest.mark.slow
def test_processes_give_what_one_process_gives() -> None:
    job = Job(seed=1, split="test", height=16, width=16, count=17)
    many = list(render_all(job, processes=2))
    assert len(many) == 17
    assert all(same(a, b) for a, b in zip(many, job.run(), strict=True))


def test_every_class_and_part_appears(views: list[View]) -> None:
    assert len(names.CLASSES) >= 12
    seen = set(np.unique([v.labels.semseg_HW for v in views]))
    assert seen == set(range(len(names.CLASSES)))
    seen = set(np.unique([v.labels.parts_HW for v in views]))
    assert seen == set(range(len(names.PARTS)))
    assert {v.kind for v in views} == set(range(len(names.SCENES)))


@pytest.mark.slow
def test_no_class_is_very_rare_and_none_dominates() -> None:
    count = np.zeros(len(names.CLASSES))
    for index in range(60):
        scene = sample(0, "train", index)
        seen = cast(scene.table, scene.camera, 32, 32, factor=1)
        count += np.bincount(scene.table.semantic_S[seen.solid_HW].ravel(), minlength=len(count))
    share = count / count.sum()
    assert share.min() > 0.003 and share.max() < 0.45, dict(zip(names.CLASSES, share, strict=True))


def test_colour_alone_does_not_give_the_class(views: list[View]) -> None:
    """Nearest colour or nearest class mean finds less than a fifth of the average class."""
    pixels = [v.image_HW3[::2, ::2].reshape(-1, 3).astype(np.float32) for v in views]
    classes = [v.labels.semseg_HW[::2, ::2].ravel() for v in views]
    train, label = np.concatenate(pixels[:18])[::4], np.concatenate(classes[:18])[::4]
    test, truth = np.concatenate(pixels[18:])[::4], np.concatenate(classes[18:])[::4]
    nearest = label[((test[:, None] - train) ** 2).sum(-1).argmin(1)]
    known = np.unique(label)
    means = np.stack([train[label == c].mean(0) for c in known])
    by_mean = known[((test[:, None] - means) ** 2).sum(-1).argmin(1)]
    for guess in (nearest, by_mean):
        recall = [(guess[truth == c] == c).mean() for c in np.unique(truth)]
        assert np.mean(recall) < 0.2


def test_views_are_worth_seeing(views: list[View]) -> None:
    for view in views:
        assert np.median(view.labels.depth_HW) > 1.5
        objects = view.labels.instance_HW[view.labels.semseg_HW > 6]
        assert len(np.unique(objects)) >= 3
        image = view.image_HW3.astype(float)
        assert 50 < image.mean() < 215 and image.std() > 20
        assert (image.min(-1) >= 254).mean() < 0.35 and (image.max(-1) <= 1).mean() < 0.2


def test_bad_draws_are_rejected() -> None:
    verdicts = [worth_seeing(draw(generator(0, "train", index))) for index in range(40)]
    assert 0.5 < np.mean(verdicts) < 1.0


def test_furniture_stands_free_inside_the_room(scenes: list[Scene]) -> None:
    for scene in scenes:
        for p in scene.placed:
            hx, hz = p.reach()
            assert -0.01 <= p.x - hx + 0.16 and p.x + hx <= scene.size[0] + 0.16
            assert p.z + hz <= scene.size[2] + 0.16 and p.y >= 0
        floor = [p for p in scene.placed if is_standing(p)]
        for k, a in enumerate(floor):
            for b in floor[k + 1 :]:
                pair = {a.piece.name, b.piece.name}
                if pair == {"chair", "table"}:
                    continue  # a chair may be pushed under a table
                (ax, az), (bx, bz) = a.reach(), b.reach()
                apart = abs(a.x - b.x) >= ax + bx - 1e-9 or abs(a.z - b.z) >= az + bz - 1e-9
                assert apart, (a.piece.noun, b.piece.noun)


def is_standing(p: Placed) -> bool:
    return p.y == 0 and p.piece.name not in ("rug", "window", "door", "picture") and not hung(p)


def hung(p: Placed) -> bool:
    return min(s.centre[1] - s.half.max() for s in p.piece.solids) > 0.5


def test_the_salient_object_is_whole_and_no_structure(views: list[View]) -> None:
    for view in views:
        chosen = view.saliency_HW.astype(bool)
        assert 0 < chosen.mean() < 0.5
        instances = np.unique(view.labels.instance_HW[chosen])
        assert 0 not in instances
        assert not chosen[~np.isin(view.labels.instance_HW, instances)].any()
        assert chosen[np.isin(view.labels.instance_HW, instances)].all()


def test_captions_name_what_is_seen(views: list[View], scenes: list[Scene]) -> None:
    for view, scene in zip(views, scenes, strict=True):
        assert names.SCENES[view.kind] in view.caption
        assert view.caption[0].isupper() and view.caption.endswith(".")
        share = np.bincount(view.labels.instance_HW.ravel(), minlength=len(scene.placed) + 1)
        largest = scene.placed[int(share[1:].argmax())].piece.noun
        assert largest[:4] in view.caption.lower()


def test_label_maps_survive_png(views: list[View]) -> None:
    from io import BytesIO

    from PIL import Image

    stored = record(views[0])
    for name, values in (
        ("image", views[0].image_HW3),
        ("semseg", views[0].labels.semseg_HW),
        ("parts", views[0].labels.parts_HW),
        ("edge", views[0].labels.edge_HW),
    ):
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(stored[name]))), values)


@pytest.mark.parametrize("darken", ["lamps", "shadows"])
def test_light_matters(scenes: list[Scene], darken: str) -> None:
    """Fewer lamps or no furniture in the way change the light as they must."""
    from dataclasses import replace

    from moezoo.domains.images.data.rooms.render import surface
    from moezoo.domains.images.data.rooms.shade import radiance

    for scene in scenes[:4]:
        seen = cast(scene.table, scene.camera, 16, 16, factor=2)
        points, shape = surface(scene.table, scene.camera, seen), seen.depth_HW.shape
        light = radiance(scene, points, shape)
        assert np.isfinite(light).all() and light.min() >= 0
        if darken == "lamps":
            off = replace(scene.lighting, lights=(), suns=())
            dimmer = radiance(replace(scene, lighting=off), points, shape)
            assert (dimmer <= light + 1e-6).all() and dimmer.sum() < 0.9 * light.sum()
        else:
            shell = scene.table._replace(instance_S=np.zeros_like(scene.table.instance_S))
            bare = radiance(replace(scene, table=shell, placed=[]), points, shape)
            assert (bare >= light - 1e-5).all() and bare.sum() > 1.01 * light.sum()


def test_rendering_a_scene_twice_is_identical(scenes: list[Scene]) -> None:
    a, b = render(scenes[0], 20, 20), render(scenes[0], 20, 20)
    np.testing.assert_array_equal(a.image_HW3, b.image_HW3)
