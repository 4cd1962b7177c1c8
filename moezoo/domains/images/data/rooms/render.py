"""From a scene to one finished example: the photograph, its labels, and the record on disk.

First hits of rays become surface points (positions, normals, coordinates for textures), those
become the photograph and the labels, and these the record: PNG pictures and plain arrays.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from moezoo.domains.images.data.rooms.camera import Camera
from moezoo.domains.images.data.rooms.labels import RoomLabels, caption, label, saliency
from moezoo.domains.images.data.rooms.names import SCENES
from moezoo.domains.images.data.rooms.scene import Scene, sample
from moezoo.domains.images.data.rooms.shade import radiance
from moezoo.domains.images.data.rooms.shapes import PLANE, Solids, unit_normals
from moezoo.domains.images.data.rooms.visibility import FirstHits, HitPoints, cast


def _rotate(table_S33: np.ndarray, solid_N: np.ndarray, vector_3N: np.ndarray) -> np.ndarray:
    """Apply each point's own 3x3 matrix."""
    entries = np.ascontiguousarray(table_S33.reshape(-1, 9).T)[:, solid_N]
    return np.stack(
        [
            entries[3 * i] * vector_3N[0]
            + entries[3 * i + 1] * vector_3N[1]
            + entries[3 * i + 2] * vector_3N[2]
            for i in range(3)
        ]
    )


def surface(scene: Solids, camera: Camera, seen: FirstHits) -> HitPoints:
    """Points, normals and texture coordinates of all first hits."""
    solid = seen.solid_HW.ravel()
    axes, eye = camera.axes.astype(np.float32), camera.eye.astype(np.float32)
    ray = (
        axes[2][:, None, None]
        + axes[1][:, None, None] * seen.v_H[:, None]
        + axes[0][:, None, None] * seen.u_W
    ).reshape(3, -1)
    world = eye[:, None] + ray * seen.depth_HW.ravel()
    view = -ray / np.sqrt((ray * ray).sum(0))
    kind = scene.kind_S[solid]
    unit = _rotate(scene.unit_S33, solid, world - scene.centre_S3.T[:, solid])
    half = scene.half_S3.T[:, solid]
    gradient = unit_normals(kind, unit, scene.slope_S2[solid]) / half
    normal = _rotate(scene.rotation_S33, solid, gradient)
    normal /= np.sqrt((normal * normal).sum(0)) + 1e-20
    shell = kind == PLANE
    normal = np.where(shell, scene.rotation_S33[:, :, 1].T[:, solid], normal)
    normal *= np.where((normal * view).sum(0) < 0, np.float32(-1), np.float32(1))
    local = np.where(shell, world, unit * half)
    facing = np.where(shell, normal, gradient)
    axis = np.abs(facing).argmax(0).astype(np.int8)
    return HitPoints(solid, world, normal, local, axis, view)


class View(NamedTuple):
    """A rendered scene."""

    image_HW3: np.ndarray  # uint8 sRGB
    labels: RoomLabels
    saliency_HW: np.ndarray  # uint8 0/1
    intrinsics: np.ndarray  # float32 [4]: fx, fy, cx, cy in pixels
    caption: str
    kind: int  # index into names.SCENES


def develop(scene: Scene, light_HW3: np.ndarray) -> np.ndarray:
    """Filter oversampled light to pixels, expose, compress highlights, add grain; uint8 sRGB."""
    rows = 0.25 * light_HW3[:-2:2] + 0.5 * light_HW3[1:-1:2] + 0.25 * light_HW3[2::2]
    light = 0.25 * rows[:, :-2:2] + 0.5 * rows[:, 1:-1:2] + 0.25 * rows[:, 2::2]
    setting = scene.lighting
    key = np.exp(np.log(light.mean(-1) + 1e-4).mean())
    exposed = light * (0.32 * setting.exposure / max(float(key), 0.02)) * setting.white
    curve = exposed * (1 + exposed / 9.0) / (1 + exposed)
    srgb = np.clip(curve, 0, 1) ** (1 / 2.2)
    rng = np.random.default_rng(scene.noise_seed)
    grain = rng.standard_normal(srgb.shape, np.float32) * setting.grain * (1.4 - srgb)
    return np.round(255 * np.clip(srgb + grain, 0, 1)).astype(np.uint8)


def render(scene: Scene, height: int, width: int) -> View:
    """Render a scene at any resolution."""
    seen = cast(scene.table, scene.camera, height, width, factor=2)
    shape = (len(seen.v_H), len(seen.u_W))
    points = surface(scene.table, scene.camera, seen)
    image = develop(scene, radiance(scene, points, shape).reshape(*shape, 3))
    centre = points.take(np.arange(shape[0] * shape[1]).reshape(shape)[1::2, 1::2].ravel())
    found = label(scene, centre, (height, width), seen.u_W[1::2], seen.v_H[1::2])
    return View(
        image,
        found,
        saliency(image, found),
        scene.camera.intrinsics(height, width),
        caption(scene, found),
        scene.kind,
    )


def render_example(seed: int, split: str, index: int, height: int, width: int) -> View:
    """The example (seed, split, index) at a resolution."""
    return render(sample(seed, split, index), height, width)


def png(pixels: np.ndarray) -> bytes:
    """Lossless PNG bytes of uint8 pixels [H,W] or [H,W,3]."""
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=3)
    return out.getvalue()


def record(view: View) -> dict[str, Any]:
    """Features of one example: bytes for pictures and label maps, float32 arrays, text."""
    labels = view.labels
    return {
        "image": png(view.image_HW3),
        "semseg": png(labels.semseg_HW),
        "parts": png(labels.parts_HW),
        "edge": png(labels.edge_HW),
        "saliency": png(view.saliency_HW),
        "depth": labels.depth_HW,
        "normals": labels.normals_HW3,
        "intrinsics": view.intrinsics,
        "caption": view.caption,
        "scene": SCENES[view.kind],
    }


def render_record(seed: int, split: str, index: int, height: int, width: int) -> dict[str, Any]:
    """The record of (seed, split, index), the same in every process."""
    return record(render_example(seed, split, index, height, width))
