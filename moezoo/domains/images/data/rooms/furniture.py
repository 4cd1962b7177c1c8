"""Seats, beds, tables and storage."""

from __future__ import annotations

import numpy as np

from moezoo.domains.images.data.rooms import materials as mt
from moezoo.domains.images.data.rooms.palette import Palette
from moezoo.domains.images.data.rooms.piece import Furniture, Surface

Rng = np.random.Generator


def bed(rng: Rng, looks: Palette) -> Furniture:
    """A single or double bed; its head is at the back."""
    wide = rng.random() < 0.6
    width = rng.uniform(1.4, 1.8) if wide else rng.uniform(0.9, 1.1)
    depth, base = rng.uniform(1.95, 2.15), rng.uniform(0.22, 0.34)
    piece = Furniture("bed", "double bed" if wide else "bed", width, depth, 1.1)
    frame, sheet, cover = looks.hard(), looks.fabric(), looks.fabric()
    thick = rng.uniform(0.18, 0.28)
    if rng.random() < 0.5:
        piece.legs(width / 2 - 0.06, depth / 2 - 0.06, base, 0.07, frame, int(rng.integers(3)))
        piece.box((width, 0.1, depth), (0, base - 0.03, 0), "body", frame)
    else:
        piece.box((width, base, depth), (0, base / 2 + 0.02, 0), "body", frame)
    top = base + thick
    piece.box((width - 0.04, thick, depth - 0.08), (0, base + thick / 2, 0.02), "mattress", sheet)
    reach = depth * rng.uniform(0.55, 0.72)
    piece.box(
        (width + 0.02, thick * 0.8, reach),
        (0, top - thick * 0.4 + 0.03, depth / 2 - reach / 2),
        "mattress",
        cover,
    )
    head = rng.uniform(0.75, 1.2)
    piece.box((width + 0.06, head, 0.06), (0, head / 2, -depth / 2 - 0.01), "back", frame)
    pillow = looks.fabric()
    count = 2 if wide else 1
    for k in range(count):
        x = (k - (count - 1) / 2) * width * 0.47
        at = (x, top + 0.07, -depth / 2 + 0.28)
        piece.ball((width * 0.52 / count + 0.12, 0.2, 0.42), at, "pillow", pillow, tilt=0.25)
    return piece


def table(rng: Rng, looks: Palette, size: tuple[float, float, float] | None = None) -> Furniture:
    """A rectangular or round table with four legs, two panels or one column."""
    width, depth, height = size or (rng.uniform(1.1, 1.8), rng.uniform(0.7, 0.95), 0.75)
    noun = "coffee table" if height < 0.55 else "table"
    look = looks.hard()
    legs = look if rng.random() < 0.6 else looks.hard()
    thick = rng.uniform(0.03, 0.07)
    round_top = size is None and rng.random() < 0.3
    if round_top:
        width = depth = rng.uniform(0.95, 1.3)
    piece = Furniture("table", noun, width, depth, height)
    (piece.tube if round_top else piece.box)(
        (width, thick, depth), (0, height - thick / 2, 0), "top", look
    )
    low, pick = height - thick, rng.random()
    if round_top and pick < 0.6:
        piece.tube((0.12, low, 0.12), (0, low / 2, 0), "leg", legs)
        piece.tube((width * 0.55, 0.04, width * 0.55), (0, 0.02, 0), "leg", legs, top=0.8)
    elif pick < 0.75:
        inset = 0.32 if round_top else 0.46
        leg = rng.uniform(0.05, 0.09)
        piece.legs(width * inset, depth * inset * 0.95, low, leg, legs, int(rng.integers(3)))
    else:
        for side in (-1, 1):
            piece.box((0.05, low, depth * 0.9), (side * width * 0.44, low / 2, 0), "leg", legs)
    piece.surfaces.append(Surface(0, 0, width * 0.36, depth * 0.34, height))
    return piece


def coffee_table(rng: Rng, looks: Palette) -> Furniture:
    """A low table."""
    return table(rng, looks, (rng.uniform(0.9, 1.3), rng.uniform(0.5, 0.75), 0.42))


def desk(rng: Rng, looks: Palette) -> Furniture:
    """A writing table, sometimes with a drawer block under one side."""
    width, depth = rng.uniform(1.2, 1.7), rng.uniform(0.62, 0.8)
    piece = table(rng, looks, (width, depth, 0.74))
    piece.noun = "desk"
    if rng.random() < 0.6:
        side, look = rng.choice([-1, 1]), looks.hard()
        x = side * (width / 2 - 0.27)
        piece.box((0.4, 0.5, depth * 0.8), (x, 0.44, -0.02), "body", look, label="cabinet")
        for k in range(3):
            at = (x, 0.28 + k * 0.16, depth * 0.4 - 0.01)
            piece.box((0.36, 0.13, 0.03), at, "front", look, label="cabinet")
    return piece


