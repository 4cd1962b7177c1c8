"""Folders of decoders as people have them: what can be loaded is, and else the reason is right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.weights import hf, hf_files
from tests.weights.models import PARTS, edit_json, write

FLAT = module.flatten(PARTS.params)


def read_all(folder: Path) -> dict:
    hf.check(folder)
    return module.flatten(hf.load(folder).parts.params)


def rename(folder: Path, change) -> None:
    arrays = safetensors.numpy.load_file(folder / hf.ONE)
    safetensors.numpy.save_file(
        {change(n): a for n, a in arrays.items() if change(n)}, folder / hf.ONE
    )


def test_shards_without_their_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shard_bytes=600)
    (folder / hf.INDEX).unlink()
    assert hf_files.holds_model(folder)
    found = read_all(folder)
    assert found.keys() == FLAT.keys()
    np.testing.assert_array_equal(found["embed/table"], FLAT["embed/table"])
    shard = sorted(folder.glob("model-00002-*"))[0]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match="has model-00001-of.*, but no model-00002-of"):
        hf.load(folder)
    shard.write_bytes(sorted(folder.glob("model-00001-*"))[0].read_bytes())
    with pytest.raises(UserError, match="in two shards .* no model.safetensors.index.json"):
        hf.load(folder)
    shard.write_bytes(content)
    assert read_all(folder).keys() == FLAT.keys()


def test_a_tied_model_that_holds_its_matrix_as_the_head(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    rename(folder, lambda n: "" if n == "model.embed_tokens.weight" else n)
    found = read_all(folder)
    np.testing.assert_array_equal(found["embed/table"], np.asarray(FLAT["lm_head/kernel"]).T)
    assert "lm_head/kernel" not in found


def test_a_tied_model_saved_without_its_head_has_bare_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    rename(folder, lambda n: "" if n == "lm_head.weight" else n.removeprefix("model."))
    found = read_all(folder)
    np.testing.assert_array_equal(found["layers/1/mlp/up/kernel"], FLAT["layers/1/mlp/up/kernel"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "as pytorch_model.bin .pickles of PyTorch"),
        ("pytorch_model-00001-of-00002.bin", "pickles of PyTorch"),
        ("consolidated.00.pth", "pickles of PyTorch"),
        ("tf_model.h5", "weights of TensorFlow"),
        ("flax_model.msgpack", "weights of Flax"),
        ("model-q4.gguf", "quantised weights of llama.cpp"),
        ("adapter_config.json", "an adapter of PEFT, no whole model"),
        ("consolidated.safetensors", "no .*model.safetensors, but consolidated.safetensors"),
        ("README.md", "There is neither .*model.safetensors nor a shard"),
    ],
)
def test_folders_without_what_is_read(name: str, words: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    (folder / hf.ONE).rename(folder / name)
    with pytest.raises(UserError, match=words):
        hf.load(folder)


@pytest.mark.parametrize("name", ["../m/model-00001-of-00002.safetensors", "/etc/passwd", "a/../b"])
def test_an_index_stays_inside_its_folder(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shard_bytes=600)
    edit_json(folder / hf.INDEX, lambda i: i["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(UserError, match="which is no file inside this folder"):
        hf.load(folder)


def test_an_index_of_pickles(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shard_bytes=600)
    edit_json(folder / hf.INDEX, lambda i: i.update(weight_map={"a": "pytorch_model.bin"}))
    with pytest.raises(UserError, match="names pytorch_model.bin, which is no safetensors file"):
        hf.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, it must be from 1 to"),
        ({"num_hidden_layers": 400}, "has 2 layers, but its config.json asks for 400"),
        ({"hidden_size": 2**70}, "hidden_size is 1180591620717411303424"),
        ({"hidden_size": 8.5}, "hidden_size is 8.5, it must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "config.json: "),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, it must be a finite number"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', it must be an object"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling.factor is 0"),
        ({"rope_theta": 1}, "config.json: rope.theta is 1"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention is"),
        ({"tie_word_embeddings": "yes"}, "it must be true or false"),
        ({"layer_types": [[[]]]}, "layer_types.0. is"),
        ({"model_type": ["llama"]}, "Unknown model_type"),
        ({"head_dim": 2**40}, "head_dim is"),
    ],
)
def test_configurations_that_make_no_model(changes: dict, words: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    edit_json(folder / "config.json", lambda c: c.update(changes))
    with pytest.raises(UserError, match=words) as raised:
        hf.load(folder)
    assert "\n" not in str(raised.value)


def test_stop_tokens_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": {"a": 1}}))
    with pytest.raises(UserError, match="eos_token_id is .*a whole number"):
        hf.stop_tokens(tmp_path)
