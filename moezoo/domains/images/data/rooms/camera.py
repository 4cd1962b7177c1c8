"""A pinhole camera and its grid of rays.

Camera frame: x to the right, y up, z towards the viewer (so a visible surface has a normal with a
positive component towards the eye). Depth is the distance along the optical axis, -z.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Camera:
    """Position in metres, orientation (rows: right, up, forward in world axes) and field of view.

    `focal` is the focal length over half of the longer image side.
    """

    eye: np.ndarray
    axes: np.ndarray
    focal: float

    def intrinsics(self, height: int, width: int) -> np.ndarray:
        """fx, fy, cx, cy in pixels; pixel (i, j) has its centre at (j, i)."""
        f = self.focal * max(height, width) / 2
        return np.array([f, f, (width - 1) / 2, (height - 1) / 2], np.float32)


def look(eye: np.ndarray, yaw: float, pitch: float, roll: float, focal: float) -> Camera:
    """A camera at `eye`; yaw 0 looks along +z, positive to +x; positive pitch looks up."""
    forward = np.array(
        [np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)], float
    )
    right = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
    up = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    return Camera(eye, np.stack([c * right + s * up, c * up - s * right, forward]), focal)


def grid(camera: Camera, height: int, width: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Image-plane coordinates of the samples: u of the columns, v of the rows (up is positive).

    A ray is forward + u right + v up, so that its parameter is the depth. With factor 2 the grid
    has 2 H + 1 rows and 2 W + 1 columns and the odd ones are the pixel centres; with factor 1 there
    are only the centres.
    """
    f = camera.focal * max(height, width) / 2
    extra = 1 if factor == 2 else 0
    columns = np.arange(width * factor + extra) - ((width * factor + extra) - 1) / 2
    rows = np.arange(height * factor + extra) - ((height * factor + extra) - 1) / 2
    return (columns / factor / f).astype(np.float32), (-rows / factor / f).astype(np.float32)
