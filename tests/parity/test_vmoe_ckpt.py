"""Checkpoints written by the published V-MoE code, against the arrays that it saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.weights import vit_source, vmoe_names
from moezoo.weights.files import open_file
from moezoo.weights.vmoe_file import VMoECheckpoint
from tests.fixtures import folder


def checkpoints() -> list[Path]:
    """Every one there is; skips where the fixtures are absent."""
    found = sorted((folder("vmoe") / "ckpt_v1").glob("*.index"))
    assert found
    return found


def test_arrays_and_their_pieces() -> None:
    for path in checkpoints():
        expected = np.load(path.with_name("expected_params.npz"))
        index: Any = json.loads(path.with_name("expected_index.json").read_text())["index"]
        found = VMoECheckpoint(path)
        assert set(found.infos) == set(expected.files) == set(index)
        for name, array in expected.items():
            info, wanted = found.infos[name], index[name]
            assert list(info.shape) == wanted["shape"] and str(info.dtype) == wanted["dtype"]
            parts = [[[piece.start, piece.stop] for piece in part] for part in info.parts]
            assert parts == wanted["slices"] and info.shards == wanted["shards"]
            np.testing.assert_array_equal(found.read(name), array)


def test_their_names_are_those_of_the_zoo() -> None:
    for path in checkpoints():
        given, file = vit_source.source(path), open_file(path)
        assert given.kind.title == "V-MoE" and not given.unknown
        assert set(given.beyond) == {name for name in file.stored if name.startswith("head/")}
        arrays = {name: file.read(name) for name in file.stored if name not in given.beyond}
        ours, unknown = vmoe_names.from_checkpoint(arrays)
        assert not unknown and {name: a.shape for name, a in ours.items()} == given.shapes
        assert any("/experts/" in name for name in ours)
        assert any("/router/" in name for name in ours)
