"""Depth, normals, regions and boundaries of rendered scenes agree with each other."""

from __future__ import annotations

import numpy as np
import pytest

from moezoo.domains.images.data.rooms.camera import grid
from moezoo.domains.images.data.rooms.labels import RoomLabels
from moezoo.domains.images.data.rooms.render import View, render
from moezoo.domains.images.data.rooms.scene import Scene
from moezoo.domains.images.data.rooms.shapes import PLANE, hit
from moezoo.domains.images.data.rooms.visibility import NEAR, cast


def back_project(depth_HW: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Points [H,W,3] in the camera frame (right, up, towards the viewer)."""
    fx, fy, cx, cy = intrinsics.astype(float)
    rows, columns = np.indices(depth_HW.shape)
    z = depth_HW.astype(float)
    return np.stack([(columns - cx) / fx * z, -(rows - cy) / fy * z, -z], -1)


def flat(labels: RoomLabels) -> np.ndarray:
    """Inner pixels whose 3x3 neighbourhood has one object and one normal."""
    same = np.ones((labels.depth_HW.shape[0] - 2, labels.depth_HW.shape[1] - 2), bool)
    middle = (slice(1, -1), slice(1, -1))
    for i in (0, 1, 2):
        for j in (0, 1, 2):
            near = (slice(i, i + same.shape[0]), slice(j, j + same.shape[1]))
            same &= labels.instance_HW[near] == labels.instance_HW[middle]
            same &= labels.parts_HW[near] == labels.parts_HW[middle]
            turn = labels.normals_HW3[near] - labels.normals_HW3[middle]
            same &= np.abs(turn).max(-1) < 1e-4
    return same


def test_normals_are_the_slopes_of_the_depth(views: list[View]) -> None:
    """Exactly on walls, floor and ceiling; on furniture where no board hides another behind it."""
    shell_share, furniture = [], []
    for view in views:
        points = back_project(view.labels.depth_HW, view.intrinsics)
        along = points[1:-1, 2:] - points[1:-1, :-2]
        up = points[:-2, 1:-1] - points[2:, 1:-1]
        slope = np.cross(along, up)
        slope /= np.linalg.norm(slope, axis=-1, keepdims=True)
        cosine = (slope * view.labels.normals_HW3[1:-1, 1:-1]).sum(-1)
        off = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        shell = view.labels.instance_HW[1:-1, 1:-1] == 0
        assert off[flat(view.labels) & shell].max() < 0.5
        shell_share.append((flat(view.labels) & shell).mean())
        furniture.append(off[flat(view.labels) & ~shell])
    assert np.mean(shell_share) > 0.3
    pooled = np.concatenate(furniture)
    assert len(pooled) > 5000 and (pooled < 0.5).mean() > 0.9


def test_normals_are_unit_and_face_the_camera(views: list[View]) -> None:
    for view in views:
        n = view.labels.normals_HW3
        np.testing.assert_allclose(np.linalg.norm(n, axis=-1), 1, atol=1e-5)
        points = back_project(view.labels.depth_HW, view.intrinsics)
        assert ((n * points).sum(-1) < 1e-3).all()


def test_floor_ceiling_and_depth_range(views: list[View], scenes: list[Scene]) -> None:
    for view, scene in zip(views, scenes, strict=True):
        up = scene.camera.axes @ np.array([0, 1, 0])
        up = np.array([up[0], up[1], -up[2]])
        floor = (view.labels.instance_HW == 0) & (view.labels.semseg_HW == 1)
        np.testing.assert_allclose(view.labels.normals_HW3[floor] @ up, 1, atol=1e-4)
        ceiling = (view.labels.instance_HW == 0) & (view.labels.semseg_HW == 2)
        np.testing.assert_allclose(view.labels.normals_HW3[ceiling] @ up, -1, atol=1e-4)
        points = back_project(view.labels.depth_HW, view.intrinsics)[floor]
        height = points @ up + scene.camera.eye[1]
        np.testing.assert_allclose(height, 0, atol=2e-3)
        assert 0.3 < view.labels.depth_HW.min() and view.labels.depth_HW.max() < 9


def test_first_hits_equal_testing_every_solid(scenes: list[Scene]) -> None:
    """The projected rectangles that bound the work lose nothing."""
    for scene in scenes[:6]:
        size, table, camera = 24, scene.table, scene.camera
        seen = cast(table, camera, size, size, factor=1)
        u_W, v_H = grid(camera, size, size, 1)
        axes = camera.axes.astype(np.float32)
        ray = axes[2] + v_H[:, None, None] * axes[1] + u_W[:, None] * axes[0]
        best = np.full((size, size), np.inf, np.float32)
        for k in np.flatnonzero(table.kind_S != PLANE):
            o = table.unit_S33[k] @ (camera.eye.astype(np.float32) - table.centre_S3[k])
            d = np.moveaxis(ray @ table.unit_S33[k].T, -1, 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                t = hit(int(table.kind_S[k]), tuple(o), tuple(d), NEAR, table.slope_S2[k])
            best = np.minimum(best, t)
        solid = table.kind_S[seen.solid_HW] != PLANE
        agree = np.isclose(best[solid], seen.depth_HW[solid], rtol=1e-4)
        assert agree.mean() > 0.999
        assert (best[~solid] >= seen.depth_HW[~solid] - 1e-3).mean() > 0.999


def test_edges_follow_the_regions(views: list[View]) -> None:
    for view in views:
        labels, edge = view.labels, view.labels.edge_HW.astype(bool)
        region = labels.instance_HW * 64 + labels.semseg_HW
        change = np.zeros(edge.shape, bool)
        change[:-1] |= region[:-1] != region[1:]
        change[1:] |= region[:-1] != region[1:]
        change[:, :-1] |= region[:, :-1] != region[:, 1:]
        change[:, 1:] |= region[:, :-1] != region[:, 1:]
        depth = labels.depth_HW
        jump = np.zeros(edge.shape, bool)
        across = np.abs(np.diff(depth, axis=0)) > 0.1 * np.minimum(depth[1:], depth[:-1])
        jump[:-1] |= across
        jump[1:] |= across
        across = np.abs(np.diff(depth, axis=1)) > 0.1 * np.minimum(depth[:, 1:], depth[:, :-1])
        jump[:, :-1] |= across
        jump[:, 1:] |= across
        assert (change | jump)[edge].all()
        assert grown(edge, 2)[change].mean() > 0.995
        assert 0.03 < edge.mean() < 0.25


def grown(mask: np.ndarray, steps: int) -> np.ndarray:
    """A mask widened by `steps` pixels in all eight directions."""
    padded = np.pad(mask, steps)
    h, w = mask.shape
    shifts = range(2 * steps + 1)
    return np.any([padded[i : i + h, j : j + w] for i in shifts for j in shifts], axis=0)


def test_edges_are_one_pixel_wide(views: list[View]) -> None:
    for view in views:
        edge = view.labels.edge_HW.astype(bool)
        square = edge[:-1, :-1] & edge[1:, :-1] & edge[:-1, 1:] & edge[1:, 1:]
        assert square.sum() <= 0.02 * edge.sum()


@pytest.mark.parametrize("size", [(128, 128), (33, 33)])
def test_another_resolution_shows_the_same_geometry(
    views: list[View], scenes: list[Scene], size: tuple[int, int]
) -> None:
    """Sampling the larger image at the small one's pixel centres gives the same labels."""
    for view, scene in zip(views[:4], scenes[:4], strict=True):
        other = render(scene, *size)
        assert other.image_HW3.shape == (*size, 3)
        rows = (np.arange(size[0]) + 0.5) / size[0] * 64 - 0.5
        near = np.clip(np.rint(rows).astype(int), 0, 63)
        semseg = view.labels.semseg_HW[np.ix_(near, near)]
        assert (semseg == other.labels.semseg_HW).mean() > 0.9
        depth = view.labels.depth_HW[np.ix_(near, near)]
        off = np.abs(depth - other.labels.depth_HW) / other.labels.depth_HW
        assert np.median(off) < 0.02 and (off < 0.1).mean() > 0.9


def test_wide_images_keep_the_focal_length(scenes: list[Scene]) -> None:
    """A 32x64 image is the middle of the 64x64 image."""
    square, wide = render(scenes[0], 64, 64), render(scenes[0], 32, 64)
    np.testing.assert_allclose(wide.labels.depth_HW, square.labels.depth_HW[16:48], rtol=1e-4)
    assert wide.intrinsics[0] == square.intrinsics[0] == square.intrinsics[1]
