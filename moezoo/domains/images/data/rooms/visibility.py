"""Which solid each ray meets first."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from moezoo.domains.images.data.rooms.camera import Camera, grid
from moezoo.domains.images.data.rooms.shapes import PLANE, Solids, hit

NEAR = 0.05
_CORNERS = np.array(list(product((-1.0, 1.0), repeat=3)), np.float32)


class FirstHits(NamedTuple):
    """First hits on a grid of rays (H, W are the grid's)."""

    solid_HW: np.ndarray  # int32 index into the table
    depth_HW: np.ndarray  # float32 metres along the optical axis
    u_W: np.ndarray  # float32, ray = forward + u right + v up
    v_H: np.ndarray


class Windows(NamedTuple):
    """Rectangles of the grid around the projections of S solids (empty where out of sight)."""

    top_S: np.ndarray  # int64, first row
    bottom_S: np.ndarray  # one past the last row
    left_S: np.ndarray
    right_S: np.ndarray


def _windows(corners_S83: np.ndarray, u_W: np.ndarray, v_H: np.ndarray) -> Windows:
    """Where solids with these corners (camera frame) can be seen; all of it when they are close."""
    depth = corners_S83[..., 2]
    safe = np.maximum(depth, NEAR)
    u, v = corners_S83[..., 0] / safe, corners_S83[..., 1] / safe
    close, behind = depth.min(1) < NEAR, depth.max(1) < NEAR

    def clip(place_S: np.ndarray, whole: int) -> np.ndarray:
        return np.where(behind, 0, np.where(close, whole, place_S))

    return Windows(
        clip(np.searchsorted(-v_H, -v.max(1)), 0),
        clip(np.searchsorted(-v_H, -v.min(1)), len(v_H)),
        clip(np.searchsorted(u_W, u.min(1)), 0),
        clip(np.searchsorted(u_W, u.max(1)), len(u_W)),
    )


def _cast_shell(scene: Solids, camera: Camera, u_W: np.ndarray, v_H: np.ndarray) -> FirstHits:
    """Every ray leaves the room through the nearest plane ahead of it."""
    depth = np.full((len(v_H), len(u_W)), np.inf, np.float32)
    solid = np.zeros(depth.shape, np.int32)
    axes, eye = camera.axes.astype(np.float32), camera.eye.astype(np.float32)
    for k in np.flatnonzero(scene.kind_S == PLANE):
        normal = scene.rotation_S33[k, :, 1]
        away = float((scene.centre_S3[k] - eye) @ normal)
        d_H1 = (axes[2] @ normal + v_H * (axes[1] @ normal))[:, None]
        speed = d_H1 + u_W * (axes[0] @ normal)
        t = np.where(speed < 0, away / np.minimum(speed, -1e-9), np.float32(np.inf))
        nearer = t < depth
        depth[nearer], solid[nearer] = t[nearer], k
    return FirstHits(solid, depth, u_W, v_H)


def cast(scene: Solids, camera: Camera, height: int, width: int, factor: int) -> FirstHits:
    """Cast the camera's rays; each solid is tested only inside its projected rectangle."""
    u_W, v_H = grid(camera, height, width, factor)
    seen = _cast_shell(scene, camera, u_W, v_H)
    axes, eye = camera.axes.astype(np.float32), camera.eye.astype(np.float32)
    solids = np.flatnonzero(scene.kind_S != PLANE)
    corners_S83 = scene.centre_S3[solids, None] + np.einsum(
        "sij,scj->sci", scene.rotation_S33[solids], _CORNERS * scene.half_S3[solids, None]
    )
    corners_S83 = (corners_S83 - eye) @ axes.T
    origin_S3 = np.einsum("sij,sj->si", scene.unit_S33[solids], eye - scene.centre_S3[solids])
    steps_S33 = np.einsum("sij,kj->ski", scene.unit_S33[solids], axes)
    place = _windows(corners_S83, u_W, v_H)
    sight = np.flatnonzero((place.bottom_S > place.top_S) & (place.right_S > place.left_S))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for s in sight:
            rows = slice(place.top_S[s], place.bottom_S[s])
            columns = slice(place.left_S[s], place.right_S[s])
            k, o, steps = solids[s], tuple(origin_S3[s]), steps_S33[s]
            u, v = u_W[columns], v_H[rows, None]
            d = tuple((steps[2, i] + v * steps[1, i]) + u * steps[0, i] for i in range(3))
            t = hit(int(scene.kind_S[k]), o, d, NEAR, scene.slope_S2[k])  # type: ignore[arg-type]
            best = seen.depth_HW[rows, columns]
            nearer = t < best
            best[nearer] = t[nearer]
            seen.solid_HW[rows, columns][nearer] = k
    return seen


class HitPoints(NamedTuple):
    """Hit points of N rays."""

    solid_N: np.ndarray  # int32
    world_3N: np.ndarray  # float32 metres
    normal_3N: np.ndarray  # float32 unit, world axes, towards the viewer
    local_3N: np.ndarray  # float32 metres in the solid's frame (world frame for the shell)
    axis_N: np.ndarray  # int8: which local axis the surface faces most
    view_3N: np.ndarray  # float32 unit, from the point to the eye

    def take(self, index_M: np.ndarray) -> HitPoints:
        """Some of the points."""
        return HitPoints(*(x[..., index_M] for x in self))
