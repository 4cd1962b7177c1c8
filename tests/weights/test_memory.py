"""Loading holds a checkpoint once, and beside it no more than the largest of its arrays.

The folders are true in shape and written with holes: a file of many gigabytes takes kilobytes.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.nn import module
from moezoo.weights import hf, shards
from moezoo.weights.hf_config import names_of, to_hf
from moezoo.weights.names import place
from moezoo.weights.tensor_file import TensorFile
from tests.fixtures import ROOT

BFLOAT16: dict[str, Any] = {"param_dtype": "bfloat16", "dtype": "bfloat16"}
TINY_LLAMA = DecoderConfig(
    vocabulary=32_000, width=2048, depth=22, heads=32, groups=4, hidden=5632, **BFLOAT16
)
LLAMA_7B = DecoderConfig(
    vocabulary=32_000, width=4096, depth=32, heads=32, groups=32, hidden=11_008, **BFLOAT16
)
# TinyLlama's weights as experts, a sixteenth of an MLP each.
SPARSE = replace(TINY_LLAMA, experts=ExpertsConfig(16, 2, 352), hidden=352)
DOWN = "mlp/down/kernel", "model.layers.7.mlp.down_proj.weight"
DOWN_OF_3 = (
    "mlp/routed/experts/down/kernel", "model.layers.7.block_sparse_moe.experts.3.w2.weight"
)  # fmt: skip

# What the kernel counts as resident: anonymous memory, where JAX's arrays live on a CPU, and
# pages of mapped files as long as they are mapped. The peak includes both.
PROBE = """
import sys, time, numpy as np, jax, jax.numpy as jnp
from flax import nnx
from moezoo.nn import module
from moezoo.train import mesh, placement
from moezoo.train.schema import MeshConfig
from moezoo.weights import hf

def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

jax.block_until_ready(jnp.ones(3) + 1)  # the backend is up
sizes = MeshConfig(data=1, fsdp=jax.device_count())
config = hf.read_config(sys.argv[1], param_dtype="bfloat16", dtype="bfloat16")
tree = module.abstract(lambda: config.build(nnx.Rngs(0))).params
where = module.flatten(placement.shardings(mesh.make_mesh(sizes), tree))
before, began = kilobytes("VmRSS"), time.time()
_, parts = hf.load(sys.argv[1], where.get, param_dtype="bfloat16", dtype="bfloat16")
jax.block_until_ready(parts.params)
leaves = jax.tree.leaves(parts.params)
size, largest = sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves)
kernel = module.flatten(parts.params)["layers/7/" + sys.argv[2]]
kernel = kernel[3] if kernel.ndim == 3 else kernel
picked = np.asarray(kernel[5, :40], np.float32)
print((kilobytes("VmHWM") - before) * 1024 - size, size, largest, time.time() - began, *picked)
"""


def names_and_shapes(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of the arrays in a folder of Hugging Face's."""
    forms = module.abstract(lambda: config.build(nnx.Rngs(0))).params
    for path, form in module.flatten(forms).items():
        at = place(path, names_of(config))
        one = form.shape[1:] if at.stacked else form.shape
        shape = at.layout.store(np.broadcast_to(np.zeros(()), one)).shape
        for name in map(at.of_expert, range(form.shape[0])) if at.stacked else (at.theirs,):
            yield name, shape


def write_sparse(folder: Path, config: DecoderConfig, shard_bytes: int, filled: str) -> None:
    """A model of zeros that are not on the disk, but for the array that is looked at."""
    folder.mkdir()
    tensors: list[dict[str, Any]] = [{}]
    at = 0
    for name, shape in names_and_shapes(config):
        size = 2 * int(np.prod(shape))
        if tensors[-1] and at + size > shard_bytes:
            tensors.append({})
            at = 0
        offsets = [at, at + size]
        tensors[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
        at += size
    files = {}
    for number, entries in enumerate(tensors):
        text = json.dumps(entries).encode()
        file = folder / f"model-{number:05}.safetensors"
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + max(e["data_offsets"][1] for e in entries.values()))
            if filled in entries:
                (_, columns), (begin, _) = (entries[filled][k] for k in ("shape", "data_offsets"))
                for row in range(40):
                    out.seek(8 + len(text) + begin + 2 * (row * columns + 5))
                    out.write(struct.pack("<H", 0x3F80 + row))  # 1 and what follows it
        files |= dict.fromkeys(entries, file.name)
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(to_hf(config)))


def load(folder: Path, devices: int, ours: str) -> tuple[float, float, float, list[float]]:
    """Bytes beyond the arrays at the peak, of all arrays and of the largest; numbers picked."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PATH": ""}
    command = [sys.executable, "-c", PROBE, str(folder), ours]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    beyond, size, largest, seconds, *picked = map(float, done.stdout.split())
    print(
        f"{size / 1e9:.2f} GB on {devices} devices in {seconds:.0f} s, at the peak "
        f"{beyond / 1e6:.0f} MB beyond the arrays, {beyond / largest:.2f} times the largest"
    )
    return beyond, size, largest, picked


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("config", "devices", "names"),
    [
        pytest.param(TINY_LLAMA, 1, DOWN, marks=pytest.mark.slow, id="1B on one"),
        pytest.param(TINY_LLAMA, 8, DOWN, marks=pytest.mark.slow, id="1B on eight"),
        pytest.param(SPARSE, 8, DOWN_OF_3, marks=pytest.mark.slow, id="1B of experts on eight"),
        pytest.param(LLAMA_7B, 8, DOWN, marks=pytest.mark.claims, id="7B on eight"),
    ],
)
def test_loading_peaks_at_the_arrays_and_the_largest_of_them(
    config: DecoderConfig, devices: int, names: tuple[str, str], tmp_path: Path
) -> None:
    ours, theirs = names
    write_sparse(tmp_path / "model", config, 2 << 30, theirs)
    beyond, size, largest, picked = load(tmp_path / "model", devices, ours)
    assert size > 2.1e9
    # What the interpreter and compiled programs take meanwhile, and parts on the host.
    buffers = 60e6 + shards.AHEAD * largest / devices
    assert beyond < 1.2 * largest + buffers
    shard = json.loads((tmp_path / "model" / hf.INDEX).read_text())["weight_map"][theirs]
    file = TensorFile(tmp_path / "model" / shard)
    stored = file.read(theirs, lambda a: np.array(a[:40, 5], np.float32))
    assert len(set(picked)) == 40
    np.testing.assert_array_equal(np.array(picked, np.float32), stored)


@pytest.mark.parametrize("spec", [(), ("x",), (None, "x")], ids=str)
def test_every_part_is_read_once_and_lies_where_it_belongs(spec: tuple[Any, ...]) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    sharding, whole = NamedSharding(mesh, PartitionSpec(*spec)), np.arange(96.0).reshape(8, 12)
    read: list[str] = []

    def part(index: Any) -> np.ndarray:
        read.append(str(index))
        return whole[index]

    made = shards.from_parts(whole.shape, sharding, part)
    np.testing.assert_array_equal(made, whole)
    assert made.sharding == sharding
    assert sorted(read) == sorted(set(read)) and len(read) == (4 if spec else 1)
