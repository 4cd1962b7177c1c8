"""Procedural looks: a base texture, up to three colours, gloss and own light.

Textures come from cheap lattice noise, made from one fixed table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_SIZE = 64
_TABLE = np.random.default_rng(20240607).random((_SIZE, _SIZE), dtype=np.float32)


def cells(u_N: np.ndarray, v_N: np.ndarray, seed: int) -> np.ndarray:
    """One random number in [0,1) per unit cell of the (u, v) plane."""
    i = (np.floor(u_N).astype(np.int32) + 7 * seed) % _SIZE
    j = (np.floor(v_N).astype(np.int32) + 13 * seed) % _SIZE
    return _TABLE[i, j]


def smooth(u_N: np.ndarray, v_N: np.ndarray, seed: int) -> np.ndarray:
    """Value noise in [0,1], about one bump per unit."""
    i, j = np.floor(u_N), np.floor(v_N)
    fu, fv = u_N - i, v_N - j
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    i0 = (i.astype(np.int32) + 7 * seed) % _SIZE
    j0 = (j.astype(np.int32) + 13 * seed) % _SIZE
    i1, j1 = (i0 + 1) % _SIZE, (j0 + 1) % _SIZE
    low = _TABLE[i0, j0] + fu * (_TABLE[i1, j0] - _TABLE[i0, j0])
    high = _TABLE[i0, j1] + fu * (_TABLE[i1, j1] - _TABLE[i0, j1])
    return low + fv * (high - low)


Texture = Callable[[np.ndarray, np.ndarray, "Material"], np.ndarray]


@dataclass(frozen=True)
class Material:
    """How a surface answers to light.

    `colours` are linear RGB rows in [0,1]; `scale` is the size of the pattern in metres;
    `extent` the half size (u, v) of the patterned face for textures that fill it once.
    """

    texture: Texture
    colours: tuple[np.ndarray, ...]
    scale: float = 0.2
    seed: int = 0
    gloss: float = 0.0
    glow: float = 0.0
    extent: tuple[float, float] = (1.0, 1.0)


def albedo(material: Material, u_N: np.ndarray, v_N: np.ndarray) -> np.ndarray:
    """Reflectance [N,3] at surface coordinates in metres."""
    return np.clip(material.texture(u_N, v_N, material), 0.0, 1.0)


def _mix(first: np.ndarray, second: np.ndarray, amount_N: np.ndarray) -> np.ndarray:
    return first + (second - first) * amount_N[:, None]


def plain(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """One colour, faintly uneven."""
    shade = 0.94 + 0.12 * smooth(u_N / m.scale, v_N / m.scale, m.seed)
    return m.colours[0] * shade[:, None]


def speckle(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Carpet, terrazzo or stone: fine grains over slow patches."""
    fine = smooth(u_N * 40, v_N * 40, m.seed)
    slow = smooth(u_N / m.scale, v_N / m.scale, m.seed + 1)
    return _mix(m.colours[0], m.colours[1], 0.6 * fine * fine + 0.25 * slow)


