"""Exact labels of a view: regions, depth, normals, boundaries, the salient object, a caption."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moezoo.domains.images.data.rooms.names import FIXTURES, SCENES, STRUCTURE
from moezoo.domains.images.data.rooms.scene import Scene
from moezoo.domains.images.data.rooms.visibility import HitPoints
from moezoo.domains.images.thinning import thin

JUMP = 0.1  # a depth step counts as a boundary from this fraction of the depth


class RoomLabels(NamedTuple):
    """All dense labels of one image."""

    semseg_HW: np.ndarray  # uint8
    parts_HW: np.ndarray  # uint8
    instance_HW: np.ndarray  # int32, 0 is the shell of the room
    depth_HW: np.ndarray  # float32 metres along the optical axis
    normals_HW3: np.ndarray  # float32 unit, camera frame (right, up, towards the viewer)
    edge_HW: np.ndarray  # uint8 0/1


def _steps(labels: RoomLabels, u_W: np.ndarray, v_H: np.ndarray, axis: int) -> np.ndarray:
    """Whether a pixel and its next along `axis` lie on surfaces that do not meet between them.

    Each pixel's tangent plane predicts the other's depth; both predictions must fail.
    """
    depth_HW, normals_HW3 = labels.depth_HW, labels.normals_HW3
    ray = np.stack(np.broadcast_arrays(u_W[None, :], v_H[:, None], np.float32(-1)), -1)
    first = (slice(None, -1), slice(None)) if axis == 0 else (slice(None), slice(None, -1))
    second = (slice(1, None), slice(None)) if axis == 0 else (slice(None), slice(1, None))
    off = None
    for here, there in ((first, second), (second, first)):
        plane = depth_HW[here] * (normals_HW3[here] * ray[here]).sum(-1)
        slope = (normals_HW3[here] * ray[there]).sum(-1)
        predicted = plane / np.minimum(slope, -1e-4)
        near = np.minimum(depth_HW[here], depth_HW[there])
        miss = np.abs(predicted - depth_HW[there]) > JUMP * near
        off = miss if off is None else off & miss
    assert off is not None
    return off & (np.abs(depth_HW[first] - depth_HW[second]) > JUMP * near)


def edges(labels: RoomLabels, u_W: np.ndarray, v_H: np.ndarray) -> np.ndarray:
    """Boundaries [H,W] uint8: between classes or instances and at depth steps, one pixel wide.

    Of the two pixels at a boundary the nearer one is marked, then lines are thinned.
    """
    region = labels.instance_HW * 64 + labels.semseg_HW
    marked = np.zeros(region.shape, bool)
    for axis in (0, 1):
        first = (slice(None, -1), slice(None)) if axis == 0 else (slice(None), slice(None, -1))
        second = (slice(1, None), slice(None)) if axis == 0 else (slice(None), slice(1, None))
        differ = region[first] != region[second]
        differ |= _steps(labels, u_W, v_H, axis)
        nearer = labels.depth_HW[first] <= labels.depth_HW[second]
        marked[first] |= differ & nearer
        marked[second] |= differ & ~nearer
    return thin(marked).astype(np.uint8)


def label(
    scene: Scene, points: HitPoints, shape: tuple[int, int], u_W: np.ndarray, v_H: np.ndarray
) -> RoomLabels:
    """Labels at the pixel centres, whose points these are."""
    table, axes = scene.table, scene.camera.axes.astype(np.float32)
    normal = np.stack([axes[0], axes[1], -axes[2]]) @ points.normal_3N
    normal /= np.sqrt((normal * normal).sum(0))
    depth = axes[2] @ (points.world_3N - scene.camera.eye.astype(np.float32)[:, None])
    found = RoomLabels(
        semseg_HW=table.semantic_S[points.solid_N].reshape(shape),
        parts_HW=table.part_S[points.solid_N].reshape(shape),
        instance_HW=table.instance_S[points.solid_N].reshape(shape),
        depth_HW=depth.reshape(shape).astype(np.float32),
        normals_HW3=np.ascontiguousarray(normal.T).reshape(*shape, 3).astype(np.float32),
        edge_HW=np.zeros(shape, np.uint8),
    )
    return found._replace(edge_HW=edges(found, u_W, v_H))


def saliency(image_HW3: np.ndarray, labels: RoomLabels) -> np.ndarray:
    """The most salient objects [H,W] uint8: large, central and unlike their surroundings.

    Every piece of furniture or small object is scored by sqrt(area share) * exp(-d^2) * (0.3 + c):
    d is the distance of its middle from the image centre in half image sides, c the distance of its
    mean colour (sRGB in [0,1]) from that of the rest of the image. The best one is salient, and any
    other that scores at least 0.85 of it.
    """
    count = int(labels.instance_HW.max()) + 1
    flat, size = labels.instance_HW.ravel(), labels.instance_HW.size
    area = np.bincount(flat, minlength=count)
    rows, columns = np.indices(labels.instance_HW.shape)
    h, w = labels.instance_HW.shape
    colour = image_HW3.reshape(-1, 3).astype(np.float64) / 255
    mean = np.stack([np.bincount(flat, c, count) for c in colour.T], -1)
    rest = (colour.sum(0) - mean) / np.maximum(size - area, 1)[:, None]
    seen = np.maximum(area, 1)
    contrast = np.sqrt(((mean / seen[:, None] - rest) ** 2).sum(-1))
    dy = np.bincount(flat, rows.ravel(), count) / seen / (h - 1) * 2 - 1
    dx = np.bincount(flat, columns.ravel(), count) / seen / (w - 1) * 2 - 1
    score = np.sqrt(area / size) * np.exp(-(dx * dx + dy * dy)) * (0.3 + contrast)
    kind = np.zeros(count, int)
    kind[flat] = labels.semseg_HW.ravel()
    score[np.isin(kind, STRUCTURE + FIXTURES) | (area == 0)] = 0
    score[0] = 0
    chosen = (score >= 0.85 * score.max()) & (score > 0)
    return chosen[labels.instance_HW].astype(np.uint8)


NUMBERS = ("two", "three", "four", "five", "six")
THINGS = 6  # at most in a caption


def caption(scene: Scene, labels: RoomLabels) -> str:
    """One sentence: the kind of room, what is seen of it (largest first) and the light."""
    share = np.bincount(labels.instance_HW.ravel(), minlength=len(scene.placed) + 1)[1:]
    nouns: dict[str, int] = {}
    for i in np.argsort(-share, kind="stable"):
        if share[i] >= 0.004 * labels.instance_HW.size:
            noun = scene.placed[i].piece.noun
            nouns[noun] = nouns.get(noun, 0) + 1
    words = [counted(noun, n) for noun, n in list(nouns.items())[:THINGS]]
    listed = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
    light = "in daylight" if scene.lighting.daylight else "in lamplight"
    article = "an" if SCENES[scene.kind][0] in "aeiou" else "a"
    return f"{article} {SCENES[scene.kind]} with {listed}, {light}".capitalize() + "."


def counted(noun: str, count: int) -> str:
    """So many of a thing as captions say it: "a bed", "two beds"; six means six or more."""
    if noun == "boxes":
        return "boxes"
    if count == 1:
        return ("an " if noun[0] in "aeiou" else "a ") + noun
    many = noun.replace("stack", "stacks") if noun.startswith("stack") else _plural(noun)
    return f"{NUMBERS[min(count, 6) - 2]} {many}"


def _plural(noun: str) -> str:
    if noun.endswith("shelf"):
        return noun[:-1] + "ves"
    return noun + ("es" if noun.endswith("x") else "s")
