"""A layer compiled for TPU pods that are not there; needs libtpu (the extra `pod`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from moezoo.errors import UserError
from moezoo.planning import layer as pod
from moezoo.train.schema import MeshConfig

ROOT = Path(__file__).resolve().parents[2]
HAS_LIBTPU = find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed (extra pod)")
SMALL = pod.PlannedLayer(width=256, hidden=512, experts=8, k=2, tokens=64)


def bench(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/bench.py", "pod", "--json", str(folder / "pod.json"), *words]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PATH": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_one_sentence_names_the_extra() -> None:
    with pytest.raises(UserError, match=r"moezoo\[pod\]"):
        pod.devices_of("v5p:2x2x1")


def test_useful_operations() -> None:
    layer = pod.PlannedLayer(width=2, hidden=3, experts=4, k=2, tokens=5)
    assert pod.useful_flops(layer, 10) == 3 * 10 * (2 * 2 * 2 * 3 * 2 + 2 * 2 * 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dispatch", "al_to_all"], "did you mean all_to_all"),
        pytest.param(["--batch", "3"], "--batch is 3", marks=[pytest.mark.slow, needs_libtpu]),
        pytest.param(["--topology", "v9:2"], "v9:2", marks=[pytest.mark.slow, needs_libtpu]),
    ],
)
def test_bad_arguments(words: list[str], message: str, tmp_path: Path) -> None:
    done = bench(tmp_path, *words)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("dispatch", list(pod.DISPATCHES))
def test_a_small_layer_on_a_small_pod(dispatch: str) -> None:
    sizes = MeshConfig(data=1, fsdp=2, expert=4)
    row = pod.measure("v5e:2x4", sizes, dispatch, batch=16, layer=SMALL)
    assert row.chips == 8 and row.mesh == "fsdp 2 x expert 4"
    assert row.memory_bytes > 0 and row.flops > 0
    if dispatch == "all_to_all":
        assert 1.0 <= row.token_ratio <= 1.25  # 1.15 times the tokens, and their choices
    if dispatch == "gather":
        assert row.token_ratio > 1.5


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "data", "batch"), [("v5p:8x8x8", "8", "4096"), ("v6e:16x16", "4", "2048")]
)
@pytest.mark.claims
def test_v_moe_h14_on_a_pod(topology: str, data: str, batch: str, tmp_path: Path) -> None:
    words = ["--topology", topology, "--mesh.data", data, "--batch", batch]
    done = bench(tmp_path, *words, "--dispatch", "all_to_all")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "pod.json").read_text())["rows"]
    assert row["token_ratio"] <= 1.2
    assert row["memory_bytes"] < 2e9
