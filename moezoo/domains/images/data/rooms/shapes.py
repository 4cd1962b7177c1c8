"""Solids and their exact intersections with rays, in each solid's own unit space.

A solid is a unit shape under a similarity: world point = centre + rotation (half * unit point).
The map is affine, so the ray parameter t is the same in both spaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PLANE, BOX, FRUSTUM, ELLIPSOID = range(4)


@dataclass(frozen=True)
class Solid:
    """One primitive: geometry, look and labels.

    `half` are half extents in metres. A frustum stands along its own y axis and its radius grows
    linearly from `bottom` to `top` (fractions of half x and half z). A plane is a wall of the room.
    """

    kind: int
    centre: np.ndarray
    rotation: np.ndarray
    half: np.ndarray
    material: int
    semantic: int
    part: int
    instance: int
    bottom: float = 1.0
    top: float = 1.0

    def moved(self, rotation: np.ndarray, offset: np.ndarray, instance: int) -> Solid:
        """The same solid after a rigid motion, as part of `instance`."""
        centre, turned = rotation @ self.centre + offset, rotation @ self.rotation
        look = (self.half, self.material, self.semantic, self.part)
        return Solid(self.kind, centre, turned, *look, instance, self.bottom, self.top)


def turn_y(angle: float) -> np.ndarray:
    """Rotation [3,3] about the vertical axis; 0 keeps the front at +z, pi/2 turns it to +x."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def tilt_x(angle: float) -> np.ndarray:
    """Rotation [3,3] about x; a positive angle leans the top towards +z."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


class Solids(NamedTuple):
    """All solids of a scene as arrays, S of them."""

    kind_S: np.ndarray  # int8
    centre_S3: np.ndarray  # float32 metres
    rotation_S33: np.ndarray  # float32, columns are the solid's axes
    half_S3: np.ndarray  # float32 metres
    unit_S33: np.ndarray  # float32, world direction -> unit space
    slope_S2: np.ndarray  # float32, frustum radius = a + b y in unit space
    material_S: np.ndarray  # int32
    semantic_S: np.ndarray  # uint8
    part_S: np.ndarray  # uint8
    instance_S: np.ndarray  # int32


def table(solids: list[Solid]) -> Solids:
    """Stack solids into arrays."""
    rotation = np.array([s.rotation for s in solids])
    half = np.array([s.half for s in solids])
    slope = np.array([((s.bottom + s.top) / 2, (s.top - s.bottom) / 2) for s in solids])
    return Solids(
        kind_S=np.array([s.kind for s in solids], np.int8),
        centre_S3=np.array([s.centre for s in solids], np.float32),
        rotation_S33=rotation.astype(np.float32),
        half_S3=half.astype(np.float32),
        unit_S33=(np.swapaxes(rotation, 1, 2) / half[:, :, None]).astype(np.float32),
        slope_S2=slope.astype(np.float32),
        material_S=np.array([s.material for s in solids], np.int32),
        semantic_S=np.array([s.semantic for s in solids], np.uint8),
        part_S=np.array([s.part for s in solids], np.uint8),
        instance_S=np.array([s.instance for s in solids], np.int32),
    )


Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def hit_box(o: Triple, d: Triple, near: float) -> np.ndarray:
    """Entry parameter t of rays o + t d into the cube [-1,1]^3; inf where missed or t <= near."""
    enter, leave = np.float32(-np.inf), np.float32(np.inf)
    for o_i, d_i in zip(o, d, strict=True):
        inverse = 1.0 / d_i
        middle, reach = -o_i * inverse, np.abs(inverse)
        first, last = middle - reach, middle + reach
        enter, leave = np.maximum(enter, first), np.minimum(leave, last)
    return np.where((enter <= leave) & (enter > near), enter, np.float32(np.inf))


def hit_ellipsoid(o: Triple, d: Triple, near: float) -> np.ndarray:
    """Entry parameter t into the unit ball; inf where missed or t <= near."""
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    c = o[0] * o[0] + o[1] * o[1] + o[2] * o[2] - 1.0
    square = b * b - a * c
    t = (-b - np.sqrt(np.maximum(square, 0.0))) / a
    return np.where((square > 0) & (t > near), t, np.float32(np.inf))


def hit_frustum(o: Triple, d: Triple, near: float, slope: np.ndarray) -> np.ndarray:
    """Entry parameter t into the capped cone |(x,z)| <= a + b y, |y| <= 1; inf where missed."""
    radius, growth = slope[0], slope[1]
    edge_o, edge_d = radius + growth * o[1], growth * d[1]
    a = d[0] * d[0] + d[2] * d[2] - edge_d * edge_d
    b = o[0] * d[0] + o[2] * d[2] - edge_o * edge_d
    c = o[0] * o[0] + o[2] * o[2] - edge_o * edge_o
    root = np.sqrt(np.maximum(b * b - a * c, 0.0))
    real = b * b - a * c > 0
    best = np.full(np.broadcast(a, b).shape, np.inf, np.float32)
    for t in ((-b - root) / a, (-b + root) / a):
        inside = np.abs(o[1] + t * d[1]) <= 1.0
        best = np.where(real & inside & (t > near) & (t < best), t, best)
    for cap in (-1.0, 1.0):
        t = (cap - o[1]) / d[1]
        x, z = o[0] + t * d[0], o[2] + t * d[2]
        inside = x * x + z * z <= (radius + growth * cap) ** 2
        best = np.where(inside & (t > near) & (t < best), t, best)
    return best


def hit(kind: int, o: Triple, d: Triple, near: float, slope: np.ndarray) -> np.ndarray:
    """Entry parameter of rays (unit space) into a solid of the given kind."""
    if kind == BOX:
        return hit_box(o, d, near)
    if kind == ELLIPSOID:
        return hit_ellipsoid(o, d, near)
    return hit_frustum(o, d, near, slope)


def unit_normals(kind_N: np.ndarray, p_3N: np.ndarray, slope_N2: np.ndarray) -> np.ndarray:
    """Outward gradients [3,N] in unit space at surface points p (planes excluded)."""
    axis = np.abs(p_3N).argmax(axis=0)
    sign = np.sign(p_3N) * (np.arange(3)[:, None] == axis)
    grow = slope_N2[:, 0] + slope_N2[:, 1] * p_3N[1]
    side = np.stack([p_3N[0], -slope_N2[:, 1] * grow, p_3N[2]])
    radial = np.hypot(p_3N[0], p_3N[2])
    on_cap = np.abs(np.abs(p_3N[1]) - 1) < np.abs(radial - np.abs(grow))
    cap = np.stack([np.zeros_like(grow), np.sign(p_3N[1]), np.zeros_like(grow)])
    frustum = np.where(on_cap, cap, side)
    return np.where(kind_N == BOX, sign, np.where(kind_N == FRUSTUM, frustum, p_3N))
