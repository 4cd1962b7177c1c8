"""A scene from (seed, split, index): room, furniture, lamps, camera.

The draw does not depend on the resolution: a small fixed probe decides whether the view is good.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from moezoo.domains.images.data.rooms import fixtures, props
from moezoo.domains.images.data.rooms.camera import Camera, look
from moezoo.domains.images.data.rooms.layout import FloorPlan, Placed
from moezoo.domains.images.data.rooms.lighting import Lighting, light_scene
from moezoo.domains.images.data.rooms.materials import Material
from moezoo.domains.images.data.rooms.names import CLASS, SCENES
from moezoo.domains.images.data.rooms.palette import Palette
from moezoo.domains.images.data.rooms.recipes import RECIPES, common
from moezoo.domains.images.data.rooms.shapes import PLANE, Solid, Solids, table
from moezoo.domains.images.data.rooms.visibility import cast


@dataclass(frozen=True)
class Scene:
    """Everything that a renderer needs, and what the caption says."""

    kind: int  # index into SCENES
    size: np.ndarray  # width, height, depth of the room in metres
    camera: Camera
    table: Solids
    materials: list[Material]
    placed: list[Placed]  # placed[i] is instance i + 1; instance 0 is the shell of the room
    lighting: Lighting
    noise_seed: int


def generator(seed: int, split: str, index: int, attempt: int = 0) -> np.random.Generator:
    """The random stream of one scene, the same on every machine and process."""
    return np.random.default_rng([seed, crc32(split.encode()), index, attempt])


def _shell(size: np.ndarray, looks: Palette) -> list[Solid]:
    """Floor, ceiling and four walls; the column 1 of `rotation` is the normal into the room."""
    wall = looks.wall()
    accent = looks.wall() if looks.rng.random() < 0.35 else wall
    w, h, d = size
    sides = [
        ((w / 2, 0, d / 2), (0, 1, 0), "floor", looks.floor()),
        ((w / 2, h, d / 2), (0, -1, 0), "ceiling", looks.ceiling()),
        ((0, h / 2, d / 2), (1, 0, 0), "wall", wall),
        ((w, h / 2, d / 2), (-1, 0, 0), "wall", wall),
        ((w / 2, h / 2, 0), (0, 0, 1), "wall", wall),
        ((w / 2, h / 2, d), (0, 0, -1), "wall", accent),
    ]
    solids = []
    for centre, normal, name, look_index in sides:
        rotation = np.zeros((3, 3))
        rotation[:, 1] = normal
        solids.append(
            Solid(
                PLANE, np.array(centre, float), rotation, np.ones(3), look_index, CLASS[name], 0, 0
            )
        )
    return solids


def _camera(rng: np.random.Generator, size: np.ndarray) -> Camera:
    """A viewer near the front wall who looks into the room, slightly down."""
    x, z = rng.uniform(0.15, 0.85) * size[0], rng.uniform(0.12, 0.75)
    eye = np.array([x, rng.uniform(1.2, 1.8), z])
    target = np.array([rng.uniform(0.25, 0.75) * size[0], 0.62 * size[2]])
    yaw = np.arctan2(target[0] - x, target[1] - z) + rng.uniform(-0.3, 0.3)
    pitch, roll = rng.uniform(-0.36, -0.09), rng.normal(0, 0.012)
    half = np.radians(rng.uniform(54, 74)) / 2
    return look(eye, yaw, pitch, roll, 1 / np.tan(half))


def _fill(room: FloorPlan, kind: int, daylight: float, lamps: float) -> list[Placed]:
    """Openings first, then furniture, then everything that hangs."""
    rng, looks = room.rng, room.looks
    windows = []
    for _ in range(int(rng.choice([0, 1, 1, 2, 2]))):
        pane = fixtures.window(rng, looks, daylight, room.size[1])
        placed = room.hang(pane, pane.height, room.size[1], ("back", "left", "right"))
        windows += [placed] if placed else []
    if rng.random() < 0.6:
        entry = fixtures.door(rng, looks)
        room.hang(entry, 0.0, entry.height, ("back", "left", "right"))
    RECIPES[kind](room, lamps)
    common(room, lamps)
    drop = rng.uniform(0.05, 0.6)
    if rng.random() < 0.65:
        lamp = props.ceiling_lamp(rng, looks, 1.3 * lamps, drop)
        x, far = room.size[0] * rng.uniform(0.35, 0.65), room.size[2] * rng.uniform(0.45, 0.75)
        z = max(far, room.eye_xz[1] + 1.8)  # a lamp right above the viewer would fill the image
        room.placed.append(Placed(lamp, x, float(room.size[1]), z, 0.0))
    return windows


def draw(rng: np.random.Generator) -> Scene:
    """One random scene, good or bad."""
    kind = int(rng.integers(len(SCENES)))
    size = np.array([rng.uniform(3.1, 4.8), rng.uniform(2.4, 2.8), rng.uniform(3.6, 5.2)])
    looks, camera = Palette(rng), _camera(rng, size)
    daylight = float(rng.choice([0.0, rng.uniform(0.4, 1.0)], p=[0.3, 0.7]))
    lamps = float(rng.random() < (0.4 if daylight else 1.0))
    room = FloorPlan(rng, looks, size, camera.eye[[0, 2]])
    solids = _shell(size, looks)
    windows = _fill(room, kind, daylight, lamps)
    for instance, p in enumerate(room.placed, start=1):
        solids += p.piece.placed(p.x, p.y, p.z, p.yaw, instance)
    lighting = light_scene(rng, size, room.placed, windows, daylight, lamps)
    seed = int(rng.integers(2**31))
    return Scene(kind, size, camera, table(solids), looks.materials, room.placed, lighting, seed)


def worth_seeing(scene: Scene) -> bool:
    """Whether the view shows a room: distant enough, several objects, nothing fills the image."""
    seen = cast(scene.table, scene.camera, 24, 24, factor=1)
    instance = scene.table.instance_S[seen.solid_HW]
    semantic = scene.table.semantic_S[seen.solid_HW]
    shares = np.bincount(instance.ravel(), minlength=len(scene.placed) + 1)[1:] / instance.size
    solid = [p.piece.name not in ("rug", "window", "door", "picture") for p in scene.placed]
    shares = shares * np.array(solid, bool)
    return bool(
        np.median(seen.depth_HW) > 1.7
        and seen.depth_HW.min() > 0.5
        and (shares > 0.015).sum() >= 3
        and shares.sum() > 0.12
        and shares.max() < 0.4
        and (semantic == CLASS["floor"]).mean() > 0.04
        and np.bincount(semantic.ravel()).max() < 0.6 * semantic.size
    )


def sample(seed: int, split: str, index: int) -> Scene:
    """The scene of (seed, split, index): the first of its draws that is worth seeing."""
    for attempt in range(50):
        scene = draw(generator(seed, split, index, attempt))
        if worth_seeing(scene):
            return scene
    raise RuntimeError(f"no usable view for scene {split}/{index} of seed {seed}")
