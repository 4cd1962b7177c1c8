"""Swin transformers against transformers: maps of all stages, folders read, written, read there.

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

from moezoo.backbones.swin import SwinConfig, SwinTrunk
from moezoo.nn import module
from moezoo.weights import swin
from moezoo.weights.fold import Normalisation

torch = pytest.importorskip("torch", reason="torch is not installed (extra parity)")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra parity)"
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIZES: dict[str, Any] = {
    "embed_dim": 12, "patch_size": 2, "initializer_range": 0.3, "mlp_ratio": 2.0,
    "depths": [2, 3], "num_heads": [2, 3], "drop_path_rate": 0.0,
}  # fmt: skip
# Windows that fit the maps (12 x 12, 6 x 6), and windows that do not (14 x 14 and 7 x 7 by 4).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fits": ("SwinModel", {"image_size": 24, "window_size": 3}),
    "padded": ("SwinForImageClassification", {"image_size": 28, "window_size": 4}),
}
PLAIN = Normalisation((0.0,) * 3, (1.0,) * 3)


class Pair(NamedTuple):
    """Their model, its folder, our configuration, and arrays by our paths."""

    theirs: Any
    folder: Path
    config: SwinConfig
    arrays: dict[str, np.ndarray]
    images: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]


def trunk(config: SwinConfig, size: tuple[int, int]) -> module.ModuleParts:
    return module.abstract(lambda: SwinTrunk(config, size, rngs=nnx.Rngs(0)))


def shapes(config: SwinConfig, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    flat = module.flatten(trunk(config, size).params)
    return {path: leaf.shape for path, leaf in flat.items()}


@pytest.fixture(scope="module", params=[pytest.param("fits", marks=pytest.mark.slow), "padded"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, changes = MODELS[request.param]
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(transformers.SwinConfig(**(SIZES | changes))).eval()
    with torch.no_grad():  # they begin with biases of 0 and norms of 1
        for tensor in theirs.parameters():
            tensor.add_(0.2 * torch.randn_like(tensor))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert swin.is_swin(folder)
    source = swin.source(folder)
    config = SwinConfig(**swin.options(source))
    side = changes["image_size"]
    arrays = swin.read(source, shapes(config, (side, side)), PLAIN)
    images = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    return Pair(theirs, folder, config, dict(arrays), images)


def our_levels(pair: Pair) -> list[np.ndarray]:
    parts = trunk(pair.config, pair.size)
    assert set(module.flatten(parts.params)) == set(pair.arrays)

    def run(params: Any, image: Any) -> Any:
        return module.merge(parts.definition, params, parts.stats).levels(image)

    found = jax.jit(run)(module.unflatten(pair.arrays), pair.images)
    return [np.asarray(level) for level in found]


def their_levels(model: Any, images: np.ndarray) -> list[np.ndarray]:
    """The maps behind the blocks of every stage, the last one normalised."""
    model = getattr(model, "swin", model)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        x, grid = model.embeddings(pixels)
        maps = model.encoder(
            x, grid, output_hidden_states=True, output_hidden_states_before_downsampling=True
        ).reshaped_hidden_states
        last = model(pixels).last_hidden_state.numpy()
    found = [level.numpy().transpose(0, 2, 3, 1) for level in maps[1:]]
    return [*found[:-1], last.reshape(found[-1].shape)]


def test_maps_of_every_stage(pair: Pair) -> None:
    assert (pair.config.depths, pair.config.heads) == ((2, 3), (2, 3))
    wanted, found = their_levels(pair.theirs, pair.images), our_levels(pair)
    assert len(wanted) == len(found) == 2
    for theirs, ours in zip(wanted, found, strict=True):
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_what_we_write_loads_there_and_here(pair: Pair, tmp_path: Path) -> None:
    side = pair.size[0]
    swin.save(tmp_path / "written", pair.config, pair.arrays, side, PLAIN)
    again, told = transformers.SwinModel.from_pretrained(
        tmp_path / "written", output_loading_info=True
    )
    assert not any(told.values()), told
    wanted = their_levels(pair.theirs, pair.images)
    for theirs, ours in zip(wanted, their_levels(again.eval(), pair.images), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    source = swin.source(tmp_path / "written")
    assert SwinConfig(**swin.options(source)) == pair.config
    back = swin.read(source, shapes(pair.config, pair.size), PLAIN)
    assert back.keys() == pair.arrays.keys()
    for path, array in pair.arrays.items():
        np.testing.assert_array_equal(back[path], array, err_msg=path)