def stripes(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Vertical bands of two colours."""
    return _mix(m.colours[0], m.colours[1], (u_N / m.scale) % 1.0 < 0.4 + 0.02 * (m.seed % 10))


def bands(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Horizontal bands of two colours."""
    return stripes(v_N, u_N, m)


def checker(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Two colours on a board."""
    odd = (np.floor(u_N / m.scale) + np.floor(v_N / m.scale)) % 2
    return _mix(m.colours[0], m.colours[1], odd.astype(np.float32))


def plaid(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Crossing translucent bands."""
    a = ((u_N / m.scale) % 1.0 < 0.45).astype(np.float32)
    b = ((v_N / m.scale) % 1.0 < 0.45).astype(np.float32)
    return _mix(m.colours[0], m.colours[1], 0.5 * (a + b))


def dots(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Round spots on a grid."""
    x, y = (u_N / m.scale) % 1.0 - 0.5, (v_N / m.scale) % 1.0 - 0.5
    return _mix(m.colours[0], m.colours[1], (x * x + y * y < 0.07).astype(np.float32))


def wood(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Grain along v."""
    ring = smooth(u_N / m.scale * 3, v_N / m.scale * 0.35, m.seed)
    grain = smooth(u_N * 60, v_N * 4, m.seed + 3)
    wave = 0.5 + 0.5 * np.sin(25 * ring)
    return _mix(m.colours[0], m.colours[1], 0.45 * wave + 0.35 * grain)


def planks(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Floor boards of width `scale` along v, each of its own tone."""
    row = np.floor(u_N / m.scale)
    along = v_N / (m.scale * 7) + cells(row, row * 0 + 0.5, m.seed)
    tone = cells(row, along, m.seed + 5)
    grain = smooth(u_N * 50, v_N * 3, m.seed)
    seam = (u_N / m.scale) % 1.0 < 0.05
    return _mix(m.colours[0], m.colours[1], 0.7 * tone + 0.3 * grain) * (1 - 0.4 * seam)[:, None]


def tiles(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Square tiles with joints of the second colour."""
    joint = ((u_N / m.scale) % 1.0 < 0.06) | ((v_N / m.scale) % 1.0 < 0.06)
    tone = 0.9 + 0.2 * cells(u_N / m.scale, v_N / m.scale, m.seed)
    return _mix(m.colours[0] * tone[:, None], m.colours[1], joint.astype(np.float32))


def bricks(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Running bond with mortar of the second colour."""
    course = np.floor(v_N / m.scale)
    u_N = u_N + 0.5 * course % 2 * m.scale * 2.4
    joint = ((v_N / m.scale) % 1.0 < 0.12) | ((u_N / (2.4 * m.scale)) % 1.0 < 0.05)
    tone = 0.75 + 0.5 * cells(u_N / (2.4 * m.scale), course, m.seed)
    return _mix(m.colours[0] * tone[:, None], m.colours[1], joint.astype(np.float32))


def wainscot(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """A wall of two colours, split at `scale` metres with a line, above a skirting board."""
    low = (v_N < m.scale).astype(np.float32)
    line = (np.abs(v_N - m.scale) < 0.025) | (v_N < 0.09)
    return _mix(_mix(m.colours[0], m.colours[1], low), m.colours[2], line.astype(np.float32))


def skirting(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """A painted wall above a skirting board of the second colour."""
    shade = 0.95 + 0.1 * smooth(u_N / 0.5, v_N / 0.5, m.seed)
    foot = (v_N < 0.09).astype(np.float32)
    return _mix(m.colours[0] * shade[:, None], m.colours[1], foot)


def bordered(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """A rug: a field, a border and a pattern that repeats at `scale`."""
    a, b = np.abs(u_N) / m.extent[0], np.abs(v_N) / m.extent[1]
    edge = np.maximum(a, b)
    ring = ((edge > 0.8) & (edge < 0.92)).astype(np.float32)
    diamond = ((np.abs((u_N / m.scale) % 1 - 0.5) + np.abs((v_N / m.scale) % 1 - 0.5)) < 0.3) & (
        edge < 0.8
    )
    return _mix(_mix(m.colours[0], m.colours[2], 0.8 * diamond), m.colours[1], ring)


def artwork(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """An abstract painting or a landscape inside `extent`."""
    a, b = u_N / m.extent[0], v_N / m.extent[1]
    hills = 0.9 * smooth(a * 1.5 + 9, a * 0 + 0.5, m.seed) - 0.55
    if m.seed % 2:
        field = smooth(a * 2, b * 2, m.seed) + 0.5 * smooth(a * 4, b * 4, m.seed + 2)
        return _mix(_mix(m.colours[0], m.colours[1], field > 0.65), m.colours[2], field > 0.95)
    sky = _mix(m.colours[0], m.colours[1], np.clip(0.5 + 0.6 * b, 0, 1))
    return _mix(sky, m.colours[2], (b < hills).astype(np.float32))


def outdoors(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """Sky, clouds and a skyline behind glass."""
    a, b = u_N / m.extent[0], v_N / m.extent[1]
    clouds = smooth(a * 2, b * 4, m.seed) * smooth(a * 5, b * 9, m.seed + 1)
    sky = _mix(m.colours[0], np.ones(3, np.float32), np.clip(1.6 * clouds - 0.2 * b, 0, 1))
    roof = 0.7 * cells(a * 2.5 + 20, a * 0 + 0.5, m.seed) - 0.8
    return _mix(sky, m.colours[1], (b < roof).astype(np.float32))


def display(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """A screen: dark, or windows and text lines on a background."""
    a, b = u_N / m.extent[0], v_N / m.extent[1]
    back = _mix(m.colours[0], m.colours[1], np.clip(0.5 + 0.5 * a * b, 0, 1))
    left, base = -0.7 + 0.1 * (m.seed % 5), -0.6 + 0.1 * (m.seed % 3)
    pane = (a > left) & (a < left + 0.9) & (b > base) & (b < base + 1.1)
    return _mix(back, m.colours[2], pane.astype(np.float32))


def spines(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """A row of book backs of many colours, `scale` metres apart."""
    hue = cells(u_N / m.scale, u_N * 0 + 0.5, m.seed)[:, None]
    tone = cells(u_N / m.scale, u_N * 0 + 0.5, m.seed + 9)[:, None]
    mixed = m.colours[0] + (m.colours[1] - m.colours[0]) * hue
    mixed = mixed + (m.colours[2] - mixed) * (tone > 0.6)
    gap = ((u_N / m.scale) % 1.0 < 0.12) | (np.abs(v_N - 0.02) < 0.012)
    return mixed * (0.4 + 0.6 * tone) * (1 - 0.5 * gap[:, None])


def panels(u_N: np.ndarray, v_N: np.ndarray, m: Material) -> np.ndarray:
    """A door leaf: sunk rectangles drawn as dark outlines inside `extent`."""
    a, b = np.abs(u_N) / m.extent[0], np.abs(v_N / m.extent[1] - 0.04 * (m.seed % 5))
    groove = (np.abs(a - 0.68) < 0.04) & (b > 0.1) & (b < 0.85)
    groove |= (a < 0.7) & ((np.abs(b - 0.84) < 0.02) | (np.abs(b - 0.1) < 0.02))
    shade = 0.93 + 0.14 * smooth(u_N * 12, v_N * 2, m.seed)
    return m.colours[0] * (shade * (1 - 0.45 * groove))[:, None]
