"""The benchmark of experts from a file: every number is measured and written."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moezoo.bench import stream
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.weights import tensor_file

SMALL = "--tokens 24 --width 8 --hidden 12 --repeats 2 --processes 1".split()


@pytest.mark.slow
def test_rows_of_all_numbers_of_experts(tmp_path: Path, capsys) -> None:
    files = ["--json", str(tmp_path / "s.json"), "--picture", str(tmp_path / "s.png")]
    assert stream.run([*SMALL, "--experts", "3", *files]) == 0
    told = json.loads((tmp_path / "s.json").read_text())
    (row,) = told["rows"]
    assert row["experts"] == 3 and row["streamed_ms"] > 0 < row["resident_ms"]
    assert row["throughput"] > 0 < row["in_turn"] and row["resident_mib"] >= 0
    assert "jax" in told["versions"] and told["sizes"]["width"] == 8
    assert Image.open(tmp_path / "s.png", formats=["PNG"]).size[0] > 500
    assert "between its extremes" in capsys.readouterr().out


def layer_file(a: stream.StreamArguments, file: Path) -> None:
    """Weights of a layer: routers that choose every expert, and experts that are zeros."""
    parts, rng = module.abstract(partial(stream.TaskLayer, a)), np.random.default_rng(0)
    shapes = module.flatten({"params": parts.params, "stats": parts.stats})

    def array(name: str) -> np.ndarray:
        shape = shapes[name].shape
        made = np.zeros(shape) if "/experts/" in name else rng.normal(size=shape)
        return made.astype(np.float32)

    planned = {
        name: tensor_file.Planned(leaf.shape, np.dtype(leaf.dtype), partial(array, name))
        for name, leaf in sorted(shapes.items())
    }
    tensor_file.write(file, planned)


@pytest.mark.slow
@pytest.mark.claims
def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    """By the operating system's counters, from 4 to 64 experts: by less than one expert."""
    found, least = {}, {}
    for experts in (4, 64):
        a = stream.StreamArguments(experts=(experts,), tokens=512, width=768, hidden=3072)
        file = tmp_path / "layer.safetensors"
        layer_file(a, file)
        one = file.stat().st_size / experts / stream.MIB  # of an expert
        # The smaller of two: other work can only add to what a process holds.
        runs = [stream.in_fresh_process(a, "streamed", experts, file)["mib"] for _ in range(2)]
        found[experts], least[experts] = min(runs), 2 * one
    assert all(found[experts] > least[experts] for experts in found), "two slots are there"
    assert abs(found[64] - found[4]) < one
    assert found[64] < file.stat().st_size / stream.MIB / 5


def test_the_peak_of_memory_is_seen_though_it_is_gone_afterwards() -> None:
    with stream.peak() as found:
        before = found[0]
        big = np.ones(20_000_000)  # touched: 160 MB
        time.sleep(0.1)
        del big
    assert 150e6 < found[0] - before < 300e6
    assert stream.anonymous() - before < 100e6


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--processes", "0"], "--processes is 0; it must be at least 1"),
        (["--experts", "1"], "give numbers of at least 2, the --k"),
        (["--measure", "times"], "--file is for one --measure, which needs it"),
        (["--file", "x"], "--file is for one --measure, which needs it"),
    ],
)
def test_senseless_sizes_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        stream.run(words)
