"""Random looks.

Classes share a few families of looks (wood, lacquer, cloth, wall paint), as in real rooms: a plant
is mostly green and a ceiling mostly light, but a colour by itself says little about a class.
"""

from __future__ import annotations

import numpy as np

from moezoo.domains.images.data.rooms import materials as mt
from moezoo.domains.images.data.rooms.materials import Material


def rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Linear RGB [3] float32 of an HSV colour (hue in turns)."""
    # Python's numbers: thousands of single colours are cheaper without NumPy.
    distances = (abs((start + hue * 6) % 6 - 3) - 1 for start in (0.0, 4.0, 2.0))
    channels = (min(max(distance, 0.0), 1.0) for distance in distances)
    linear = [(value * (1 - saturation * (1 - c))) ** 2.2 for c in channels]
    return np.array(linear, np.float32)


class Palette:
    """Draws materials for one scene and keeps them in a list that solids index."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.materials: list[Material] = []

    def add(self, texture: mt.Texture, colours: list[np.ndarray], **more: object) -> int:
        """Store a material and give its index."""
        seed = int(self.rng.integers(1000))
        self.materials.append(Material(texture, tuple(colours), seed=seed, **more))  # type: ignore[arg-type]
        return len(self.materials) - 1

    def colour(self, low: float = 0.25, high: float = 0.95) -> np.ndarray:
        """Any hue; mostly muted, sometimes strong."""
        saturation = self.rng.beta(1.2, 2.0)
        return rgb(self.rng.random(), saturation, self.rng.uniform(low, high))

    def near(self, colour: np.ndarray, low: float = 0.55, high: float = 1.5) -> np.ndarray:
        """A lighter or darker relative of a colour."""
        tint = self.rng.uniform(0.85, 1.15, 3)
        return np.clip(colour * tint * self.rng.uniform(low, high), 0.01, 0.95).astype(np.float32)

    def brown(self) -> np.ndarray:
        """A colour of wood or earth."""
        return rgb(
            self.rng.uniform(0.04, 0.12), self.rng.uniform(0.15, 0.65), self.rng.uniform(0.3, 0.9)
        )

    def neutral(self) -> np.ndarray:
        """White, cream, grey or black."""
        bright = self.rng.choice([self.rng.uniform(0.75, 1.0), self.rng.uniform(0.1, 0.75)])
        return rgb(self.rng.random(), self.rng.beta(1, 12), bright)

    def timber(self) -> int:
        """Wood, natural or stained in any colour."""
        base = self.brown() if self.rng.random() < 0.85 else self.colour()
        dark = self.near(base, 0.45, 0.75)
        scale = self.rng.uniform(0.15, 0.4)
        return self.add(mt.wood, [base, dark], scale=scale, gloss=self.rng.uniform(0, 0.35))

    def paint(self) -> int:
        """Lacquer, plastic or metal: one colour, any gloss."""
        gloss = self.rng.uniform(0.0, 0.6)
        return self.add(mt.plain, [self.colour(0.12, 0.98)], scale=0.5, gloss=gloss)

    def fabric(self) -> int:
        """Cloth: plain, woven or patterned."""
        first = self.colour(0.15, 0.98)
        second = self.colour(0.15, 0.98) if self.rng.random() < 0.6 else self.near(first)
        kinds = (mt.plain, mt.speckle, mt.stripes, mt.bands, mt.checker, mt.plaid, mt.dots)
        kind = kinds[self.rng.choice(len(kinds), p=[0.3, 0.3, 0.1, 0.06, 0.06, 0.1, 0.08])]
        return self.add(kind, [first, second], scale=self.rng.uniform(0.08, 0.22))

    def hard(self) -> int:
        """Wood, neutral lacquer or coloured lacquer: tables, cabinets, frames."""
        pick = self.rng.random()
        if pick < 0.6:
            return self.timber()
        if pick < 0.82:
            return self.add(mt.plain, [self.neutral()], scale=0.5, gloss=self.rng.uniform(0, 0.5))
        return self.paint()

    def any(self) -> int:
        """Anything at all."""
        return (self.timber, self.paint, self.fabric)[self.rng.choice(3, p=[0.35, 0.35, 0.3])]()

    def wall(self) -> int:
        """Paint with a skirting board, two-tone paint, wallpaper, boards, bricks or tiles."""
        light = rgb(self.rng.random(), self.rng.beta(1, 4), self.rng.uniform(0.55, 1.0))
        base = light if self.rng.random() < 0.7 else self.colour(0.3, 0.95)
        other, line = self.near(base, 0.5, 1.3), self.colour(0.2, 1.0)
        pick = self.rng.random()
        if pick < 0.45:
            return self.add(mt.skirting, [base, line])
        if pick < 0.6:
            return self.add(mt.wainscot, [base, other, line], scale=self.rng.uniform(0.7, 1.2))
        if pick < 0.75:
            return self.add(mt.stripes, [base, other], scale=self.rng.uniform(0.12, 0.4))
        if pick < 0.83:
            return self.add(mt.bricks, [base, line], scale=self.rng.uniform(0.09, 0.14))
        if pick < 0.91:
            return self.add(mt.tiles, [base, other], scale=self.rng.uniform(0.2, 0.4))
        return self.timber()

    def floor(self) -> int:
        """Boards, tiles, carpet, a board pattern or poured stone."""
        natural = self.brown() if self.rng.random() < 0.8 else self.neutral()
        base = natural if self.rng.random() < 0.75 else self.colour()
        other, gloss = self.near(base, 0.55, 1.2), self.rng.uniform(0, 0.4)
        pick = self.rng.random()
        if pick < 0.45:
            width = self.rng.uniform(0.09, 0.2)
            return self.add(mt.planks, [base, other], scale=width, gloss=gloss)
        if pick < 0.65:
            return self.add(mt.tiles, [base, other], scale=self.rng.uniform(0.25, 0.6), gloss=gloss)
        if pick < 0.85:
            return self.add(mt.speckle, [base, other], scale=self.rng.uniform(0.2, 0.6))
        if pick < 0.93:
            return self.add(
                mt.checker, [base, self.colour()], scale=self.rng.uniform(0.3, 0.6), gloss=gloss
            )
        return self.add(mt.plain, [base], scale=0.7, gloss=gloss)

    def ceiling(self) -> int:
        """Mostly light paint, else anything a wall may be."""
        if self.rng.random() < 0.8:
            light = rgb(self.rng.random(), self.rng.beta(1, 8), self.rng.uniform(0.75, 1.0))
            return self.add(mt.plain, [light], scale=0.8)
        pick = (self.timber, self.paint, self.wall)[self.rng.integers(3)]
        return pick()

    def leaves(self) -> int:
        """Mostly green."""
        if self.rng.random() < 0.85:
            base = rgb(
                self.rng.uniform(0.2, 0.4), self.rng.uniform(0.3, 0.8), self.rng.uniform(0.3, 0.8)
            )
        else:
            base = self.colour(0.25, 0.9)
        return self.add(mt.speckle, [base, self.near(base, 0.3, 0.8)], scale=0.1)
