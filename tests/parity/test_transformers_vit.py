"""Vision transformers against transformers: tokens, folders read, written, and read there again.

Needs torch and transformers beside moezoo, in one environment; makes its models itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.vit import Trunk, ViT, ViTConfig, whole_block
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.context import NO_TASK
from moezoo.weights import hf_vit, vit, vit_source
from moezoo.weights.fold import Normalisation

torch = pytest.importorskip("torch", reason="torch is not installed (extra parity)")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra parity)"
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIDE, PATCH, WIDTH, DEPTH, HEADS = 16, 4, 12, 2, 3
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.3, "layer_norm_eps": 1e-6,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("ViT", {"intermediate_size": 2 * WIDTH}, {"add_pooling_layer": False}),
    "dinov2": ("Dinov2", {"mlp_ratio": 2, "layerscale_value": 0.7}, {}),
    "dinov2_with_registers": (
        "Dinov2WithRegisters",
        {"mlp_ratio": 2, "num_register_tokens": 3, "layerscale_value": 0.7},
        {},
    ),
}
PLAIN = Normalisation((0.0,) * 3, (1.0,) * 3)
IMAGES = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)


class Pair(NamedTuple):
    """Their model, its folder, our configuration and arrays by our paths."""

    theirs: Any
    folder: Path
    config: ViTConfig
    arrays: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, changes, options = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    theirs = getattr(transformers, f"{kind}Model")(config, **options).eval()
    with torch.no_grad():  # they begin with biases and registers of 0 and norms of 1
        for tensor in theirs.parameters():
            tensor.add_(0.2 * torch.randn_like(tensor))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    plain = {"do_normalize": False, "do_rescale": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(plain))
    source = vit_source.source(folder)
    known = ("registers", "qk_norm")
    more = {name: value for name, value in vit.options(source).items() if name in known}
    ours = ViTConfig(WIDTH, DEPTH, HEADS, PATCH, 2.0, **more)
    return Pair(theirs, folder, ours, dict(vit.read(source, _target(ours), pixels=PLAIN)))


def _parts(config: ViTConfig) -> module.ModuleParts:
    return module.abstract(lambda: ViT(config, (SIDE, SIDE), 1, rngs=nnx.Rngs(0)))


def _target(config: ViTConfig) -> vit.Target:
    shapes = {path: leaf.shape for path, leaf in module.flatten(_parts(config).params).items()}
    grid = SIDE // PATCH
    return vit.Target(shapes, (grid, grid), HEADS)


def our_tokens(pair: Pair) -> np.ndarray:
    """Tokens of a model of ours with these arrays, behind its last norm."""
    model = ViT(pair.config, (SIDE, SIDE), 1, rngs=nnx.Rngs(0))
    parts = module.split(model)
    flat = module.flatten(parts.params)
    assert set(flat) - set(pair.arrays) == {"head/kernel", "head/bias"}
    assert set(pair.arrays) <= set(flat)
    params = module.unflatten(flat | pair.arrays)

    def tokens(params: Any, image: Any) -> Any:
        trunk: Trunk = module.merge(parts.definition, params, parts.stats)
        return trunk.norm(trunk.run(trunk.embed(image), step=whole_block(NO_TASK)))

    return np.asarray(jax.jit(tokens)(params, IMAGES))


def their_tokens(model: Any, registers: int) -> np.ndarray:
    """Class token and patches, without the registers between them."""
    with torch.no_grad():
        found = model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    return np.concatenate([found[:, :1], found[:, 1 + registers :]], axis=1)


def test_tokens(pair: Pair) -> None:
    wanted = their_tokens(pair.theirs, pair.config.registers)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(our_tokens(pair), wanted, **CLOSE)


def test_what_we_write_loads_there_and_here(pair: Pair, tmp_path: Path) -> None:
    hf_vit.save(tmp_path / "written", pair.config, pair.arrays, SIDE, PLAIN)
    kind = transformers.Dinov2WithRegistersModel if pair.config.registers else transformers.ViTModel
    options = {} if pair.config.registers else {"add_pooling_layer": False}
    again, told = kind.from_pretrained(tmp_path / "written", output_loading_info=True, **options)
    assert not any(told.values()), told
    wanted = their_tokens(pair.theirs, pair.config.registers)
    found = their_tokens(again.eval(), pair.config.registers)
    np.testing.assert_allclose(found, wanted, **CLOSE)
    back = vit.read(vit_source.source(tmp_path / "written"), _target(pair.config), pixels=PLAIN)
    assert back.keys() == pair.arrays.keys()
    for path, array in pair.arrays.items():
        np.testing.assert_array_equal(back[path], array, err_msg=path)


def test_a_part_that_they_have_not_is_refused_by_name(tmp_path: Path) -> None:
    config = ViTConfig(WIDTH, DEPTH, HEADS, PATCH, 2.0, qk_norm="layer")
    flat = module.flatten(_parts(config).params)
    arrays = {path: np.zeros(leaf.shape) for path, leaf in flat.items() if path[:4] != "head"}
    with pytest.raises(UserError, match="blocks/0/attn/key_norm/bias has no name in .* vit"):
        hf_vit.save(tmp_path / "written", config, arrays, SIDE, PLAIN)
    assert not list(tmp_path.iterdir())


def test_a_second_class_token_is_refused_by_name(tmp_path: Path) -> None:
    theirs = transformers.DeiTModel(transformers.DeiTConfig(**SIZES, intermediate_size=2 * WIDTH))
    theirs.save_pretrained(tmp_path / "deit")
    with pytest.raises(UserError, match="no place for its dist_token"):
        vit.read(vit_source.source(tmp_path / "deit"), _target(ViTConfig(12, 2, 3, 4, 2.0)))


def test_rotated_patches_are_refused_by_name(tmp_path: Path) -> None:
    sizes = SIZES | {"intermediate_size": 2 * WIDTH}
    theirs = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes))
    theirs.save_pretrained(tmp_path / "dinov3")
    with pytest.raises(UserError, match="dinov3_vit is not supported, because it rotates queries"):
        vit_source.source(tmp_path / "dinov3")
