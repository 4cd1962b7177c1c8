"""Lamps, plants, screens, rugs, wall fixtures and small things."""

from __future__ import annotations

import numpy as np

from moezoo.domains.images.data.rooms import materials as mt
from moezoo.domains.images.data.rooms.palette import Palette, rgb
from moezoo.domains.images.data.rooms.piece import Furniture, Glow

Rng = np.random.Generator


def _shade(
    piece: Furniture, rng: Rng, looks: Palette, width: float, tall: float, y: float, on: float
) -> None:
    """A lamp shade around a bulb at height y; `on` is the bulb's strength."""
    warm = rgb(rng.uniform(0.05, 0.16), rng.uniform(0.05, 0.45), 1.0)
    tint = warm if rng.random() < 0.75 else looks.colour(0.4, 1.0)
    look = looks.add(mt.plain, [tint], scale=0.3, glow=1.6 * on)
    if rng.random() < 0.25:
        piece.ball((width, width, width), (0, y, 0), "shade", look)
    else:
        top = rng.uniform(0.45, 1.0)
        piece.tube((width, tall, width), (0, y, 0), "shade", look, top=top)
    if on:
        piece.glows.append(Glow((0.0, y, 0.0), on))


def floor_lamp(rng: Rng, looks: Palette, on: float = 1.0) -> Furniture:
    """A standing lamp."""
    height = rng.uniform(1.35, 1.75)
    piece = Furniture("lamp", "floor lamp", 0.42, 0.42, height)
    metal, width, tall = looks.paint(), rng.uniform(0.36, 0.52), rng.uniform(0.28, 0.42)
    piece.tube((0.3, 0.04, 0.3), (0, 0.02, 0), "pole", metal, top=0.85)
    piece.tube((0.045, height - 0.1, 0.045), (0, height / 2 - 0.05, 0), "pole", metal)
    _shade(piece, rng, looks, width, tall, height - tall / 2, on)
    return piece


def table_lamp(rng: Rng, looks: Palette, on: float = 1.0) -> Furniture:
    """A lamp that stands on furniture."""
    height = rng.uniform(0.42, 0.6)
    piece = Furniture("lamp", "table lamp", 0.22, 0.22, height)
    foot, tall = looks.hard(), height * rng.uniform(0.42, 0.55)
    low = height - tall
    if rng.random() < 0.5:
        piece.ball((0.17, low, 0.17), (0, low / 2, 0), "pole", foot)
    else:
        piece.tube((0.16, low, 0.16), (0, low / 2, 0), "pole", foot, top=rng.uniform(0.25, 0.6))
    _shade(piece, rng, looks, rng.uniform(0.26, 0.36), tall, height - tall / 2, on)
    return piece


def ceiling_lamp(rng: Rng, looks: Palette, on: float, drop: float) -> Furniture:
    """A lamp that hangs `drop` metres below the ceiling; its origin is on the ceiling."""
    piece = Furniture("lamp", "ceiling lamp", 0.4, 0.4, 0.0)
    width, tall = rng.uniform(0.38, 0.6), rng.uniform(0.18, 0.3)
    if drop > 0.25:
        piece.tube((0.03, drop, 0.03), (0, -drop / 2, 0), "pole", looks.paint())
    _shade(piece, rng, looks, width, tall, -drop - tall / 2, on)
    return piece


def plant(rng: Rng, looks: Palette, scale: float | None = None) -> Furniture:
    """A pot with a bush, long blades or a small tree."""
    scale = scale or rng.uniform(0.75, 1.25)
    piece = Furniture("plant", "plant", 0.5 * scale, 0.5 * scale, 1.1 * scale)
    pot, leaf, stem = looks.any(), looks.leaves(), looks.timber()
    deep, wide = 0.34 * scale, rng.uniform(0.28, 0.4) * scale
    shape = {"bottom": rng.uniform(0.6, 1.0)}
    piece.tube((wide, deep, wide), (0, deep / 2, 0), "pot", pot, **shape)
    kind = rng.integers(3)
    if kind == 0:
        for _ in range(int(rng.integers(6, 11))):
            x, z = rng.normal(0, 0.12, 2) * scale
            size = rng.uniform(0.18, 0.34) * scale
            y = deep + rng.uniform(0.05, 0.5) * scale
            at = (x, y, z)
            turn, tilt = rng.uniform(0, 3), rng.uniform(-0.6, 0.6)
            piece.ball((size, size * 0.75, size), at, "leaves", leaf, turn=turn, tilt=tilt)
    elif kind == 1:
        for k in range(int(rng.integers(7, 12))):
            turn, tilt = k * 2.4 + rng.uniform(-0.3, 0.3), rng.uniform(0.15, 0.85)
            long = rng.uniform(0.55, 0.9) * scale
            reach = long * 0.5
            x, z = np.sin(turn) * np.sin(tilt) * reach, np.cos(turn) * np.sin(tilt) * reach
            at = (x, deep + np.cos(tilt) * reach, z)
            size = (0.13 * scale, long, 0.03 * scale)
            piece.ball(size, at, "leaves", leaf, turn=turn, tilt=tilt)
    else:
        trunk = 0.45 * scale
        piece.tube((0.05, trunk, 0.05), (0, deep + trunk / 2, 0), "pole", stem)
        for _ in range(int(rng.integers(4, 8))):
            x, z = rng.normal(0, 0.1, 2) * scale
            y = deep + trunk + rng.uniform(-0.05, 0.25) * scale
            size = rng.uniform(0.26, 0.42) * scale
            piece.ball((size, size * 0.8, size), (x, y, z), "leaves", leaf)
    return piece