def chair(rng: Rng, looks: Palette) -> Furniture:
    """A chair with a tilted back of slats, one panel or a frame; four legs or a swivel foot."""
    width, depth, seat = rng.uniform(0.42, 0.5), rng.uniform(0.42, 0.48), rng.uniform(0.42, 0.48)
    piece = Furniture("chair", "chair", width, depth, 0.95)
    frame = looks.hard()
    cushion = frame if rng.random() < 0.4 else looks.fabric()
    if rng.random() < 0.75:
        piece.legs(
            width / 2 - 0.03, depth / 2 - 0.03, seat - 0.02, 0.045, frame, int(rng.integers(3))
        )
    else:
        piece.tube((0.07, seat, 0.07), (0, seat / 2, 0), "leg", frame)
        for k in range(2):
            piece.box((0.5, 0.05, 0.06), (0, 0.05, 0), "leg", frame, turn=k * np.pi / 2 + 0.5)
    piece.box((width, 0.06, depth), (0, seat, 0), "seat", cushion)
    back, lean, z = rng.uniform(0.4, 0.58), -0.12, -depth / 2
    if rng.random() < 0.55:
        at = (0, seat + back / 2 + 0.05, z - 0.02)
        piece.box((width, back, 0.04), at, "back", cushion, tilt=lean)
    else:
        for side in (-1, 1):
            at = (side * (width / 2 - 0.02), seat + back / 2, z - 0.02)
            piece.box((0.04, back, 0.04), at, "back", frame, tilt=lean)
        for k in range(3):
            y = back * (0.35 + 0.3 * k)
            at = (0, seat + y, z - 0.02 + (y - back / 2) * np.tan(lean))
            piece.box((width - 0.06, 0.08, 0.03), at, "back", cushion, tilt=lean)
    if rng.random() < 0.2:
        for side in (-1, 1):
            at = (side * width / 2, seat + 0.22, 0)
            piece.box((0.05, 0.04, depth), at, "arm", frame)
            piece.box((0.04, 0.2, 0.04), (at[0], seat + 0.12, depth / 2 - 0.04), "arm", frame)
    return piece


def sofa(rng: Rng, looks: Palette, seats: int | None = None) -> Furniture:
    """A sofa with separate seat and back cushions; one seat makes an armchair."""
    seats = seats or int(rng.integers(2, 4))
    width = 0.3 + seats * rng.uniform(0.56, 0.68)
    depth, low = rng.uniform(0.8, 0.95), rng.uniform(0.06, 0.16)
    piece = Furniture("sofa", "armchair" if seats == 1 else "sofa", width, depth, 0.85)
    cloth, legs = looks.fabric() if rng.random() < 0.85 else looks.paint(), looks.hard()
    cushion = cloth if rng.random() < 0.6 else looks.fabric()
    arm, seat, back = rng.uniform(0.12, 0.2), 0.42, rng.uniform(0.72, 0.92)
    piece.legs(width / 2 - 0.08, depth / 2 - 0.08, low, 0.06, legs, 1)
    piece.box((width, 0.28 - low, depth), (0, low + (0.28 - low) / 2, 0), "body", cloth)
    piece.box(
        (width, back - 0.2, 0.2), (0, 0.2 + (back - 0.2) / 2, -depth / 2 + 0.1), "back", cloth
    )
    height = rng.uniform(0.52, 0.66)
    for side in (-1, 1):
        at = (side * (width / 2 - arm / 2), height / 2 + low / 2, 0.02)
        piece.box((arm, height - low, depth - 0.02), at, "arm", cloth)
    inner = (width - 2 * arm) / seats
    for k in range(seats):
        x = (k - (seats - 1) / 2) * inner
        piece.box((inner - 0.015, 0.15, depth - 0.22), (x, seat - 0.06, 0.11), "seat", cushion)
        at = (x, seat + 0.2, -depth / 2 + 0.27)
        piece.box((inner - 0.02, 0.36, 0.15), at, "back", cushion, tilt=-0.18)
    for _ in range(int(rng.integers(0, 3))):
        x = rng.uniform(-0.4, 0.4) * (width - 2 * arm - 0.3)
        at = (x, seat + 0.2, -depth / 2 + 0.42)
        piece.box((0.38, 0.36, 0.12), at, "pillow", looks.fabric(), tilt=-0.35, turn=0.1)
    return piece


def armchair(rng: Rng, looks: Palette) -> Furniture:
    """A sofa for one."""
    return sofa(rng, looks, 1)


def _fronts(
    piece: Furniture, rng: Rng, looks: Palette, columns: int, rows: int, low: float
) -> None:
    """A grid of doors or drawers with handles on the front of a cabinet."""
    front = looks.hard() if rng.random() < 0.5 else piece.solids[0].material
    knob = looks.paint()
    w, h = (piece.width - 0.02) / columns, (piece.height - low - 0.04) / rows
    z = piece.depth / 2
    upright = h > w
    for i in range(columns):
        for j in range(rows):
            x, y = (i - (columns - 1) / 2) * w, low + 0.01 + (j + 0.5) * h
            piece.box((w - 0.025, h - 0.025, 0.025), (x, y, z + 0.008), "front", front)
            offset = 0.35 * w * (1 if i % 2 == 0 else -1) if upright else 0.0
            size = (0.02, 0.14, 0.03) if upright else (0.14, 0.02, 0.03)
            piece.box(size, (x + offset, y, z + 0.03), "front", knob)


