"""Dense tasks and data sets of one's own: labels move with their images as their kinds say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo import label as labels
from moezoo.data.source import ArraySource, Info, Labels
from moezoo.domains.images import domain as data_config
from moezoo.domains.images.data import batches, preview
from moezoo.domains.images.data.tfds_source import TfdsMapping
from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.tasks import TASKS, depth, iou
from moezoo.errors import UserError
from moezoo.label import LabelKind
from moezoo.nn import module
from moezoo.tasks import classification, losses, painting
from moezoo.tasks.base import Task
from moezoo.tasks.registry import TaskKind
from moezoo.train import setup
from moezoo.train.config import Config, TrainConfig
from tests.tasks.tables import build
from tests.train import tiny

SIZE = (16, 24)
FLOW = LabelKind("vector", unknown=0, enlarged="multiplied", channels=2)
WIDE = LabelKind("class", unknown=65535, dtype="uint16")
OWN = {
    "albedo": labels.value(unknown=-1),
    "disparity": labels.value(unknown=float("nan"), enlarged="multiplied"),
    "range": labels.DISTANCE,
    "flow": FLOW,
    "crops": labels.CLASSES,
    "species": WIDE,
    "road": labels.BINARY,
    "season": labels.IMAGE,
}
AUGMENT = ("flip", "zoom", "scale", "crop")


def own(split: str = "train", count: int = 6, kinds: Any = OWN) -> ArraySource:
    """Every label can be told from the image at its pixel: red is the column, green the row."""
    rows, columns = np.indices(SIZE)
    image = np.stack([10 * columns, 10 * rows, np.full_like(rows, 90)], -1).astype(np.uint8)
    given: dict[str, Any] = {
        "image": image,
        "albedo": columns.astype(np.float32),
        "disparity": np.where(rows % 5 == 0, np.nan, columns + 1).astype(np.float32),
        "range": (columns + 1).astype(np.float32),
        "flow": np.stack([columns + 1, rows + 1], -1).astype(np.float32),
        "crops": (columns // 4).astype(np.uint8),
        "species": (columns // 4 + 300).astype(np.uint16),
        "road": (columns % 2).astype(np.uint8),
        "season": np.uint8(3),
    }
    arrays = {name: np.stack([value] * count) for name, value in given.items()}
    colours = np.zeros((999, 3), np.uint8)
    classes = {n: Labels(("?",) * k, colours[:k]) for n, k in (("crops", 9), ("species", 999))}
    info = Info("fields", split, SIZE, tuple(OWN), classes, kinds=kinds)
    return ArraySource(info, arrays)


def test_labels_follow_their_images() -> None:
    training = batches.training(own(), 6, 0, augment=AUGMENT)
    seen = set()
    for step in range(6):
        for row in range(6):
            made = training.example(step, row, row)
            place = made["image"][..., 0].astype(np.float32) / 10  # the old column of a pixel
            off = np.abs(made["albedo"] - place)
            assert off.max() <= 2.1, (step, row)  # two samplings, each up to a pixel off
            column = made["albedo"].astype(int)
            np.testing.assert_array_equal(made["crops"], column // 4)
            np.testing.assert_array_equal(made["species"], column // 4 + 300)
            np.testing.assert_array_equal(made["road"], column % 2)
            factor = (column + 1) / made["range"]  # of all that enlarged the image
            np.testing.assert_allclose(factor, factor[0, 0], rtol=1e-5)
            known = ~np.isnan(made["disparity"])
            assert 0 < known.mean() < 1
            np.testing.assert_allclose(
                made["disparity"][known], ((column + 1) * factor)[known], rtol=1e-5
            )
            mirrored = bool(made["albedo"][0, 0] > made["albedo"][0, -1])
            sign = -1 if mirrored else 1
            np.testing.assert_allclose(
                made["flow"][..., 0], sign * (column + 1) * factor, rtol=1e-5
            )
            assert (made["flow"][..., 1] > 0).all() and made["season"] == 3
            seen |= {mirrored, round(float(factor[0, 0]), 1)}
    assert {True, False} < seen and len(seen) > 6


@pytest.mark.parametrize("name", OWN)
def test_padding_has_no_labels(name: str) -> None:
    given = own()
    wide = replace(given.info, resolution=(20, 30))
    batch = next(batches.evaluation(ArraySource(wide, given.arrays), 2))
    kind, values = OWN[name], batch[name]
    assert values.shape == (2, *kind.shape((20, 30))) and values.dtype == kind.type
    if kind.per_pixel:
        assert not kind.known(values[:, 0]).any() and not kind.known(values[:, :, -1]).any()
        np.testing.assert_array_equal(values[:, 2:18, 3:27], given.arrays[name][:2])


def test_an_undeclared_map_is_refused() -> None:
    less = {name: kind for name, kind in OWN.items() if name != "albedo"}
    with pytest.raises(UserError, match=r"fields has the label albedo and does not say what kind"):
        own(kinds=less)
    with pytest.raises(UserError, match=r"fields has the label albedo and does not say"):
        own(kinds={**OWN, "albedo": "value"})
    given = own()
    given.arrays["instances"] = given.arrays["crops"]
    for augment in (("flip",), ("scale", "crop"), ("crop",)):
        training = batches.training(given, 2, 3, augment=augment)
        with pytest.raises(UserError, match="The label instances of an example does not say"):
            for step in range(4):  # a flip comes by chance
                training.batch(step)
    with pytest.raises(UserError, match="The mapping of mine has the label albedo and does not"):
        TfdsMapping("mine", "mine", {}, (), {"albedo": lambda r: r["x"]}, {}, {})
    with pytest.raises(UserError, match="crops and does not name its classes"):
        TfdsMapping("mine", "mine", {}, (), {"crops": lambda r: r["x"]}, OWN, {})


@pytest.mark.parametrize("unknown", [0, 255, -1, float("nan")])
def test_unknown_vectors_stay_unknown(unknown: float) -> None:
    kind = LabelKind("vector", unknown, "multiplied", channels=2)
    given = kind.blank((1, 3))
    given[0, 0] = (255, 2)  # a component that looks like a mark
    mirrored = kind.mirrored(given)
    np.testing.assert_array_equal(mirrored[0, 2], (-255, 2))
    np.testing.assert_array_equal(mirrored[0, :2], given[0, 1:])
    np.testing.assert_array_equal(kind.scaled(given, 2.0)[0, 0], (510, 4))
    np.testing.assert_array_equal(kind.scaled(given, 2.0)[0, 1:], given[0, 1:])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"form": "klass"}, "A label's form is one of class, binary"),
        ({"form": "value", "enlarged": "halved"}, "A label's enlarged is one of kept"),
        ({"form": "class", "unknown": -1}, "type uint8 cannot mark pixels as unknown with -1"),
        ({"form": "class", "unknown": float("nan")}, "cannot mark pixels as unknown with nan"),
        ({"form": "value", "unknown": "x"}, "cannot mark pixels as unknown with 'x'"),
        ({"form": "class", "dtype": "uint9"}, "has a type of whole numbers, not 'uint9'"),
        ({"form": "value", "dtype": "uint8"}, "has a type of floats, not 'uint8'"),
    ],
)
def test_kinds_that_cannot_be(given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        LabelKind(**given)


@pytest.mark.parametrize("augment", [(), ("flip", "photometric"), ("scale", "crop")])
def test_images_of_other_types_are_the_same_images(augment: tuple[str, ...]) -> None:
    given = own()
    wanted = batches.training(given, 2, 0, augment=augment).batch(0)["image"]
    image = given.arrays["image"]
    for other in (
        image.astype(np.float32) / 255,
        image.astype(np.uint16) * 257,
        image.astype(np.int64),
        np.concatenate([image, np.full_like(image[..., :1], 255)], axis=-1),
    ):
        made = ArraySource(given.info, {**given.arrays, "image": other})
        found = batches.training(made, 2, 0, augment=augment).batch(0)["image"]
        np.testing.assert_array_equal(found, wanted)
        seen = next(batches.evaluation(made, 2))["image"]
        np.testing.assert_array_equal(seen, next(batches.evaluation(given, 2))["image"])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("image", lambda a: a.astype(np.float32), "An image of fields has a pixel of 23"),
        ("image", lambda a: a.transpose(0, 3, 1, 2), "An image of fields has the shape"),
        ("range", lambda a: a[..., None], r"label range of fields has the shape \(16, 24, 1\)"),
        ("range", lambda a: a[:, ::2], r"label range of fields has the shape \(8, 24\)"),
        ("crops", lambda a: a.astype(np.int64) + 300, "crops of fields has numbers of the type in"),
        ("crops", lambda a: a.astype(np.int64) - 1, "crops of fields has numbers of the type int6"),
        ("crops", lambda a: a / 2, "crops of fields has numbers of the type float64"),
        ("crops", lambda a: a + np.uint8(9), "crops of fields has the class 9, but classes are 0"),
        ("road", lambda a: a * np.uint8(2), "road of fields has the class 2, but classes are 0 to"),
        ("season", lambda a: a[:, None], r"label season of fields has the shape \(1,\)"),
    ],
)
def test_examples_that_are_not_what_is_declared(name: str, change: Any, words: str) -> None:
    given = own()
    given.arrays[name] = change(given.arrays[name])
    for augment in ((), ("scale", "crop")):
        with pytest.raises(UserError, match=words):
            batches.training(given, 2, 0, augment=augment).batch(0)
    with pytest.raises(UserError, match=words):
        next(batches.evaluation(given, 2))


def test_a_preview_shows_images_of_other_types() -> None:
    given = own()
    wanted = preview.strip(given[0], given.info)
    given.arrays["image"] = given.arrays["image"].astype(np.float32) / 255
    found = preview.strip(given[0], given.info)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)


def test_only_labels_that_are_asked_for_must_be_there() -> None:
    given = own()
    del given.arrays["albedo"]
    asked = ("range", "crops")
    assert batches.training(given, 2, 0, asked, ("flip",)).batch(0).keys() == {"image", *asked}
    with pytest.raises(UserError, match="An example of fields has no label albedo"):
        next(batches.evaluation(given, 2))


def test_maps_of_more_than_255_classes_in_losses_scores_and_pictures() -> None:
    label = np.array([[[255, 300, 65535]]], np.uint16)
    logits = 30.0 * jnp.eye(301)[np.array([[[255, 300, 7]]])]
    assert float(losses.cross_entropy(logits, label)) < 1e-6
    metric = iou.IoU(301)
    scores = metric.compute(metric.count(logits, label))
    assert scores["mIoU_present"] == scores["pixel_accuracy"] == 1.0
    painted = painting.classes(label[0], np.full((301, 3), 9, np.uint8))
    assert painted[0, :, 0].tolist() == [9, 9, 0]


@pytest.mark.parametrize("unknown", [0, 254])
def test_losses_that_leave_out_another_mark_are_refused(unknown: int) -> None:
    task = classification.whole("crops", 9)
    kind = LabelKind("class", unknown)
    with pytest.raises(UserError, match="crops marks unlabelled pixels with .*, but .* leaves out"):
        replace(task, label=kind)
    own_loss = replace(
        task, label=kind, loss=depth.l1, metric=depth.DepthErrors(None), headline="rmse"
    )  # type: ignore[arg-type]
    assert own_loss.label == kind


def albedo(kind: LabelKind | None, weight: float = 1.0) -> Task:
    """A task as a user writes one."""
    validity = depth.not_marked(-1.0)
    return Task(
        name="albedo",
        channels=1,
        loss=partial(depth.l1, validity=validity),
        metric=depth.DepthErrors(validity),
        headline="rmse",
        lower_is_better=True,
        weight=weight,
        postprocess=depth.metres,
        picture=depth.Metres(0.0, 30.0),
        label=kind,
    )


def config(**changes: Any) -> Config:
    data = DataConfig("fields", resolution=SIZE, augment=("scale", "crop", "flip"))
    return Config("own", tiny.dense(), ("albedo",), data, train=TrainConfig(batch=8), **changes)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_config, "_OPENERS", dict(data_config._OPENERS))
    monkeypatch.setattr(data_config, "MAPPED", dict(data_config.MAPPED))
    data_config.learn_source("fields", lambda section, split: own(split))


def test_a_task_and_a_data_set_of_ones_own(
    registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "albedo", TaskKind(partial(albedo, labels.value(unknown=-1))))
    made = setup.prepare(config())
    (task,) = made.tasks
    step, batch = next(made.domain.training(made.config, made.train, made.names, 0, range(8)))
    assert step == 0 and batch.keys() == {"image", "albedo"}
    parts = module.abstract(made.build)
    assert parts.params is not None
    perfect = jnp.asarray(batch["albedo"])[..., None]
    assert float(task.loss(perfect, jnp.asarray(batch["albedo"]))) == 0.0
    off = float(task.loss(perfect[:, :, ::-1], jnp.asarray(batch["albedo"])))
    assert off > 1.0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (None, "Task albedo does not say what kind of label it has, which decides"),
        (labels.DISTANCE, "Task albedo reads labels that are .*divided.* but fields declares"),
        (labels.BINARY, "Task albedo reads labels that are .*binary.* but fields declares"),
    ],
)
def test_a_task_that_does_not_declare_what_it_reads(
    kind: LabelKind | None, words: str, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "albedo", TaskKind(partial(albedo, kind)))
    with pytest.raises(UserError, match=words):
        setup.prepare(config())


def test_every_task_of_the_zoo_reads_what_its_data_declare() -> None:
    from moezoo.domains.images.data import oxford_pets
    from moezoo.domains.images.data.dense import nyud, pascal
    from moezoo.domains.images.data.rooms.reader import KINDS

    sets = [KINDS, nyud.LAYOUT.maps, pascal.LAYOUT.maps, oxford_pets.BY_BREED.kinds]
    for kinds in sets:
        for name in set(kinds) & set(TASKS):
            given = {"classes": 3} if kinds[name].form in ("class", "image") else {}
            assert build(name, **given).label == kinds[name]


def test_names_of_data_sets_that_come_with_the_project(registered: None) -> None:
    for name in ("rooms", "nyud", "oxford_iiit_pet"):
        with pytest.raises(UserError, match=f"The data set {name} comes with this project"):
            data_config.learn_source(name, lambda section, split: own(split))
