"""What hangs on walls or lies on the floor: windows, doors, pictures, rugs.

A wall fixture's frame has its origin on the wall at floor level, x along the wall and z into the
room.
"""

from __future__ import annotations

import numpy as np

from moezoo.domains.images.data.rooms import materials as mt
from moezoo.domains.images.data.rooms.palette import Palette, rgb
from moezoo.domains.images.data.rooms.piece import Furniture
from moezoo.domains.images.data.rooms.props import screen_looks

Rng = np.random.Generator


def window(rng: Rng, looks: Palette, daylight: float, room_height: float) -> Furniture:
    """A window with frame, bars, sill and sometimes curtains; `daylight` 0 is night."""
    width, low = rng.uniform(0.9, 1.9), rng.uniform(0.6, 0.95)
    tall = min(rng.uniform(1.0, 1.5), room_height - low - 0.25)
    piece = Furniture("window", "window", width + 0.1, 0.1, low)
    sky = rgb(rng.uniform(0.52, 0.65), rng.uniform(0.1, 0.6), 0.35 + 0.6 * min(daylight, 1.0))
    land = looks.colour(0.1, 0.6)
    night = rgb(rng.uniform(0.55, 0.75), 0.5, rng.uniform(0.05, 0.2))
    colours = [sky, land] if daylight else [night, night * 0.5]
    extent = (width / 2, tall / 2)
    glass = looks.add(
        mt.outdoors if daylight else mt.artwork,
        [*colours, night],
        glow=1.1 * daylight + 0.05,
        gloss=0.5,
        extent=extent,
    )
    y, frame = low + tall / 2, looks.hard()
    piece.box((width, tall, 0.02), (0, y, 0.01), "panel", glass)
    for side in (-1, 1):
        piece.box((0.06, tall + 0.12, 0.06), (side * width / 2, y, 0.03), "frame", frame)
        piece.box((width, 0.06, 0.06), (0, y + side * tall / 2, 0.03), "frame", frame)
    for k in range(1, int(rng.integers(1, 4))):
        x = (k / 2 - 0.5) * width * 0.66 if k < 3 else 0.0
        piece.box((0.04, tall, 0.045), (x + width / 6 * (k == 1), y, 0.03), "frame", frame)
    if rng.random() < 0.5:
        piece.box((width, 0.04, 0.045), (0, low + tall * 0.66, 0.03), "frame", frame)
    piece.box((width + 0.16, 0.04, 0.16), (0, low - 0.04, 0.08), "frame", frame)
    if rng.random() < 0.45:
        _curtains(piece, rng, looks, width, low, tall)
    return piece


def _curtains(
    piece: Furniture, rng: Rng, looks: Palette, width: float, low: float, tall: float
) -> None:
    """Two curtains made of round folds, and their rod."""
    cloth = looks.fabric()
    reach, floor = rng.uniform(0.18, 0.34), rng.choice([0.06, low - 0.12])
    high = low + tall + 0.1
    for side in (-1, 1):
        for k in range(4):
            x = side * (width / 2 + 0.08 - (k + 0.5) * reach / 4)
            size = (reach / 4 * 1.15, high - floor, 0.08)
            piece.tube(size, (x, (high + floor) / 2, 0.12), "front", cloth)
    piece.box((width + 0.4, 0.03, 0.03), (0, high, 0.12), "frame", looks.paint())
    piece.width = width + 0.4


def door(rng: Rng, looks: Palette) -> Furniture:
    """A closed door with its frame and handle."""
    width, tall = rng.uniform(0.8, 1.0), rng.uniform(1.95, 2.1)
    piece = Furniture("door", "door", width + 0.2, 0.08, tall + 0.1)
    base = looks.materials[looks.hard()].colours[0]
    leaf = looks.add(mt.panels, [base], extent=(width / 2, tall / 2), gloss=0.1)
    frame = looks.hard()
    piece.box((width, tall, 0.04), (0, tall / 2, 0.01), "panel", leaf)
    for side in (-1, 1):
        piece.box(
            (0.09, tall + 0.09, 0.06), (side * (width / 2 + 0.04), tall / 2, 0.03), "frame", frame
        )
    piece.box((width + 0.17, 0.09, 0.06), (0, tall + 0.045, 0.03), "frame", frame)
    side = rng.choice([-1, 1])
    piece.box((0.12, 0.03, 0.07), (side * width * 0.4, 1.0, 0.06), "front", looks.paint())
    return piece


def picture(rng: Rng, looks: Palette) -> Furniture:
    """A framed picture."""
    width, tall = rng.uniform(0.45, 1.1), rng.uniform(0.4, 0.85)
    centre = rng.uniform(1.45, 1.75)
    piece = Furniture("picture", "picture", width, 0.04, centre - tall / 2)
    canvas = looks.add(
        mt.artwork, [looks.colour(0.15, 1.0) for _ in range(3)], extent=(width / 2, tall / 2)
    )
    frame = looks.hard()
    border = rng.uniform(0.04, 0.09)
    piece.box((width, tall, 0.03), (0, centre, 0.015), "frame", frame)
    size = (width - 2 * border, tall - 2 * border, 0.01)
    piece.box(size, (0, centre, 0.03), "panel", canvas)
    return piece


def wall_screen(rng: Rng, looks: Palette) -> Furniture:
    """A television on the wall."""
    width, centre = rng.uniform(0.9, 1.3), rng.uniform(1.3, 1.6)
    tall = width * 0.58
    piece = Furniture("screen", "television", width, 0.06, centre - tall / 2)
    case, picture = screen_looks(rng, looks, width, tall)
    piece.box((width, tall, 0.05), (0, centre, 0.03), "frame", case)
    piece.box((width - 0.05, tall - 0.05, 0.02), (0, centre, 0.05), "panel", picture)
    return piece


def rug(rng: Rng, looks: Palette) -> Furniture:
    """A flat rug, rectangular or round."""
    width, depth = rng.uniform(1.6, 2.6), rng.uniform(1.2, 1.9)
    piece = Furniture("rug", "rug", width, depth, 0.0)
    size = (width, 0.008, depth)
    if rng.random() < 0.6:
        colours = [looks.colour() for _ in range(3)]
        scale, extent = rng.uniform(0.2, 0.5), (width / 2, depth / 2)
        look = looks.add(mt.bordered, colours, scale=scale, extent=extent)
    else:
        look = looks.fabric()
    (piece.box if rng.random() < 0.75 else piece.tube)(size, (0, 0.004, 0), "background", look)
    return piece