def cabinet(rng: Rng, looks: Palette) -> Furniture:
    """A chest of drawers or a sideboard."""
    width, depth, height = rng.uniform(0.8, 1.6), rng.uniform(0.4, 0.5), rng.uniform(0.6, 1.0)
    piece = Furniture("cabinet", "cabinet", width, depth, height)
    look, low = looks.hard(), rng.uniform(0.0, 0.14)
    piece.box((width, height - low - 0.03, depth), (0, (height + low - 0.03) / 2, 0), "body", look)
    top = look if rng.random() < 0.6 else looks.hard()
    piece.box((width + 0.03, 0.03, depth + 0.03), (0, height - 0.015, 0), "top", top)
    if low > 0.04:
        piece.legs(width / 2 - 0.05, depth / 2 - 0.05, low, 0.05, look, int(rng.integers(3)))
    columns = int(rng.integers(1, 4))
    _fronts(piece, rng, looks, columns, int(rng.integers(1 if columns > 1 else 2, 4)), low)
    piece.surfaces.append(Surface(0, 0, width * 0.38, depth * 0.3, height))
    return piece


def nightstand(rng: Rng, looks: Palette) -> Furniture:
    """A small cabinet beside a bed."""
    width, depth, height = rng.uniform(0.4, 0.5), 0.4, rng.uniform(0.45, 0.6)
    piece = Furniture("cabinet", "nightstand", width, depth, height)
    piece.box((width, height, depth), (0, height / 2, 0), "body", looks.hard())
    _fronts(piece, rng, looks, 1, int(rng.integers(1, 4)), 0.03)
    piece.surfaces.append(Surface(0, 0, width * 0.25, depth * 0.25, height))
    return piece


def wardrobe(rng: Rng, looks: Palette) -> Furniture:
    """A tall cabinet."""
    columns = int(rng.integers(2, 4))
    width, depth, height = columns * rng.uniform(0.45, 0.6), 0.58, rng.uniform(1.85, 2.2)
    piece = Furniture("cabinet", "wardrobe", width, depth, height)
    piece.box((width, height, depth), (0, height / 2, 0), "body", looks.hard())
    _fronts(piece, rng, looks, columns, 1, 0.08)
    return piece


def counter(rng: Rng, looks: Palette) -> Furniture:
    """A row of kitchen units."""
    units = int(rng.integers(2, 5))
    width, depth, height = units * 0.55, 0.6, 0.9
    piece = Furniture("cabinet", "kitchen counter", width, depth, height)
    piece.box((width, height - 0.04, depth - 0.03), (0, height / 2 - 0.02, 0), "body", looks.hard())
    piece.box((width + 0.02, 0.04, depth + 0.02), (0, height - 0.02, 0.01), "top", looks.hard())
    _fronts(piece, rng, looks, units, int(rng.integers(1, 3)), 0.1)
    piece.surfaces.append(Surface(0, 0, width * 0.4, 0.18, height))
    return piece


def shelf(rng: Rng, looks: Palette) -> Furniture:
    """An open bookcase with rows of books and a few things."""
    width, depth = rng.uniform(0.7, 1.3), rng.uniform(0.28, 0.38)
    rows = int(rng.integers(3, 6))
    height = rows * rng.uniform(0.34, 0.42) + 0.08
    piece = Furniture("shelf", "bookshelf", width, depth, height)
    look = looks.hard()
    for side in (-1, 1):
        at = (side * (width / 2 - 0.015), height / 2, 0)
        piece.box((0.03, height, depth), at, "body", look)
    if rng.random() < 0.7:
        piece.box((width, height, 0.02), (0, height / 2, -depth / 2 + 0.01), "back", look)
    step = (height - 0.08) / rows
    for k in range(rows + 1):
        piece.box((width, 0.03, depth), (0, 0.06 + k * step, 0), "board", look)
    for k in range(rows):
        if rng.random() < 0.8:
            colours = [looks.colour() for _ in range(3)]
            books = looks.add(mt.spines, colours, scale=rng.uniform(0.03, 0.06))
            length, tall = rng.uniform(0.35, 0.95) * (width - 0.1), step * rng.uniform(0.6, 0.82)
            x = rng.uniform(-0.5, 0.5) * (width - 0.08 - length)
            at = (x, 0.075 + k * step + tall / 2, -0.03)
            piece.box((length, tall, depth * 0.7), at, "panel", books)
    piece.surfaces.append(Surface(0, 0, width * 0.35, depth * 0.2, height - 0.005))
    return piece
