"""Human parts as PASCAL-Context paints them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moezoo.domains.images.data.dense import pascal
from tests.domains.images.data import archives


def test_people_and_their_parts(tmp_path: Path) -> None:
    head, torso = np.zeros((6, 8), bool), np.zeros((6, 8), bool)
    head[:3, :4] = torso[2:, 2:] = True
    path = tmp_path / "one.mat"

    def painted(*objects: tuple) -> np.ndarray:
        archives.save_people(path, list(objects))
        return pascal.parts_map(path, (6, 8))

    over = painted(archives.person({"lear": head, "neck": torso}))
    assert (over[torso] == 2).all() and (over[head & ~torso] == 1).all()
    under = painted(archives.person({"neck": torso}), archives.person({"nose": head}))
    assert (under[head] == 1).all() and pascal.kinds(path) == [15, 15]
    assert not painted(archives.person({"head": head}, 12)).any() and pascal.kinds(path) == [12]
    assert not painted(archives.person({})).any() and pascal.kinds(path) == [15]
    assert not painted().any() and pascal.kinds(path) == []
    nothing = {"head": np.zeros((6, 8), bool)}
    assert not painted(archives.person(nothing)).any() and pascal.kinds(path) == [-1]
