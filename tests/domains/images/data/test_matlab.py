"""MATLAB files whose structure is not sound are refused before SciPy's reader, which crashes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io

from moezoo.domains.images.data.dense import matlab
from tests.domains.images.data import archives

MOST = 10**6
# Places and values with which SciPy 1.17 ends in a segmentation fault, and others of the kind.
DAMAGES = [
    (234, 1), (236, 0), (236, 1), (252, 1), (256, 0), (256, 255), (257, 1), (394, 1), (416, 0),
    (449, 255), (480, 255), (513, 255), (544, 0), (682, 1), (124, 7), (128, 3), (126, 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An annotation of one object with one part."""
    path = tmp_path_factory.mktemp("matlab") / "p.mat"
    archives.save_people(path, [archives.person({"head": np.ones((4, 4), bool)})])
    return path.read_bytes()


@pytest.mark.parametrize(("at", "value"), DAMAGES)
def test_damage_that_crashes_the_reader(at: int, value: int, people: bytes) -> None:
    changed = bytearray(people)
    assert changed[at] != value
    changed[at] = value
    with pytest.raises(matlab.MatlabFault):
        matlab.check(bytes(changed), MOST)


def test_incomplete_files(people: bytes) -> None:
    for length in (0, 100, 130, 300, len(people) - 30):
        with pytest.raises(matlab.MatlabFault):
            matlab.load(people[:length] if length != 128 else b"", "anno", MOST)


@pytest.mark.parametrize("packed", [False, True])
def test_what_scipy_writes_is_read_as_scipy_reads_it(packed: bool, tmp_path: Path) -> None:
    given = {
        "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "doubles": np.linspace(0, 1, 24).reshape(2, 3, 4),
        "complex": np.array([[1 + 2j]]),
        "empty": np.zeros((0, 3)),
        "text": "words",
        "cells": np.array([[np.ones((1, 1)), "a"]], object),
        "nested": {"a": {"b": np.ones((2, 2))}, "c": "d"},
    }
    scipy.io.savemat(path := tmp_path / "all.mat", given, do_compression=packed)
    stored = path.read_bytes()
    for name in given:
        wanted = scipy.io.loadmat(path)[name]
        found = matlab.load(stored, name, MOST)
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        assert repr(found) == repr(wanted)
    with pytest.raises(KeyError):
        matlab.load(stored, "other", MOST)
    if packed:
        with pytest.raises(matlab.MatlabFault, match="unpack to more than is read"):
            matlab.load(stored, "bytes", 100)
