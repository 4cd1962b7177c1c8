"""Which points lie in the shadow of a lamp, a window or the sun."""

from __future__ import annotations

import numpy as np

from moezoo.domains.images.data.rooms.shapes import PLANE, Solids, hit


class Blockers:
    """Instances by their boxes along the world's axes, to find what may shadow a point."""

    def __init__(self, scene: Solids):
        self.scene = scene
        solids = np.flatnonzero(scene.kind_S != PLANE)
        self.members = [
            solids[scene.instance_S[solids] == i] for i in range(1, scene.instance_S.max() + 1)
        ]
        reach_S3 = (np.abs(scene.rotation_S33) @ scene.half_S3[:, :, None])[:, :, 0]
        low_S3, high_S3 = scene.centre_S3 - reach_S3, scene.centre_S3 + reach_S3
        self.low_I3 = np.array([low_S3[m].min(0) for m in self.members]).reshape(-1, 3)
        self.high_I3 = np.array([high_S3[m].max(0) for m in self.members]).reshape(-1, 3)

    def shadowed(self, start_3N: np.ndarray, ray_3N: np.ndarray, skip: int) -> np.ndarray:
        """Whether segments start..start+ray meet a solid of another instance than `skip`."""
        dark = np.zeros(start_3N.shape[1], bool)
        near_IN = self._near(start_3N, ray_3N)
        for i, members in enumerate(self.members):
            if i + 1 == skip:
                continue
            index = np.flatnonzero(near_IN[i] & ~dark)
            if len(index) and len(members) > 1:
                index = index[self._crosses(i, start_3N[:, index], ray_3N[:, index])]
            if len(index):
                dark[index] = self._meets(members, start_3N[:, index], ray_3N[:, index])
        return dark

    def _near(self, start_3N: np.ndarray, ray_3N: np.ndarray) -> np.ndarray:
        """Whether segments [N] pass the ball around the box of each instance [I]."""
        centre_I3 = (self.low_I3 + self.high_I3) / 2
        reach_I = ((self.high_I3 - self.low_I3) ** 2).sum(1) / 4 - (centre_I3**2).sum(1)
        square = (ray_3N * ray_3N).sum(0)
        to_ray = centre_I3 @ ray_3N - (start_3N * ray_3N).sum(0)
        away = (start_3N * start_3N).sum(0) - 2 * (centre_I3 @ start_3N)
        t = np.minimum(np.maximum(to_ray / square, 0), 1)
        return away + t * (t * square - 2 * to_ray) < reach_I[:, None]

    def _crosses(self, i: int, start_3N: np.ndarray, ray_3N: np.ndarray) -> np.ndarray:
        """Whether segments have a point in the box of instance i."""
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / ray_3N
            a = (self.low_I3[i][:, None] - start_3N) * inverse
            b = (self.high_I3[i][:, None] - start_3N) * inverse
        enter, leave = np.minimum(a, b).max(0), np.maximum(a, b).min(0)
        return (enter <= leave) & (leave > 0) & (enter < 1)

    def _meets(self, members: np.ndarray, start_3N: np.ndarray, ray_3N: np.ndarray) -> np.ndarray:
        """Whether segments meet one of these solids; solids of a kind are tested together."""
        dark = np.zeros(start_3N.shape[1], bool)
        kinds = self.scene.kind_S[members]
        for kind in set(kinds.tolist()):
            k = members[kinds == kind]
            unit_K33, slope_2K1 = self.scene.unit_S33[k], self.scene.slope_S2[k].T[:, :, None]
            offset_K31 = unit_K33 @ self.scene.centre_S3[k][:, :, None]
            o_3KN = np.moveaxis(unit_K33 @ start_3N - offset_K31, 1, 0)
            d_3KN = np.moveaxis(unit_K33 @ ray_3N, 1, 0)
            t_KN = hit(kind, tuple(o_3KN), tuple(d_3KN), 1e-3, slope_2K1)  # type: ignore[arg-type]
            dark |= (t_KN < 0.999).any(0)
        return dark


class Lattice:
    """Shadows are traced at the pixel centres of a 2x2 oversampled grid and spread to the rest.

    A sample between centres takes the mean of the neighbouring centres on the same solid, or of all
    of them where there is none.
    """

    def __init__(self, solid_N: np.ndarray, shape: tuple[int, int]):
        self.shape = shape
        self.centre_M = np.arange(shape[0] * shape[1]).reshape(shape)[1::2, 1::2].ravel()
        solid = solid_N.reshape(shape)
        self.solid_M = solid_N[self.centre_M]
        self._pairs = []
        self._total = np.zeros(shape, np.float32)
        fine = [slice(0, None, 2), slice(1, None, 2)]
        centres = self._framed(solid[1::2, 1::2])
        for i in (0, 1):
            for j in (0, 1):
                place = (fine[i], fine[j])
                size = self._total[place].shape
                for di in (0, 1)[: 2 - i]:
                    for dj in (0, 1)[: 2 - j]:
                        near = (slice(i + di, i + di + size[0]), slice(j + dj, j + dj + size[1]))
                        same = solid[place] == centres[near]
                        weight = np.where(same, np.float32(1), np.float32(1e-4))
                        self._pairs.append((place, near, weight))
                        self._total[place] += weight

    def smooth(self, value_M: np.ndarray) -> np.ndarray:
        """Mean over the 3x3 neighbours on the same solid."""
        shape = (self.shape[0] // 2, self.shape[1] // 2)
        x, solid = np.pad(value_M.reshape(shape), 1), np.pad(self.solid_M.reshape(shape), 1)
        solid[[0, -1]] = solid[:, [0, -1]] = -1
        total, weight = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for i in range(3):
            for j in range(3):
                window = (slice(i, i + shape[0]), slice(j, j + shape[1]))
                same = solid[window] == solid[1:-1, 1:-1]
                total += same * x[window]
                weight += same
        return (total / weight).ravel()

    @staticmethod
    def _framed(x: np.ndarray) -> np.ndarray:
        """The centres' values with a frame that repeats the outermost ones."""
        framed = np.empty((x.shape[0] + 2, x.shape[1] + 2), x.dtype)
        framed[1:-1, 1:-1] = x
        framed[[0, -1], 1:-1] = x[[0, -1]]
        framed[:, [0, -1]] = framed[:, [1, -2]]
        return framed

    def spread(self, value_M: np.ndarray) -> np.ndarray:
        """Values of all samples [N] from those of the centres."""
        x = self._framed(value_M.reshape(self.shape[0] // 2, self.shape[1] // 2))
        total = np.zeros(self.shape, np.float32)
        for place, near, weight in self._pairs:
            total[place] += weight * x[near]
        return (total / self._total).ravel()
