"""What belongs into a bedroom, a living room, an office, a dining room and a playroom."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moezoo.domains.images.data.rooms import fixtures, furniture, props
from moezoo.domains.images.data.rooms.layout import FloorPlan, Placed
from moezoo.domains.images.data.rooms.piece import Furniture


def maybe(room: FloorPlan, chance: float) -> bool:
    """True with the given probability."""
    return bool(room.rng.random() < chance)


def decorate(room: FloorPlan, placed: Placed | None, count: int) -> None:
    """Put up to `count` small things on a piece."""
    for _ in range(count):
        if maybe(room, 0.75):
            room.put(placed, props.small_thing(room.rng, room.looks))


def carpet(room: FloorPlan, x: float, z: float, chance: float, yaw: float = 0.0) -> None:
    """Lay a rug around a point."""
    if maybe(room, chance):
        room.lay(fixtures.rug(room.rng, room.looks), x, z, yaw + room.rng.uniform(-0.08, 0.08))


def common(room: FloorPlan, on: float) -> None:
    """Plants, lamps and pictures that any room may have."""
    rng, looks = room.rng, room.looks
    if maybe(room, 0.7):
        room.against(props.plant(rng, looks, rng.uniform(1.0, 1.5)))
    if maybe(room, 0.35):
        room.free(props.plant(rng, looks, rng.uniform(0.8, 1.2)))
    if maybe(room, 0.55):
        room.against(props.floor_lamp(rng, looks, on if maybe(room, 0.8) else 0.0))
    if maybe(room, 0.18):
        room.free(props.crate(rng, looks))
    if maybe(room, 0.12):
        room.free(props.ball(rng, looks))
    if maybe(room, 0.3):
        room.free(furniture.chair(rng, looks), turn=0.8)
    if maybe(room, 0.3):
        view = fixtures.wall_screen(rng, looks)
        room.hang(view, view.height, view.height + 0.8, ("back", "back", "left", "right"))
    for _ in range(int(rng.integers(1, 4))):
        art = fixtures.picture(rng, looks)
        room.hang(art, art.height, art.height + 0.9, ("back", "back", "left", "right"))


def bedroom(room: FloorPlan, on: float) -> None:
    """A bed with its head at a wall, night tables, storage."""
    rng, looks = room.rng, room.looks
    bed = room.against(furniture.bed(rng, looks), tries=40)
    if bed:
        carpet(room, *bed.point(rng.uniform(-0.5, 0.5), 0.6), 0.6, bed.yaw)
        for side in (-1, 1):
            stand = furniture.nightstand(rng, looks)
            gap = (bed.piece.width + stand.width) / 2 + 0.08
            x, z = bed.point(side * gap, -(bed.piece.depth - stand.depth) / 2)
            placed = room.at(stand, x, z, bed.yaw) if maybe(room, 0.75) else None
            if placed and maybe(room, 0.75):
                room.put(placed, props.table_lamp(rng, looks, 0.5 * on), centred=True)
    if maybe(room, 0.65):
        room.against(furniture.wardrobe(rng, looks))
    if maybe(room, 0.55):
        chest = room.against(furniture.cabinet(rng, looks))
        if maybe(room, 0.45):
            room.put(chest, props.screen(rng, looks, rng.uniform(0.7, 0.95)), centred=True)
        decorate(room, chest, 2)
    if maybe(room, 0.35):
        desk_with_chair(room, on)
    if maybe(room, 0.3):
        decorate(room, room.against(furniture.shelf(rng, looks)), 1)
    if maybe(room, 0.3):
        room.free(furniture.armchair(rng, looks))


def desk_with_chair(room: FloorPlan, on: float) -> Placed | None:
    """A desk at a wall with a chair before it, a monitor and perhaps a lamp."""
    rng, looks = room.rng, room.looks
    desk = room.against(furniture.desk(rng, looks), tries=25)
    if desk is None:
        return None
    if maybe(room, 0.85):
        room.put(desk, props.screen(rng, looks, rng.uniform(0.55, 0.75)), centred=True)
    if maybe(room, 0.5):
        room.put(desk, props.table_lamp(rng, looks, 0.5 * on))
    decorate(room, desk, 2)
    room.facing(desk, furniture.chair(rng, looks), rng.uniform(0.05, 0.2), rng.uniform(-0.25, 0.25))
    return desk


def living_room(room: FloorPlan, on: float) -> None:
    """A sofa, a low table on a rug, a television."""
    rng, looks = room.rng, room.looks
    make = furniture.sofa
    sofa = room.against(make(rng, looks), tries=30) or room.free(make(rng, looks))
    if sofa:
        x, z = sofa.point(0.0, sofa.piece.depth / 2 + 0.6)
        carpet(room, x, z, 0.75, sofa.yaw)
        low = room.facing(sofa, furniture.coffee_table(rng, looks), rng.uniform(0.3, 0.5))
        decorate(room, low, 3)
    if maybe(room, 0.85):
        chest = room.against(furniture.cabinet(rng, looks), tries=20)
        room.put(chest, props.screen(rng, looks), centred=True)
    if maybe(room, 0.6):
        room.free(furniture.armchair(rng, looks))
    if maybe(room, 0.55):
        decorate(room, room.against(furniture.shelf(rng, looks)), 1)
    if maybe(room, 0.4):
        room.against(props.floor_lamp(rng, looks, on))


def office(room: FloorPlan, on: float) -> None:
    """One or two desks with monitors, shelves, cabinets."""
    rng, looks = room.rng, room.looks
    for _ in range(2):
        desk_with_chair(room, on)
    for _ in range(int(rng.integers(1, 3))):
        decorate(room, room.against(furniture.shelf(rng, looks)), 1)
    if maybe(room, 0.6):
        decorate(room, room.against(furniture.cabinet(rng, looks)), 2)
    if maybe(room, 0.5):
        room.free(furniture.chair(rng, looks), turn=0.8)
    if maybe(room, 0.3):
        room.against(furniture.armchair(rng, looks))
    carpet(room, room.size[0] / 2, room.size[2] * 0.6, 0.35)


def dining_room(room: FloorPlan, on: float) -> None:
    """A table with chairs around, kitchen units or a sideboard."""
    rng, looks = room.rng, room.looks
    table = room.free(furniture.table(rng, looks), rng.choice([0.0, np.pi / 2]), tries=40)
    if table:
        carpet(room, table.x, table.z, 0.45, table.yaw)
        decorate(room, table, 3)
        seat = furniture.chair(rng, looks)
        for angle in rng.permutation(4)[: int(rng.integers(2, 5))]:
            sides = (table.piece.depth, table.piece.width, table.piece.depth, table.piece.width)
            out = sides[angle] / 2 + seat.depth * rng.uniform(0.15, 0.6)
            yaw = table.yaw + angle * np.pi / 2
            x, z = table.x + np.sin(yaw) * out, table.z + np.cos(yaw) * out
            around_table(room, table, seat, (x, z), yaw + np.pi + rng.uniform(-0.2, 0.2))
    if maybe(room, 0.6):
        decorate(room, room.against(furniture.counter(rng, looks), tries=25), 4)
    if maybe(room, 0.6):
        chest = room.against(furniture.cabinet(rng, looks))
        decorate(room, chest, 2)
    if maybe(room, 0.35):
        decorate(room, room.against(furniture.shelf(rng, looks)), 1)


def around_table(
    room: FloorPlan, table: Placed, seat: Furniture, place: tuple[float, float], yaw: float
) -> None:
    """Push a chair to a table: it may stand partly under it, but in nothing else."""
    room.standing.remove(table)
    room.at(seat, *place, yaw)
    room.standing.append(table)


def playroom(room: FloorPlan, on: float) -> None:
    """Shelves, boxes and balls around a rug, a bench or bed."""
    rng, looks = room.rng, room.looks
    carpet(room, room.size[0] / 2, room.size[2] * 0.55, 0.8)
    for _ in range(int(rng.integers(1, 3))):
        decorate(room, room.against(furniture.shelf(rng, looks)), 1)
    if maybe(room, 0.5):
        room.against(furniture.bed(rng, looks), tries=25)
    if maybe(room, 0.5):
        decorate(room, room.against(furniture.cabinet(rng, looks)), 2)
    for _ in range(int(rng.integers(1, 4))):
        room.free(props.crate(rng, looks))
    for _ in range(int(rng.integers(1, 4))):
        room.free(props.ball(rng, looks))
    if maybe(room, 0.5):
        decorate(room, room.free(furniture.coffee_table(rng, looks)), 3)
    if maybe(room, 0.4):
        room.free(furniture.chair(rng, looks), turn=0.8)


RECIPES: tuple[Callable[[FloorPlan, float], None], ...] = (
    bedroom,
    living_room,
    office,
    dining_room,
    playroom,
)
