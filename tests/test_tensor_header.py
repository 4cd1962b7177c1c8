"""Headers of safetensors files: what the format's own library writes passes, nothing else does."""

from __future__ import annotations

import io
import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moezoo import tensor_header
from moezoo.schema_check import FormatFault

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}


def file(header: Any, data: bytes = bytes(11)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read(content: bytes) -> dict[str, tensor_header.TensorEntry]:
    return tensor_header.read(io.BytesIO(content), len(content))


def test_what_the_library_writes() -> None:
    kinds = {"f": np.float32, "b": ml_dtypes.bfloat16, "i": np.int64, "t": np.bool_, "h": np.int16}
    arrays = {name: np.arange(6).astype(kind).reshape(2, 3) for name, kind in kinds.items()}
    arrays |= {"empty": np.zeros((0, 4), np.float32), "scalar": np.array(7.0)}
    content = safetensors.numpy.save(arrays, metadata={"format": "np"})
    found = read(content)
    assert found.keys() == arrays.keys()
    for name, entry in found.items():
        assert content[entry.start : entry.end] == arrays[name].tobytes()
        assert entry.shape == arrays[name].shape
    assert read(file({}, b"")) == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it has 0 bytes"),
        (bytes(20), "tells of a header of 0"),
        (b"\xff" * 20, "tells of a header of 18,446,744,073,709,551,615"),
        (file({"a": A, "b": B})[:-1], "end at byte .*, the file has"),
        (file({"a": A, "b": B}, bytes(12)), "end at byte .*, the file has"),
        (file(b"{x"), "it is not JSON"),
        (file([A]), "it must be an object"),
        (file(b'{"a":' * 90_000), "nested too deep|not JSON"),
        (file({"a": A, "b": []}), "b is .*, it must be an object"),
        (file({"a": A, "b": B | {"dtype": "F3"}}), "b.dtype is 'F3'"),
        (file({"a": A, "b": B | {"dtype": ["F32"]}}), "b.dtype is"),
        (file({"a": A, "b": B | {"shape": [1.5, 2]}}), "must be a whole number"),
        (file({"a": A, "b": B | {"shape": [True, 3]}}), "must be a whole number"),
        (file({"a": A, "b": B | {"shape": [-1, -3]}}), "must be from 0 to"),
        (file({"a": A, "b": B | {"shape": [2**70]}}), "must be from 0 to"),
        (file({"a": A, "b": B | {"shape": [2**40, 0, 2]}}), "instead of 0"),
        (file({"a": A, "b": B | {"shape": [4]}}), "'b' has 3 bytes instead of 4"),
        (file({"a": A, "b": B | {"data_offsets": [-3, 0]}}), "must be from 0 to"),
        (file({"a": A, "b": B | {"data_offsets": [11, 8]}}), "'b' has -3 bytes"),
        (file({"a": A, "b": B | {"data_offsets": [0, 3]}}), "shares bytes"),
        (file({"a": A, "b": B | {"data_offsets": [7, 10]}}), "shares bytes"),
        (file({"a": A, "b": B | {"data_offsets": [9, 12]}}, bytes(12)), "behind a gap"),
        (file({"a": A, "b": B | {"data_offsets": [8, 2**61]}}), "instead of 3"),
        (file({"a": A, "b": {"dtype": "U8", "shape": [3]}}), "b.data_offsets is missing"),
        (file({"a": A, "b": B | {"more": 1}}), "b.more is not known"),
        (file(b'{"a":%s,"a":%s}' % (json.dumps(A).encode(), json.dumps(B).encode())), "'a' twice"),
        (file({"__metadata__": [], "a": A, "b": B}), "__metadata__ is"),
    ],
)
def test_what_is_none(content: bytes, words: str) -> None:
    with pytest.raises(FormatFault, match=words):
        read(content)
