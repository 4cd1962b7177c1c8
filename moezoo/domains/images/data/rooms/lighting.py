"""Where the light of a room comes from: lamps, windows, the sun, the walls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moezoo.domains.images.data.rooms.layout import Placed
from moezoo.domains.images.data.rooms.palette import rgb
from moezoo.domains.images.data.rooms.shapes import turn_y


@dataclass(frozen=True)
class Light:
    """A parallelogram (or a ball, when `normal` is zero) that shines into the room.

    `sides` are the two half extents as vectors in metres; `instance` casts no shadow in this light.
    """

    centre: np.ndarray
    sides: np.ndarray
    normal: np.ndarray
    colour: np.ndarray
    instance: int


@dataclass(frozen=True)
class Sun:
    """Parallel light through a window: direction towards the sun, and the pane it passes."""

    direction: np.ndarray
    pane: Light
    colour: np.ndarray


@dataclass(frozen=True)
class Lighting:
    """All lights of a scene, the ambient colour and how the picture is exposed."""

    lights: tuple[Light, ...]
    suns: tuple[Sun, ...]
    ambient: np.ndarray
    exposure: float
    white: np.ndarray
    grain: float
    daylight: float


def _bulb(placed: Placed, instance: int, colour: np.ndarray) -> list[Light]:
    lights = []
    for glow in placed.piece.glows:
        moved = turn_y(placed.yaw) @ np.array(glow.position)
        centre = np.array([placed.x, placed.y, placed.z]) + moved
        sides = np.array([[0.12, 0, 0], [0, 0, 0.12]])
        lights.append(Light(centre, sides, np.zeros(3), 2.2 * glow.strength * colour, instance))
    return lights


def _pane(window: Placed, instance: int, colour: np.ndarray) -> Light:
    """The glass of a window as a light; its size is that of the glass solid."""
    glass = window.piece.solids[0]
    rotation = turn_y(window.yaw)
    centre = rotation @ (glass.centre + np.array([0, 0, 0.1]))
    centre = centre + np.array([window.x, window.y, window.z])
    sides = np.stack([rotation[:, 0] * glass.half[0], rotation[:, 1] * glass.half[1]])
    area = 4 * glass.half[0] * glass.half[1]
    return Light(centre, sides, rotation[:, 2], 2.6 * area * colour, instance)


def light_scene(
    rng: np.random.Generator,
    size: np.ndarray,
    placed: list[Placed],
    windows: list[Placed],
    daylight: float,
    lamps: float,
) -> Lighting:
    """Choose lights; at most four cast shadows, and a room is never black."""
    warm = rgb(rng.uniform(0.05, 0.13), rng.uniform(0.05, 0.4), 1.0)
    sky = rgb(rng.uniform(0.5, 0.65), rng.uniform(0.0, 0.25), 1.0)
    lights: list[Light] = []
    suns: list[Sun] = []
    for window in windows if daylight else []:
        pane = _pane(window, placed.index(window) + 1, daylight * sky)
        lights.append(pane)
        if not suns and rng.random() < 0.45:
            side = rng.uniform(-0.7, 0.7) * pane.sides[0] / np.linalg.norm(pane.sides[0])
            towards = -pane.normal + side + np.array([0, rng.uniform(0.5, 1.1), 0])
            glare = 3.0 * daylight * rgb(0.12, rng.uniform(0.1, 0.35), 1.0)
            suns.append(Sun(towards / np.linalg.norm(towards), pane, glare))
    for instance, p in enumerate(placed, start=1):
        lights += _bulb(p, instance, warm)
    if not lights or (lamps and rng.random() < 0.5) or rng.random() < 0.3:
        x, z = rng.uniform(0.25, 0.75) * size[0], rng.uniform(0.2, 0.7) * size[2]
        sides = np.array([[0.25, 0, 0], [0, 0, 0.25]])
        centre, down = np.array([x, size[1] - 0.05, z]), np.array([0.0, -1.0, 0.0])
        lights.append(Light(centre, sides, down, rng.uniform(2.5, 5.0) * warm, 0))
    lights.sort(key=lambda light: -float(light.colour.sum()))
    ambient = rng.uniform(0.12, 0.32) * (0.5 * warm + 0.5 * sky)
    return Lighting(
        tuple(lights[:4]),
        tuple(suns),
        ambient,
        exposure=float(rng.uniform(0.8, 1.25)),
        white=rng.uniform(0.92, 1.08, 3).astype(np.float32),
        grain=float(rng.uniform(0.004, 0.018)),
        daylight=daylight,
    )
