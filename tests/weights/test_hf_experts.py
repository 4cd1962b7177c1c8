"""Folders of decoders with experts: stacks taken apart and put together, each part read once."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.latent_attention import LatentConfig
from moezoo.weights import hf
from moezoo.weights.tensor_file import TensorFile
from tests.backbones.test_decoder import random_parts
from tests.weights.models import edit_json

CONFIG = DecoderConfig(
    vocabulary=10, width=8, depth=2, heads=2, groups=1, hidden=6, head_width=4,
    experts=ExpertsConfig(4, 2, 6),
)  # fmt: skip
PARTS = random_parts(CONFIG)
FLAT = module.flatten(PARTS.params)
W1, ROUTER = (f"model.layers.1.block_sparse_moe.{n}.weight" for n in ("experts.2.w1", "gate"))
GATE = "layers/1/mlp/routed/experts/gate/kernel"


def write(folder: Path, **options) -> Path:
    hf.save(folder, CONFIG, PARTS.params, **options)
    return folder


@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 600])
def test_stacks_are_taken_apart_and_put_together(shard_bytes: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shard_bytes=shard_bytes)
    config, parts = hf.load(folder)
    assert config == CONFIG and parts.definition == PARTS.definition
    found = module.flatten(parts.params)
    assert found.keys() == FLAT.keys()
    for path, leaf in FLAT.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    if shard_bytes > 600:
        theirs = safetensors.numpy.load_file(folder / hf.ONE)
        np.testing.assert_array_equal(theirs[W1], np.asarray(FLAT[GATE][2]).T)
        router = np.asarray(FLAT["layers/1/mlp/routed/router/kernel"])
        np.testing.assert_array_equal(theirs[ROUTER], router.T)


def test_a_device_reads_its_own_experts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "m")
    mesh = jax.make_mesh(
        (2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )

    def where(path: str) -> NamedSharding:
        spec = PartitionSpec("a", None, "b") if "/experts/" in path else PartitionSpec()
        return NamedSharding(mesh, spec)

    opened: list[str] = []
    sizes: set[int] = set()
    viewed, copied = TensorFile.viewed, hf.copied

    def counting(self, name):
        opened.append(name)
        return viewed(self, name)

    def measuring(view, dtype):
        sizes.add(view.size)
        return copied(view, dtype)

    monkeypatch.setattr(TensorFile, "viewed", counting)
    monkeypatch.setattr(hf, "copied", measuring)
    stack = module.flatten(hf.load(folder, where).parts.params)[GATE]
    np.testing.assert_array_equal(stack, FLAT[GATE])
    assert {shard.data.shape for shard in stack.addressable_shards} == {(2, 8, 3)}
    assert opened.count(W1) == 2 and 24 in sizes and 48 not in sizes  # each half once


def without(name: str):
    def spoil(folder: Path) -> None:
        arrays = safetensors.numpy.load_file(folder / hf.ONE)
        arrays.pop(name)
        safetensors.numpy.save_file(arrays, folder / hf.ONE)

    return spoil


def fewer(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(num_local_experts=3, num_experts=3))


def wider(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(intermediate_size=7))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without(W1), rf"has no {W1}, which its config.json asks for"),
        (without(ROUTER), rf"has no {ROUTER}, which"),
        (fewer, r"gate.weight in .* has shape \[4, 8\], but config.json asks for \[3, 8\]"),
        (wider, r"w2.weight in .* has shape \[8, 6\], but config.json asks for \[8, 7\]"),
    ],
)
def test_what_does_not_fit_is_one_sentence(spoil, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    spoil(folder)
    with pytest.raises(UserError, match=message) as raised:
        hf.check(folder)
    assert "\n" not in str(raised.value)


def test_an_expert_too_many_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    arrays = safetensors.numpy.load_file(folder / hf.ONE)
    arrays[W1.replace("experts.2", "experts.4")] = arrays[W1]
    safetensors.numpy.save_file(arrays, folder / hf.ONE)
    with pytest.raises(UserError, match=r"has model.layers.1.*experts.4.w1.weight, for which"):
        hf.load(folder)


def test_fused_stacks_of_another_width_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    arrays = safetensors.numpy.load_file(folder / hf.ONE)
    for layer in range(2):
        theirs, ours = f"model.layers.{layer}.", f"layers/{layer}/mlp/routed/"
        for name in [n for n in arrays if n.startswith(f"{theirs}block_sparse_moe")]:
            arrays.pop(name)
        gate, up, down = (
            np.swapaxes(np.asarray(FLAT[f"{ours}experts/{n}/kernel"]), 1, 2)
            for n in ("gate", "up", "down")
        )
        arrays[f"{theirs}mlp.gate.weight"] = np.asarray(FLAT[f"{ours}router/kernel"]).T
        arrays[f"{theirs}mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        arrays[f"{theirs}mlp.experts.down_proj"] = down
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, folder / hf.ONE)
    np.testing.assert_array_equal(module.flatten(hf.load(folder).parts.params)[GATE], FLAT[GATE])
    wider(folder)
    arrays["model.layers.0.mlp.experts.down_proj"] = np.zeros((4, 8, 7), np.float32)
    safetensors.numpy.save_file(arrays, folder / hf.ONE)
    wanted = r"gate_up_proj in .* has shape \[4, 12, 8\], but config.json asks for \[4, 14, 8\]"
    with pytest.raises(UserError, match=wanted):
        hf.load(folder)


def test_layers_behind_the_last_one_are_left_behind_where_a_family_has_them(tmp_path: Path) -> None:
    experts = ExpertsConfig(
        4, 2, 6, "sigmoid_then_top_k", "score_plus_bias", group_score="two_best", shared=6,
        shared_weight="one", dense=(0,),
    )  # fmt: skip
    config = DecoderConfig(
        vocabulary=10, width=8, depth=2, heads=2, groups=2, hidden=6, experts=experts,
        latent=LatentConfig(4, 4, 2, 4, 2),
    )  # fmt: skip
    parts = random_parts(config)
    hf.save(tmp_path / "v3", config, parts.params)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    ahead = {"model.layers.2.enorm.weight": np.ones(8, np.float32)}
    for folder in (tmp_path / "v3", write(tmp_path / "mixtral")):
        arrays = safetensors.numpy.load_file(folder / hf.ONE)
        safetensors.numpy.save_file(arrays | ahead, folder / hf.ONE)
    found = module.flatten(hf.load(tmp_path / "v3").parts.params)
    for path, leaf in module.flatten(parts.params).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    stored = safetensors.numpy.load_file(tmp_path / "v3" / hf.ONE)
    np.testing.assert_array_equal(stored[bias], found["layers/1/mlp/routed/router/bias"])
    with pytest.raises(UserError, match=r"has model.layers.2.enorm.weight, for which"):
        hf.check(tmp_path / "mixtral")