def screen_looks(rng: Rng, looks: Palette, width: float, tall: float) -> tuple[int, int]:
    """Looks of a screen's case and of what it shows; dark when switched off."""
    case = looks.add(mt.plain, [rgb(0, 0, rng.choice([0.1, 0.15, 0.8]))], gloss=0.3)
    extent = (width / 2, tall / 2)
    if rng.random() < 0.45:
        dark = [rgb(0.6, 0.2, 0.1), rgb(0.6, 0.1, 0.2), rgb(0.6, 0.1, 0.12)]
        picture = looks.add(mt.display, dark, gloss=0.8, extent=extent)
    else:
        colours = [looks.colour(0.2, 1.0) for _ in range(3)]
        kind = mt.display if rng.random() < 0.6 else mt.artwork
        picture = looks.add(kind, colours, glow=rng.uniform(0.7, 1.3), extent=extent)
    return case, picture


def screen(rng: Rng, looks: Palette, width: float | None = None) -> Furniture:
    """A television or monitor on a foot, switched on or off."""
    width = width or rng.uniform(0.8, 1.25)
    tall = width * rng.uniform(0.56, 0.64)
    noun = "television" if width > 0.76 else "monitor"
    piece = Furniture("screen", noun, width, 0.22, tall + 0.1)
    case, picture = screen_looks(rng, looks, width, tall)
    y = 0.08 + tall / 2
    piece.box((width, tall, 0.05), (0, y, 0), "frame", case)
    piece.box((width - 0.05, tall - 0.05, 0.02), (0, y, 0.022), "panel", picture)
    piece.box((width * 0.12, 0.12, 0.04), (0, 0.06, -0.02), "leg", case)
    piece.box((width * 0.4, 0.02, 0.2), (0, 0.01, 0), "leg", case)
    return piece


def small_thing(rng: Rng, looks: Palette) -> Furniture:
    """A vase, a bowl, a stack of books, a cup or a box for a table."""
    kind, look = rng.integers(5), looks.any()
    if kind == 0:
        piece = Furniture("object", "vase", 0.16, 0.16, 0.3)
        piece.tube((0.15, 0.22, 0.15), (0, 0.11, 0), "body", look, bottom=0.55)
        piece.ball((0.26, 0.24, 0.26), (0, 0.31, 0), "leaves", looks.leaves())
    elif kind == 1:
        piece = Furniture("object", "bowl", 0.26, 0.26, 0.1)
        piece.tube((0.3, 0.11, 0.3), (0, 0.055, 0), "body", look, bottom=0.5)
        piece.ball((0.16, 0.14, 0.16), (0.03, 0.12, 0), "body", looks.any())
    elif kind == 2:
        piece = Furniture("object", "stack of books", 0.25, 0.2, 0.15)
        for k in range(int(rng.integers(2, 5))):
            size = (rng.uniform(0.22, 0.3), 0.05, rng.uniform(0.17, 0.22))
            at = (0, 0.025 + 0.05 * k, 0)
            piece.box(size, at, "body", looks.any(), turn=rng.uniform(-0.4, 0.4))
    elif kind == 3:
        piece = Furniture("object", "pot", 0.2, 0.2, 0.2)
        piece.tube((0.2, 0.2, 0.2), (0, 0.1, 0), "body", look, top=rng.uniform(0.7, 1.0))
    else:
        piece = Furniture("object", "box", 0.24, 0.2, 0.18)
        piece.box((0.28, 0.18, 0.2), (0, 0.09, 0), "body", look, turn=rng.uniform(-0.5, 0.5))
    return piece


def crate(rng: Rng, looks: Palette) -> Furniture:
    """One to three boxes on the floor, stacked."""
    piece = Furniture("object", "boxes", 0.5, 0.45, 0.5)
    y, size = 0.0, rng.uniform(0.4, 0.58)
    for _ in range(int(rng.integers(1, 4))):
        tall = size * rng.uniform(0.5, 0.85)
        turn = rng.uniform(-0.5, 0.5)
        piece.box((size, tall, size * 0.8), (0, y + tall / 2, 0), "body", looks.any(), turn=turn)
        y, size = y + tall, size * rng.uniform(0.65, 0.9)
    piece.height = y
    return piece


def ball(rng: Rng, looks: Palette) -> Furniture:
    """A ball on the floor."""
    size = rng.uniform(0.24, 0.5)
    piece = Furniture("object", "ball", size, size, size)
    piece.ball((size, size, size), (0, size / 2, 0), "body", looks.any())
    return piece
