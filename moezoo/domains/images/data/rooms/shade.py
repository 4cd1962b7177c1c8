"""Light on surfaces: diffuse and glossy reflection, ambient light with occlusion, shadows."""

from __future__ import annotations

import numpy as np

from moezoo.domains.images.data.rooms.lighting import Light, Sun
from moezoo.domains.images.data.rooms.materials import albedo
from moezoo.domains.images.data.rooms.scene import Scene
from moezoo.domains.images.data.rooms.shadows import Blockers, Lattice
from moezoo.domains.images.data.rooms.visibility import HitPoints

# Nine places on a light, one for each pixel of a 3x3 tile: any 3x3 window holds all of them.
_PLACES = np.array([[0, 5, 7], [4, 2, 6], [8, 1, 3]], np.float32)


def _sample(light: Light, rows: int, columns: int) -> np.ndarray:
    """A point of the light for every pixel; spreading and filtering average the nine of a tile."""
    tile = np.tile(_PLACES, (rows // 3 + 1, columns // 3 + 1))[:rows, :columns].ravel()
    a, b = (tile % 3 - 1) * 0.67, (tile // 3 - 1) * 0.67
    side = light.sides.astype(np.float32)[:, :, None]
    return light.centre.astype(np.float32)[:, None] + side[0] * a + side[1] * b


def _highlight(points: HitPoints, to_light_3N: np.ndarray) -> np.ndarray:
    """Strength of a glossy reflection: a power of the cosine to the half-way direction."""
    middle = to_light_3N + points.view_3N
    middle /= np.sqrt((middle * middle).sum(0)) + 1e-9
    shine = np.maximum((points.normal_3N * middle).sum(0), 0)
    for _ in range(5):
        shine = shine * shine
    return shine


def lamp_light(
    light: Light, points: HitPoints, blockers: Blockers, lattice: Lattice
) -> tuple[np.ndarray, np.ndarray]:
    """Light [N] of one lamp or window that a matt and a glossy surface reflect, with shadows."""
    centre = light.centre.astype(np.float32)[:, None]
    to_light = centre - points.world_3N
    square = (to_light * to_light).sum(0)
    to_light /= np.sqrt(square)
    cosine = np.maximum((points.normal_3N * to_light).sum(0), 0)
    power = (cosine > 0) / (square + 0.25)
    if light.normal.any():
        power *= np.maximum(-(light.normal.astype(np.float32) @ to_light), 0)
    m = lattice.centre_M
    start = points.world_3N[:, m] + 0.004 * points.normal_3N[:, m]
    ray = _sample(light, lattice.shape[0] // 2, lattice.shape[1] // 2) - start
    lit = np.flatnonzero(cosine[m] * power[m] > 1e-4)
    seen = np.ones(len(m), np.float32)
    dark = blockers.shadowed(start[:, lit], ray[:, lit], light.instance)
    seen[lit[dark]] = 0
    power *= lattice.spread(lattice.smooth(seen))
    return cosine * power, _highlight(points, to_light) * power


def sun_light(sun: Sun, points: HitPoints, blockers: Blockers) -> np.ndarray:
    """Direct sunlight [N] through its pane."""
    direction, pane = sun.direction.astype(np.float32), sun.pane
    normal = pane.normal.astype(np.float32)
    cosine = np.maximum(direction @ points.normal_3N, 0)
    offset = points.world_3N - pane.centre.astype(np.float32)[:, None]
    t = -(normal @ offset) / float(normal @ direction)
    at = offset + t * direction[:, None]
    inside = (t > 0) & (cosine > 0)
    for side in pane.sides.astype(np.float32):
        inside &= np.abs(side @ at) < side @ side
    index = np.flatnonzero(inside)
    if len(index):
        start = points.world_3N[:, index] + 0.004 * points.normal_3N[:, index]
        ray = t[index] * direction[:, None]
        index = index[~blockers.shadowed(start, ray, pane.instance)]
    lit = np.zeros_like(cosine)
    lit[index] = cosine[index]
    return lit


def openness(scene: Scene, points: HitPoints) -> np.ndarray:
    """Ambient occlusion [N] in (0,1]: corners of the room and the surroundings of furniture."""
    open_N = np.ones(points.world_3N.shape[1], np.float32)
    for axis, length in enumerate(scene.size.tolist()):
        for sign, place in ((1, 0.0), (-1, length)):
            away = np.abs(points.world_3N[axis] - place)
            turned = 0.5 - 0.5 * sign * points.normal_3N[axis]
            open_N *= 1 - 0.55 * turned * np.exp(-away / 0.3)
    own = scene.table.instance_S[points.solid_N]
    for instance, placed in enumerate(scene.placed, start=1):
        if placed.piece.name in ("rug", "picture", "window", "door") or placed.piece.height <= 0:
            continue
        c, s = np.float32(np.cos(placed.yaw)), np.float32(np.sin(placed.yaw))
        dx, dz = points.world_3N[0] - float(placed.x), points.world_3N[2] - float(placed.z)
        ox = np.maximum(np.abs(c * dx - s * dz) - placed.piece.width / 2, 0)
        oz = np.maximum(np.abs(s * dx + c * dz) - placed.piece.depth / 2, 0)
        oy = np.maximum(points.world_3N[1] - float(placed.y) - placed.piece.height, 0)
        away = ox + oz + 2 * oy
        open_N *= 1 - np.where(own == instance, 0, 0.5 * np.exp(-away / 0.16))
    return open_N


def base_colours(scene: Scene, points: HitPoints) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reflectance [N,3], gloss [N] and own light [N] of every point."""
    material = scene.table.material_S[points.solid_N]
    first = np.where(points.axis_N == 0, points.local_3N[2], points.local_3N[0])
    second = np.where(points.axis_N == 1, points.local_3N[2], points.local_3N[1])
    colour = np.zeros((len(material), 3), np.float32)
    order = np.argsort(material, kind="stable")
    bounds = np.searchsorted(material[order], np.arange(len(scene.materials) + 1))
    for k, look in enumerate(scene.materials):
        index = order[bounds[k] : bounds[k + 1]]
        if len(index):
            colour[index] = albedo(look, first[index], second[index])
    gloss = np.array([m.gloss for m in scene.materials], np.float32)[material]
    glow = np.array([m.glow for m in scene.materials], np.float32)[material]
    return colour, gloss, glow


def radiance(scene: Scene, points: HitPoints, shape: tuple[int, int]) -> np.ndarray:
    """Linear RGB [N,3] that leaves every point of a 2x2 oversampled grid towards the eye."""
    colour, gloss, glow = base_colours(scene, points)
    blockers, lattice = Blockers(scene.table), Lattice(points.solid_N, shape)
    lighting, centre = scene.lighting, points.take(lattice.centre_M)
    up = 0.75 + 0.25 * points.normal_3N[1]
    ambient = up * lattice.spread(openness(scene, centre))
    diffuse_3N = lighting.ambient.astype(np.float32)[:, None] * ambient + glow
    shine_3N = np.zeros_like(diffuse_3N)
    for light in lighting.lights:
        soft, hard = lamp_light(light, points, blockers, lattice)
        tint = light.colour.astype(np.float32)[:, None]
        diffuse_3N += tint * soft
        shine_3N += tint * (gloss * hard)
    for sun in lighting.suns:
        diffuse_3N += sun.colour.astype(np.float32)[:, None] * sun_light(sun, points, blockers)
    return colour * diffuse_3N.T + 0.6 * shine_3N.T
