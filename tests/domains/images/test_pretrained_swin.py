"""Pretrained Swin transformers for a configured model: what fits, and the options that help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.pretrained_swin import SwinTransformers
from moezoo.errors import UserError
from moezoo.models.swin_dense.model import SwinDenseConfig
from moezoo.nn import module
from moezoo.train import start
from moezoo.weights.swin_names import to_hf_swin, to_timm_swin
from tests.domains.images.test_pretrained import corrected, refusal
from tests.models.tiny import filled
from tests.train import tiny
from tests.weights import vit_files

SIZES: dict[str, Any] = {"width": 4, "depths": (1, 2), "heads": (1, 2), "patch": 2, "window": 4}
MODEL = SwinDenseConfig(**SIZES, mlp_ratio=2.0, head_channels=2)
SIZE = (16, 16)


def config(model: Any = MODEL, **changes: Any) -> Any:
    made = tiny.config("unused", model=model, data=DataConfig(resolution=SIZE))
    return replace(made, **changes)


@pytest.fixture(scope="module")
def parts() -> module.ModuleParts:
    return filled(lambda: MODEL.build({"depth": 1}, SIZE, nnx.Rngs(0)))


@pytest.fixture(scope="module")
def trunk(parts: module.ModuleParts) -> dict[str, np.ndarray]:
    flat = module.flatten(parts.params)
    return {path: np.asarray(a) for path, a in flat.items() if not path.startswith("heads/")}


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path)
    return path


@pytest.fixture(scope="module")
def file(trunk: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {"head.fc.weight": np.ones((3, 8), np.float32)}
    more["layers.1.blocks.1.attn_mask"] = np.ones((4, 4), np.float32)
    return write(
        tmp_path_factory.mktemp("swin") / "s.safetensors", to_timm_swin(trunk).arrays | more
    )


def test_a_model_of_its_sizes_begins_with_it(
    file: Path, parts: module.ModuleParts, trunk: dict[str, np.ndarray]
) -> None:
    given = config()
    start.check_fits(file, given)
    leaves = module.flatten(parts.params) | module.flatten(parts.stats)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    found = given.data.domain.pretrained.arrays(file, given, shapes)
    assert found is not None and found.keys() == trunk.keys()
    for path, array in trunk.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    said = given.data.domain.pretrained.left_behind(file, given)
    assert "ignored: head.fc" in said and "ImageNet's mean" in said


def test_a_refusal_prints_the_options_that_help(file: Path) -> None:
    given = config(SwinDenseConfig(width=8, depths=(1, 1), heads=(2, 2), patch=2, window=2))
    sentence = refusal(file, given)
    assert "--model.width 4 --model.depths 1 2 --model.heads 1 2 --model.window 4" in sentence
    start.check_fits(file, corrected(sentence, given))


def test_windows_of_another_size_are_told(file: Path) -> None:
    """A stage whose grid is smaller than its window has another table of offsets."""
    given = config(data=DataConfig(resolution=(8, 8)))
    sentence = refusal(file, given)
    assert "offset_bias is [49, 2], the model's [9, 2]" in sentence


def test_the_kinds_are_not_taken_for_each_other(file: Path, tmp_path: Path) -> None:
    sentence = refusal(file, tiny.config("unused", data=DataConfig(resolution=SIZE)))
    assert "a pretrained Swin transformer, but tiny can begin with a pretrained vision" in sentence
    path = vit_files.write(tmp_path / "vit.safetensors", vit_files.timm())
    assert "can begin with a pretrained Swin transformer" in refusal(path, config())


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings is True"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps is 0.001"),
    ],
)
def test_folders_that_compute_something_else(
    told: dict, says: str, trunk: dict[str, np.ndarray], tmp_path: Path
) -> None:
    arrays = to_hf_swin(trunk).arrays
    plain = vit_files.folder(tmp_path / "plain", arrays, {"model_type": "swin"})
    start.check_fits(plain, config())
    other = vit_files.folder(tmp_path / "other", arrays, {"model_type": "swin"} | told)
    assert says in refusal(other, config())


def test_what_has_no_place_is_refused_by_name(trunk: dict[str, np.ndarray], tmp_path: Path) -> None:
    scale = {"layers.0.blocks.0.attn.logit_scale": np.ones(3, np.float32)}  # of Swin v2
    path = write(tmp_path / "s.safetensors", to_timm_swin(trunk).arrays | scale)
    assert "has layers.0.blocks.0.attn.logit_scale, for which there is no place" in refusal(
        path, config()
    )
    start.check_fits(path, config(start_without=("layers.0.blocks.0.attn.logit_scale",)))
    with pytest.raises(UserError, match="start_heads is for vision transformers"):
        start.check_fits(path, config(start_heads=2))
    assert not SwinTransformers().knows(tmp_path / "nothing")
