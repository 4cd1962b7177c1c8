"""From first hits to surface points: positions, normals, coordinates for textures."""

from __future__ import annotations

import numpy as np

from moezoo.data.rooms.camera import Camera
from moezoo.data.rooms.shapes import PLANE, Table, unit_normals
from moezoo.data.rooms.visibility import Points, Seen


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


def surface(scene: Table, camera: Camera, seen: Seen) -> Points:
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
    return Points(solid, world, normal, local, axis, view)
