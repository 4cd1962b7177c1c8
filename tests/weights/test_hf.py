"""Folders of decoders: what is written is read equal, onto devices, and damage is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.weights import hf
from moezoo.weights.shards import from_parts
from moezoo.weights.tensor_file import BLOCK, TensorFile, copied
from tests.weights.models import CONFIG, PARTS, edit_json, write

FLAT = module.flatten(PARTS.params)
Q = "model.layers.1.self_attn.q_proj.weight"


def assert_equal(params) -> None:
    found = module.flatten(params)
    assert found.keys() == FLAT.keys()
    for path, leaf in FLAT.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 600])
def test_what_is_written_is_read_equal(shard_bytes: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shard_bytes=shard_bytes, more={"eos_token_id": [3, 4]})
    config, parts = hf.load(folder)
    assert config == CONFIG and parts.definition == PARTS.definition
    assert_equal(parts.params)
    assert hf.stop_tokens(folder) == (3, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]  # nothing temporary is left
    sizes = [p.stat().st_size for p in folder.glob("*.safetensors")]
    if shard_bytes == 600:
        index = json.loads((folder / hf.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in FLAT.values())
        assert len(sizes) > 3
    else:
        assert len(sizes) == 1 and not (folder / hf.INDEX).exists()


def test_the_files_are_what_the_safetensors_package_reads_and_writes(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    theirs = safetensors.numpy.load_file(folder / hf.ONE)
    np.testing.assert_array_equal(theirs[Q], np.asarray(FLAT["layers/1/attn/q/kernel"]).T)
    safetensors.numpy.save_file(theirs, folder / hf.ONE)
    assert_equal(hf.load(folder).parts.params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_types_are_cast_on_the_way_in(kind: str, tmp_path: Path) -> None:
    half = jax.tree.map(lambda a: a.astype(kind), PARTS.params)
    hf.save(tmp_path / "half", CONFIG, half)
    text = json.loads((tmp_path / "half" / "config.json").read_text())
    assert CONFIG.param_dtype == "float32" and text["torch_dtype"] == kind
    for wanted in (kind, "float32"):
        loaded = hf.load(tmp_path / "half", param_dtype=wanted, dtype="bfloat16")
        assert loaded.config.param_dtype == wanted and loaded.config.dtype == "bfloat16"
        for path, leaf in module.flatten(loaded.parts.params).items():
            assert leaf.dtype == wanted
            expected = FLAT[path].astype(kind).astype(wanted)
            np.testing.assert_array_equal(leaf, expected)


def test_arrays_go_into_their_shardings_and_only_their_part_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "m")
    mesh = jax.make_mesh(
        (2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )

    def where(path: str) -> NamedSharding:
        spec = PartitionSpec("a", "b") if path.endswith("kernel") else PartitionSpec()
        return NamedSharding(mesh, spec)

    taken: list[tuple[tuple[int, ...], list[int]]] = []

    def counting(shape, sharding, read):
        sizes: list[int] = []
        taken.append((shape, sizes))

        def counted(index):
            found = read(index)
            sizes.append(found.size)
            return found

        return from_parts(shape, sharding, counted)

    monkeypatch.setattr(hf, "from_parts", counting)
    params = hf.load(folder, where).parts.params
    assert_equal(params)
    kernel = params["layers"]["1"]["attn"]["q"]["kernel"]
    assert kernel.sharding == where("kernel")
    assert {s.data.shape for s in kernel.addressable_shards} == {(4, 4)}
    assert (kernel.shape, [16] * 4) in taken and ((8,), [8]) in taken


def test_a_tied_head_and_old_constants_in_the_file_are_ignored(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    arrays = safetensors.numpy.load_file(folder / hf.ONE)
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    safetensors.numpy.save_file(arrays, folder / hf.ONE)
    assert_equal(hf.load(folder).parts.params)
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    assert "lm_head" not in hf.load(folder).parts.params


def drop(folder: Path, name: str) -> None:
    arrays = safetensors.numpy.load_file(folder / hf.ONE)
    del arrays[name]
    safetensors.numpy.save_file(arrays, folder / hf.ONE)


def put(folder: Path, name: str, array: np.ndarray) -> None:
    arrays = safetensors.numpy.load_file(folder / hf.ONE)
    safetensors.numpy.save_file(arrays | {name: array}, folder / hf.ONE)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


SPOILED = {
    "no_config": (lambda f: (f / "config.json").unlink(), "There is no .*config.json"),
    "config_no_json": (lambda f: cut(f / "config.json", 20), "config.json: it is not JSON"),
    "config_a_list": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "no_weights": (lambda f: (f / hf.ONE).unlink(), "There is neither .*model.safetensors"),
    "missing": (lambda f: drop(f, Q), f"has no {Q}, which its config.json asks for"),
    "shape": (
        lambda f: put(f, Q, np.zeros((8, 7), np.float32)),
        r"q_proj.weight in .* has shape \[8, 7\], but config.json asks for \[8, 8\]",
    ),
    "left_over": (
        lambda f: put(f, "model.layers.0.moe.weight", np.zeros(3, np.float32)),
        "has model.layers.0.moe.weight, for which the architecture .* has no place",
    ),
    "integers": (
        lambda f: put(f, Q, np.zeros((8, 8), np.int8)),
        "q_proj.weight in .* has type I8; only BF16, F16, F32, F64 can be read",
    ),
    "truncated": (lambda f: cut(f / hf.ONE, 4000), "is truncated or no safetensors file"),
    "empty": (lambda f: cut(f / hf.ONE, 0), "is truncated or no safetensors file"),
    "header": (
        lambda f: (f / hf.ONE).write_bytes(b"\x05\0\0\0\0\0\0\0hello" + bytes(99)),
        "is truncated or no safetensors file",
    ),
}
SPOILED_SHARDS = {
    "no_shard": (lambda f: sorted(f.glob("model-*"))[1].unlink(), "There is no .*model-00002-of"),
    "half_a_shard": (
        lambda f: cut(sorted(f.glob("model-*"))[1], 150),
        "model-00002-of.* is truncated or no safetensors file",
    ),
    "index_no_json": (lambda f: cut(f / hf.INDEX, 30), "index.json: it is not JSON"),
    "index_no_map": (
        lambda f: edit_json(f / hf.INDEX, lambda i: i.pop("weight_map")),
        "index.json: weight_map is missing",
    ),
    "index_wrong": (
        lambda f: edit_json(
            f / hf.INDEX, lambda i: i["weight_map"].update({Q: i["weight_map"]["lm_head.weight"]})
        ),
        f"has no {Q}, which the index says is there",
    ),
}


@pytest.mark.parametrize("kind", list(SPOILED | SPOILED_SHARDS))
def test_damage_is_one_sentence(kind: str, tmp_path: Path) -> None:
    spoil, message = (SPOILED | SPOILED_SHARDS)[kind]
    sharded = {"shard_bytes": 600} if kind in SPOILED_SHARDS else {}
    folder = write(tmp_path / "m", **sharded)
    spoil(folder)
    with pytest.raises(UserError, match=message) as raised:
        hf.load(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already; choose another folder"):
        write(tmp_path)


def test_adapters_have_no_name_there(tmp_path: Path) -> None:
    params = PARTS.params | {"adapter": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(UserError, match="adapter/kernel has no name in transformers"):
        hf.save(tmp_path / "m", CONFIG, params)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write .*file/m: .*; choose another folder"):
        write(tmp_path / "file" / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_array_of_half_floats_is_read_in_part(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16)
    other = np.ones(3, np.float32)  # so that the next array begins at no even boundary
    safetensors.numpy.save_file({"a": other, "b": array}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    found = file.read("b", lambda a: np.array(a[1:3, ::2], np.float32))
    np.testing.assert_array_equal(found, array[1:3, ::2].astype(np.float32))


@pytest.mark.parametrize("shape", [(BLOCK + 3, 2 * BLOCK), (5, BLOCK), (7,), (0, 4)])
def test_copies_in_blocks(shape: tuple[int, ...]) -> None:
    plain = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for view in (plain, plain.T, plain.T[1:]):
        found = copied(view, np.float16)
        assert found.flags.c_contiguous and found.flags.owndata
        np.testing.assert_array_equal(found, view.astype(np.float16))
