"""Checkpoints in the published V-MoE code's form, whole and damaged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.errors import UserError
from moezoo.weights.files import open_file
from moezoo.weights.vmoe_file import MARKER
from tests.weights.vmoe_files import array, extension, halves, info, sliced, write

pack = msgpack.packb


@given(seed=st.integers(0, 2**31 - 1), kind=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_what_was_written_in_pieces_is_read_whole(
    seed: int, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    names = ["head/bias", "Encoder/block_1/kernel", "Encoder/block/kernel", "Encoder/block_10/b"]
    arrays = {
        name: rng.normal(size=rng.integers(1, 5, rng.integers(1, 4))).astype(dtype)
        for name in names
    }
    path = write(tmp_path_factory.mktemp("m"), arrays, {n: halves(a) for n, a in arrays.items()})
    found = open_file(path)
    assert set(found.stored) == set(names)
    for name, a in arrays.items():
        assert found.stored[name] == (a.shape, dtype)
        np.testing.assert_array_equal(found.read(name), a)


PLAIN = {"a/kernel": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones(2, np.float32)}


def change(path: Path, how: Callable[[Any], Any]) -> None:
    """The index with something else in it."""
    hook: Any = msgpack.ExtType
    content = msgpack.unpackb(path.read_bytes(), ext_hook=hook, strict_map_key=False)
    path.write_bytes(pack(how(content)))


def too_far(index: Any) -> Any:
    part = ((slice(2, 5), slice(0, 3)), 0), ((slice(0, 1), slice(0, 3)), 1)
    index["index"]["a"]["kernel"] = info(PLAIN["a/kernel"], list(part))
    return index


def half(index: Any) -> Any:
    index["index"]["a"]["kernel"] = info(PLAIN["a/kernel"], halves(PLAIN["a/kernel"])[:1])
    return index


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda index: index | {"version": "19990101"}, "its version is 19990101, not 20220622"),
        (lambda index: {k: v for k, v in index.items() if k != "version"}, "its version is None"),
        (lambda index: [1, 2], "its version is None"),
        (lambda index: index | {"index": {"a": 5}}, "a is no array"),
        (lambda index: index | {"index": {"a": msgpack.ExtType(42, b"x")}}, "of kind 42"),
        (lambda index: index | {"shard_count": 3}, "needs m.data-00000-of-00003 beside it"),
        (too_far, "a piece of a/kernel lies outside of it"),
        (half, "the pieces of a/kernel are not all of it"),
    ],
)
def test_a_wrong_index_is_one_sentence(
    how: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path, PLAIN, {n: halves(a) for n, a in PLAIN.items()})
    change(path, how)
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        open_file(path)
    assert "\n" not in str(raised.value)


def test_damaged_and_missing_data_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN, {n: halves(a) for n, a in PLAIN.items()})
    data = tmp_path / "m.data-00001-of-00002"
    whole = data.read_bytes()
    data.write_bytes(whole[:-7])
    with pytest.raises(UserError, match="m.index' cannot be read as .index"):
        open_file(path)
    data.write_bytes(pack({MARKER: True}))
    with pytest.raises(UserError, match="m.data-00001-of-00002 has no array 0"):
        open_file(path).read("a/kernel")
    data.write_bytes(
        pack(
            {
                MARKER: True,
                "0": [[[array(np.ones(6))], extension(6, sliced((slice(0, 2), slice(0, 3))))]],
            }
        )
    )
    with pytest.raises(UserError, match="a piece of a/kernel is not that of the index"):
        open_file(path).read("a/kernel")
    data.unlink()
    with pytest.raises(UserError, match="needs m.data-00001-of-00002 beside it"):
        open_file(path)
