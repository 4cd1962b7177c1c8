"""Painted maps: one scale for truth and prediction, and a key that says what it means."""

from __future__ import annotations

import numpy as np

from moezoo.domains.images.tasks.depth import Metres
from moezoo.domains.images.tasks.edge import Edges
from moezoo.domains.images.tasks.normals import Directions
from moezoo.tasks import painting
from moezoo.tasks.painting import ClassColours, Probability, Scale


def test_depth_spans_the_measured_labels_and_nothing_predicted_is_black() -> None:
    truth = np.array([[0.0, 1.2, 2.0, np.inf], [2.6, 3.3, np.nan, 3.9]])
    paint = Metres().fitted([truth])
    assert (paint.near, paint.far) == (1.0, 4.0)
    unmeasured = (paint.label(truth) == 0).all(-1)
    np.testing.assert_array_equal(unmeasured, ~np.isfinite(truth) | (truth <= 0))
    predicted = paint(np.array([[-1.0, 0.0, 1.0, 2.5, 4.0, 9.0]]))[0].astype(int)
    assert predicted.sum(-1).min() > 0
    np.testing.assert_array_equal(predicted[0], predicted[2])
    np.testing.assert_array_equal(predicted[4], predicted[5])
    key = paint.key(())
    assert (key.unit, key.low, key.high) == ("metres", 1.0, 4.0)
    np.testing.assert_array_equal(key.colours[0], predicted[2])
    np.testing.assert_array_equal(key.colours[-1], predicted[4])


def test_a_scale_needs_something_measured() -> None:
    assert Metres().fitted([np.zeros((2, 2))]) == Metres()
    flat = Metres().fitted([np.full((2, 2), 2.0)])
    assert flat.near < flat.far


def test_classes_have_the_data_sets_colours_and_only_those_shown_are_named() -> None:
    colours = np.array([[10, 0, 0], [0, 20, 0], [0, 0, 30]], np.uint8)
    paint = ClassColours(3, ("wall", "floor"), colours)
    shown = np.array([[0, 2, 255]], np.uint8)
    np.testing.assert_array_equal(paint(shown)[0], [[10, 0, 0], [0, 0, 30], [0, 0, 0]])
    key = paint.key([shown])
    assert key.names == ("wall", "class 2")
    np.testing.assert_array_equal(key.colours, colours[[0, 2]])
    np.testing.assert_array_equal(ClassColours(3)(shown)[0, 1], painting.palette(3)[2])


def test_predicted_edges_are_ridges_and_labelled_ones_stay() -> None:
    across = np.exp(-(((np.arange(33) - 16) / 4.0) ** 2))
    blurred = np.repeat(across[None], 33, 0).astype(np.float32)
    inner = Edges()(blurred)[8:-8, :, 0]
    assert (np.count_nonzero(inner, axis=1) <= 2).all() and (inner[:, 16] > 235).all()
    flat = Edges()(np.full((33, 33), 0.7, np.float32))[..., 0]  # no ridge: a line, not a plane
    assert np.count_nonzero(flat) <= 33 and flat.max() == round(255 * 0.65)
    assert np.count_nonzero(Probability()(blurred)[8:-8, :, 0], axis=1).min() > 9
    label = np.array([[0, 1, 255]], np.uint8)
    np.testing.assert_array_equal(Edges().label(label)[0, :, 0], [0, 255, 128])


def test_keys_of_directions_are_the_colours_that_are_painted() -> None:
    key = Directions().key(())
    up = np.array([[[0.0, 1.0, 0.0]]])
    np.testing.assert_array_equal(key.colours[key.names.index("faces up")], Directions()(up)[0, 0])
    assert isinstance(Probability().key(()), Scale)
    assert painting.WordKey(lambda v: v).key(()) is None
