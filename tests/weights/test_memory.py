"""A checkpoint of 1.1 billion parameters is never twice in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.nn import module
from moezoo.weights import hf
from moezoo.weights.tensor_file import TensorFile
from tests.fixtures import ROOT

CONFIG = DecoderConfig(  # TinyLlama's sizes
    vocabulary=32_000,
    width=2048,
    depth=22,
    heads=32,
    groups=4,
    hidden=5632,
    param_dtype="bfloat16",
    dtype="bfloat16",
)
# The same weights as experts, a sixteenth of an MLP each.
SPARSE = replace(CONFIG, experts=ExpertsConfig(16, 2, CONFIG.hidden // 16), hidden=352)

# What the kernel counts as resident: anonymous memory, where JAX's arrays live on a CPU, and
# pages of mapped files as long as they are mapped. The peak includes both.
PROBE = """
import sys, numpy as np, jax, jax.numpy as jnp
from moezoo.nn import module
from moezoo.weights import hf

def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

jax.block_until_ready(jnp.ones(3) + 1)  # the backend is up
before = kilobytes("VmRSS")
config, parts = hf.load(sys.argv[1], param_dtype="bfloat16", dtype="bfloat16")
jax.block_until_ready(parts.params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(parts.params))
picked = module.flatten(parts.params)["layers/7/mlp/" + sys.argv[2]]
picked = picked[(3,) * (picked.ndim - 2) + (5, slice(40))]
print((kilobytes("VmHWM") - before) * 1024 / size, size, *np.asarray(picked, np.float32))
"""


def write_random(folder: Path, config: DecoderConfig) -> None:
    """Shards of 300 MB, written as they are drawn."""
    folder.mkdir()
    shapes = module.abstract(lambda: config.build(nnx.Rngs(0))).params
    rng = np.random.default_rng(0)

    class Random:
        """As much of an array as `hf` asks of one, its values drawn when they are wanted."""

        def __init__(self, shape, dtype):
            self.shape, self.dtype = shape, dtype

        def __array__(self, dtype=None, copy=None):
            if self.dtype == np.float32:  # routers are
                return rng.random(self.shape, np.float32)
            return rng.integers(0, 0x7F00, self.shape, np.uint16).view(self.dtype)

        def __getitem__(self, expert):
            return Random(self.shape[1:], self.dtype)

    arrays = {path: Random(s.shape, s.dtype) for path, s in module.flatten(shapes).items()}
    hf.save(folder / "model", config, module.unflatten(arrays), shard_bytes=300_000_000)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("config", "ours", "theirs"),
    [
        (CONFIG, "down/kernel", "mlp.down_proj"),
        (SPARSE, "routed/experts/down/kernel", "block_sparse_moe.experts.3.w2"),
    ],
    ids=["dense", "experts"],
)
def test_loading_peaks_below_1_3_times_the_checkpoint(
    config: DecoderConfig, ours: str, theirs: str, tmp_path: Path
) -> None:
    write_random(tmp_path / "c", config)
    folder = tmp_path / "c" / "model"
    shards = sorted(folder.glob("*.safetensors"))
    assert (
        len(shards) > 5 and json.loads((folder / "config.json").read_text())["vocab_size"] == 32_000
    )
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder), ours],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ratio, size, *picked = map(float, done.stdout.split())
    print(f"peak {ratio:.3f} times {size / 1e9:.2f} GB")
    assert size > 2.1e9
    assert 0.99 < ratio < 1.3, f"peak {ratio:.3f} times the checkpoint"
    name = f"model.layers.7.{theirs}.weight"
    shard = json.loads((folder / hf.INDEX).read_text())["weight_map"][name]
    stored = TensorFile(folder / shard).read(name, lambda a: np.array(a[:40, 5], np.float32))
    np.testing.assert_array_equal(np.array(picked, np.float32), stored)
