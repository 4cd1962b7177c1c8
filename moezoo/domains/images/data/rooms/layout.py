"""Where things stand: placement without collisions, on floors, walls and tops of furniture.

World frame: x to the right along the back wall, y up, z from the viewer's end of the room (0) to
the back wall; metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moezoo.domains.images.data.rooms.palette import Palette
from moezoo.domains.images.data.rooms.piece import Furniture
from moezoo.domains.images.data.rooms.shapes import turn_y

WALL_YAW = {"back": np.pi, "left": np.pi / 2, "right": -np.pi / 2}


@dataclass(frozen=True)
class Placed:
    """A piece at a position of the room."""

    piece: Furniture
    x: float
    y: float
    z: float
    yaw: float

    def reach(self) -> tuple[float, float]:
        """Half extents of the axis-aligned outline on the floor."""
        c, s = abs(np.cos(self.yaw)), abs(np.sin(self.yaw))
        w, d = self.piece.width / 2, self.piece.depth / 2
        return c * w + s * d, s * w + c * d

    def point(self, x: float, z: float) -> tuple[float, float]:
        """World (x, z) of a point given in the frame of the piece."""
        moved = turn_y(self.yaw) @ np.array([x, 0.0, z])
        return self.x + moved[0], self.z + moved[2]


class FloorPlan:
    """An empty room that is filled piece by piece; every method says whether there was room."""

    def __init__(
        self, rng: np.random.Generator, looks: Palette, size: np.ndarray, eye_xz: np.ndarray
    ):
        self.rng, self.looks, self.size, self.eye_xz = rng, looks, size, eye_xz
        self.placed: list[Placed] = []
        self.standing: list[Placed] = []
        self.taken: dict[str, list[tuple[float, float, float, float]]] = {w: [] for w in WALL_YAW}

    def wall_length(self, wall: str) -> float:
        """Length of a wall in metres."""
        return float(self.size[0] if wall == "back" else self.size[2])

    def _wall_point(self, wall: str, along: float, out: float) -> tuple[float, float]:
        if wall == "back":
            return along, self.size[2] - out
        return (out, along) if wall == "left" else (self.size[0] - out, along)

    def _wall_free(self, wall: str, along: float, half: float, low: float, high: float) -> bool:
        return all(
            abs(along - u) >= half + h or high <= a or low >= b for u, h, a, b in self.taken[wall]
        )

    def fits(self, new: Placed, margin: float = 0.04) -> bool:
        """Whether the outline is inside the room, clear of other pieces and of the viewer."""
        hx, hz = new.reach()
        if not (hx <= new.x <= self.size[0] - hx and hz <= new.z <= self.size[2] - hz):
            return False
        away = np.hypot(
            max(abs(new.x - self.eye_xz[0]) - hx, 0), max(abs(new.z - self.eye_xz[1]) - hz, 0)
        )
        if away < 0.45 + 0.5 * min(new.piece.height, 1.6):
            return False
        for other in self.standing:
            ox, oz = other.reach()
            if abs(new.x - other.x) < hx + ox + margin and abs(new.z - other.z) < hz + oz + margin:
                return False
        return True

    def _stand(self, new: Placed) -> Placed:
        self.placed.append(new)
        self.standing.append(new)
        return new

    def against(
        self, piece: Furniture, walls: Sequence[str] = ("back", "left", "right"), tries: int = 14
    ) -> Placed | None:
        """Stand a piece with its back to a wall, not in front of doors or low windows."""
        for _ in range(tries):
            wall = walls[int(self.rng.integers(len(walls)))]
            half, length = piece.width / 2 + 0.03, self.wall_length(wall)
            if length < 2 * half + 0.1:
                continue
            low = half if wall == "back" else max(half, float(self.eye_xz[1]) * 0.6)
            if low >= length - half:
                continue
            along = self.rng.uniform(low, length - half)
            if not self._wall_free(wall, along, half, 0.0, piece.height):
                continue
            x, z = self._wall_point(wall, along, piece.depth / 2 + self.rng.uniform(0.03, 0.08))
            new = Placed(piece, x, 0.0, z, WALL_YAW[wall])
            if self.fits(new):
                self.taken[wall].append((along, half, 0.0, piece.height))
                return self._stand(new)
        return None

    def hang(
        self, piece: Furniture, low: float, high: float, walls: Sequence[str]
    ) -> Placed | None:
        """Fix a piece to a wall where heights low..high are free."""
        for _ in range(12):
            wall = walls[int(self.rng.integers(len(walls)))]
            half, length = piece.width / 2 + 0.05, self.wall_length(wall)
            start = half + 0.1 if wall == "back" else max(half + 0.1, 0.35 * length)
            if start >= length - half - 0.1:
                continue
            along = self.rng.uniform(start, length - half - 0.1)
            if self._wall_free(wall, along, half, low, high):
                self.taken[wall].append((along, half, low, high))
                x, z = self._wall_point(wall, along, 0.0)
                new = Placed(piece, x, 0.0, z, WALL_YAW[wall])
                self.placed.append(new)
                return new
        return None

    def free(
        self, piece: Furniture, yaw: float | None = None, tries: int = 14, turn: float = 0.15
    ) -> Placed | None:
        """Stand a piece somewhere on the floor."""
        for _ in range(tries):
            base = self.rng.integers(4) * np.pi / 2 if yaw is None else yaw
            x = self.rng.uniform(0.15, 0.85) * self.size[0]
            z = self.rng.uniform(0.3, 0.9) * self.size[2]
            new = Placed(piece, x, 0.0, z, base + self.rng.uniform(-turn, turn))
            if self.fits(new, 0.12):
                return self._stand(new)
        return None

    def at(self, piece: Furniture, x: float, z: float, yaw: float) -> Placed | None:
        """Stand a piece at a place if it fits there."""
        new = Placed(piece, x, 0.0, z, yaw)
        return self._stand(new) if self.fits(new, 0.0) else None

    def facing(
        self, anchor: Placed, piece: Furniture, gap: float, side: float = 0.0
    ) -> Placed | None:
        """Stand a piece `gap` metres before the front of `anchor`, turned towards it."""
        reach = anchor.piece.depth / 2 + gap + piece.depth / 2
        x, z = anchor.point(side, reach)
        return self.at(piece, x, z, anchor.yaw + np.pi + self.rng.uniform(-0.12, 0.12))

    def lay(self, piece: Furniture, x: float, z: float, yaw: float) -> None:
        """Lay a rug; things may stand on it."""
        hx, hz = Placed(piece, x, 0, z, yaw).reach()
        x = float(np.clip(x, hx + 0.02, max(self.size[0] - hx - 0.02, hx + 0.02)))
        z = float(np.clip(z, hz + 0.02, max(self.size[2] - hz - 0.02, hz + 0.02)))
        self.placed.append(Placed(piece, x, 0.0, z, yaw))

    def put(self, anchor: Placed | None, piece: Furniture, centred: bool = False) -> Placed | None:
        """Put a small piece on top of another where nothing stands yet."""
        if anchor is None or not anchor.piece.surfaces:
            return None
        surface = anchor.piece.surfaces[0]
        for _ in range(8):
            spread = 0.0 if centred else 1.0
            x = surface.x + spread * self.rng.uniform(-1, 1) * surface.half_x
            z = surface.z + spread * self.rng.uniform(-1, 1) * surface.half_z
            wx, wz = anchor.point(x, z)
            turn = 0.0 if centred else self.rng.uniform(-0.25, 0.25)
            new = Placed(piece, wx, anchor.y + surface.height, wz, anchor.yaw + turn)
            clash = any(
                abs(o.y - new.y) < 0.01
                and np.hypot(o.x - wx, o.z - wz) < (o.piece.width + piece.width) / 2
                for o in self.placed
                if o.y > 0
            )
            if not clash:
                self.placed.append(new)
                return new
        return None
