"""Shadows: bounding boxes lose nothing, and spreading keeps surfaces apart."""

from __future__ import annotations

import numpy as np

from moezoo.domains.images.data.rooms.scene import Scene
from moezoo.domains.images.data.rooms.shadows import Blockers, Lattice
from moezoo.domains.images.data.rooms.shapes import PLANE, hit


def segments(scene: Scene, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    start = (rng.random((3, count)) * scene.size[:, None]).astype(np.float32)
    end = (rng.random((3, count)) * scene.size[:, None]).astype(np.float32)
    return start, end - start


def test_shadows_equal_testing_every_solid(scenes: list[Scene]) -> None:
    for scene in scenes[:6]:
        table = scene.table
        start, ray = segments(scene)
        skip = 2
        expected = np.zeros(start.shape[1], bool)
        for k in np.flatnonzero((table.kind_S != PLANE) & (table.instance_S != skip)):
            o = table.unit_S33[k] @ (start - table.centre_S3[k][:, None])
            d = table.unit_S33[k] @ ray
            expected |= (
                hit(int(table.kind_S[k]), tuple(o), tuple(d), 1e-3, table.slope_S2[k]) < 0.999
            )
        found = Blockers(table).shadowed(start, ray, skip)
        assert 0.05 < expected.mean() < 0.95
        assert (found == expected).mean() > 0.995


def test_spreading_keeps_constants_and_never_mixes_solids_that_have_centres() -> None:
    shape = (9, 13)
    solid = np.zeros(shape, int)
    solid[:, 7:] = 1
    lattice = Lattice(solid.ravel(), shape)
    ones = np.ones(len(lattice.centre_M), np.float32)
    np.testing.assert_allclose(lattice.spread(ones), 1, atol=1e-6)
    np.testing.assert_allclose(lattice.smooth(ones), 1, atol=1e-6)
    lit = (solid.ravel()[lattice.centre_M] == 0).astype(np.float32)
    spread = lattice.spread(lattice.smooth(lit)).reshape(shape)
    np.testing.assert_allclose(spread[:, :7], 1, atol=1e-3)
    np.testing.assert_allclose(spread[:, 7:], 0, atol=1e-3)
