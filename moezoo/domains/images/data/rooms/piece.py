"""A piece of furniture: solids in its own frame, built with a few verbs.

Frame of a piece: x to the side, y up from the floor, z to its front; the origin is on the floor
under its middle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moezoo.domains.images.data.rooms.names import CLASS, PART
from moezoo.domains.images.data.rooms.shapes import BOX, ELLIPSOID, FRUSTUM, Solid, tilt_x, turn_y


class Surface(NamedTuple):
    """A place on a piece where small things can stand."""

    x: float
    z: float
    half_x: float
    half_z: float
    height: float


class Glow(NamedTuple):
    """A lamp's bulb in the frame of the piece."""

    position: tuple[float, float, float]
    strength: float


Vector = tuple[float, float, float]
_UPRIGHT = np.eye(3)


@dataclass
class Furniture:
    """Solids of one object, its outline on the floor and what can stand on it."""

    name: str
    noun: str
    width: float
    depth: float
    height: float
    solids: list[Solid] = field(default_factory=list)
    surfaces: list[Surface] = field(default_factory=list)
    glows: list[Glow] = field(default_factory=list)

    def _add(self, kind: int, size: Vector, at: Vector, part: str, look: int, **more) -> None:
        turn, tilt = more.pop("turn", 0.0), more.pop("tilt", 0.0)
        rotation = turn_y(turn) @ tilt_x(tilt) if turn or tilt else _UPRIGHT
        half = np.maximum(np.array(size) / 2, 0.002)
        label, index = CLASS[more.pop("label", self.name)], PART[part]
        self.solids.append(
            Solid(kind, np.array(at, float), rotation, half, look, label, index, 0, **more)
        )

    def box(self, size: Vector, at: Vector, part: str, look: int, **more) -> None:
        """A box of full `size` centred at `at`; `turn` about y and `tilt` about x in radians."""
        self._add(BOX, size, at, part, look, **more)

    def ball(self, size: Vector, at: Vector, part: str, look: int, **more) -> None:
        """An ellipsoid of full `size`."""
        self._add(ELLIPSOID, size, at, part, look, **more)

    def tube(self, size: Vector, at: Vector, part: str, look: int, **more) -> None:
        """A cylinder or cone of full `size`; `bottom` and `top` scale its radius."""
        self._add(FRUSTUM, size, at, part, look, **more)

    def legs(self, x: float, z: float, height: float, thick: float, look: int, round: int) -> None:
        """Four legs at (+-x, +-z): square posts, round posts or tapering ones."""
        for sx in (-1, 1):
            for sz in (-1, 1):
                at = (sx * x, height / 2, sz * z)
                size = (thick, height, thick)
                if round == 0:
                    self.box(size, at, "leg", look)
                else:
                    self.tube(size, at, "leg", look, bottom=0.6 if round == 2 else 1.0)

    def placed(self, x: float, y: float, z: float, yaw: float, instance: int) -> list[Solid]:
        """The solids in world coordinates."""
        rotation, offset = turn_y(yaw), np.array([x, y, z], float)
        return [solid.moved(rotation, offset, instance) for solid in self.solids]
