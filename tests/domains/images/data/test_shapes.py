"""Ray intersections against the definition of each solid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.domains.images.data.rooms.shapes import (
    BOX,
    ELLIPSOID,
    FRUSTUM,
    Solid,
    hit,
    table,
    tilt_x,
    turn_y,
    unit_normals,
)

NEAR = 0.05
SLOPE = np.array([0.7, -0.3], np.float32)  # radius 1 at the bottom, 0.4 at the top


def depth_inside(kind: int, p: np.ndarray) -> np.ndarray:
    """Positive inside the unit solid, negative outside."""
    x, y, z = p
    if kind == BOX:
        return 1 - np.abs(p).max(0)
    if kind == ELLIPSOID:
        return 1 - np.sqrt((p * p).sum(0))
    return np.minimum(1 - np.abs(y), SLOPE[0] + SLOPE[1] * y - np.hypot(x, z))


def rays(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """200 rays from a shell around the solid towards points near it."""
    rng = np.random.default_rng(seed)
    o = rng.normal(size=(3, 200))
    o *= rng.uniform(2.0, 4.0, 200) / np.linalg.norm(o, axis=0)
    d = rng.uniform(-1.2, 1.2, (3, 200)) - o
    return o.astype(np.float32), d.astype(np.float32)


@pytest.mark.parametrize("kind", [BOX, ELLIPSOID, FRUSTUM])
@given(seed=st.integers(0, 10_000))
def test_first_hit_is_the_entry(kind: int, seed: int) -> None:
    o, d = rays(seed)
    t = hit(kind, tuple(o), tuple(d), NEAR, SLOPE)
    steps = np.linspace(0, 2, 600, dtype=np.float32)[:, None]
    inside = depth_inside(kind, np.moveaxis(o + steps[..., None].swapaxes(1, 2) * d, 1, 0)) > 1e-3
    met = np.isfinite(t)
    assert met[inside.any(0)].all()
    surface = (o + np.where(met, t, 0) * d)[:, met]
    assert np.abs(depth_inside(kind, surface)).max(initial=0) < 1e-3
    assert not (inside & (steps < t - 1e-3)).any()


@pytest.mark.parametrize("kind", [BOX, ELLIPSOID, FRUSTUM])
@given(seed=st.integers(0, 10_000))
def test_normals_point_away_from_the_inside(kind: int, seed: int) -> None:
    o, d = rays(seed)
    t = hit(kind, tuple(o), tuple(d), NEAR, SLOPE)
    p = (o + np.where(np.isfinite(t), t, 0) * d)[:, np.isfinite(t)]
    n = unit_normals(np.full(p.shape[1], kind), p, np.tile(SLOPE, (p.shape[1], 1)))
    n = n / np.linalg.norm(n, axis=0)
    assert ((n * d[:, np.isfinite(t)]).sum(0) < 1e-4).all()
    assert (depth_inside(kind, p + 0.01 * n) < depth_inside(kind, p - 0.01 * n)).all()


def test_rays_that_start_behind_or_inside_do_not_hit() -> None:
    away = (np.float32(0), np.float32(0), np.float32(3)), (np.float32(1e-3),) * 2 + (np.float32(1),)
    inside = (np.float32(0.1),) * 3, (np.float32(0.3), np.float32(0.2), np.float32(1))
    for kind in (BOX, ELLIPSOID):
        assert np.isinf(hit(kind, *away, NEAR, SLOPE))
        assert np.isinf(hit(kind, *inside, NEAR, SLOPE))


def test_solids_keep_their_shape_when_moved() -> None:
    rotation = turn_y(0.7) @ tilt_x(0.2)
    half = np.array([0.5, 0.2, 0.3])
    solid = Solid(BOX, np.array([1.0, 0.5, -2.0]), rotation, half, 0, 8, 5, 0)
    turn, offset = turn_y(-1.1), np.array([3.0, 0.0, 1.0])
    moved = solid.moved(turn, offset, instance=4)
    assert moved.instance == 4 and moved.semantic == 8 and moved.part == 5
    corner = rotation @ (half * [1, -1, 1]) + solid.centre
    unit = table([moved]).unit_S33[0] @ (turn @ corner + offset - moved.centre)
    np.testing.assert_allclose(unit, [1, -1, 1], atol=1e-5)
