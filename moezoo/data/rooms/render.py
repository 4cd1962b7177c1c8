"""One finished example: the photograph and its labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moezoo.data.rooms.labels import Labels, caption, label, saliency
from moezoo.data.rooms.points import surface
from moezoo.data.rooms.scene import Scene, sample
from moezoo.data.rooms.shade import radiance
from moezoo.data.rooms.visibility import cast


class View(NamedTuple):
    """A rendered scene."""

    image_HW3: np.ndarray  # uint8 sRGB
    labels: Labels
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
