"""AST against transformers, through files on disk.

Needs torch and transformers beside moezoo, in one environment; makes its models itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.ast import AST, fitted, special_token
from moezoo.nn import module
from moezoo.weights import ast
from moezoo.weights.ast import from_transformers

torch = pytest.importorskip("torch", reason="torch is not installed (extra parity)")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra parity)"
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_length": 48,
    "num_mel_bins": 24,
    "patch_size": 8,
    "time_stride": 5,
    "frequency_stride": 6,
    "num_labels": 4,
    # Large weights: with 0.02 a wrong order of tokens would hardly show.
    "initializer_range": 0.2,
}


def made(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.ASTConfig(**(SIZES | changes))).eval()
    with torch.no_grad():  # tokens, positions and biases begin with 0, norms with 1
        for name, tensor in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "token" in name or "position" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model


def ours(folder: Path) -> tuple[module.ModuleParts, Any]:
    config, arrays = ast.read_config(folder), ast.load(folder)
    parts = module.abstract(lambda: AST(config, rngs=nnx.Rngs(0)))
    assert set(arrays) == set(module.flatten(parts.params))
    params = {path: jnp.asarray(a) for path, a in arrays.items()}
    parts = parts._replace(params=module.unflatten(params))

    @jax.jit
    def run(params: Any, audio: Any) -> Any:
        return module.merge(parts.definition, params, parts.stats)(audio).y

    return parts, run


@pytest.mark.parametrize("kind", ["ASTModel", "ASTForAudioClassification"])
def test_tokens_of_a_folder(kind: str, tmp_path: Path) -> None:
    theirs = made(kind, qkv_bias=kind == "ASTModel")
    theirs.save_pretrained(tmp_path / "model")
    parts, run = ours(tmp_path / "model")
    audio = np.random.default_rng(0).normal(size=(2, 48, 24)).astype(np.float32)
    trunk = getattr(theirs, "audio_spectrogram_transformer", theirs)
    with torch.no_grad():
        wanted = trunk(torch.from_numpy(audio))
    found = run(parts.params, jnp.asarray(audio))
    np.testing.assert_allclose(found, wanted.last_hidden_state.numpy(), **CLOSE)
    np.testing.assert_allclose(special_token(found), wanted.pooler_output.numpy(), **CLOSE)
    # The same arrays under the names of the modules.
    state = {name: tensor.numpy() for name, tensor in trunk.state_dict().items()}
    again = from_transformers(state)
    assert not again.unknown
    for path, array in again.arrays.items():
        np.testing.assert_array_equal(array, module.flatten(parts.params)[path])


@pytest.mark.parametrize("frames", [33, 70])
def test_another_length_is_theirs_with_our_positions(frames: int, tmp_path: Path) -> None:
    """Positions cut or stretched by us, put into a model of theirs that was made for the length."""
    theirs = made("ASTModel")
    theirs.save_pretrained(tmp_path / "model")
    parts, run = ours(tmp_path / "model")
    config = ast.read_config(tmp_path / "model")
    other = made("ASTModel", max_length=frames)
    table = fitted(parts.params["pos_embed"], config.grid(48), config.grid(frames))
    state = theirs.state_dict()
    state["embeddings.position_embeddings"] = torch.from_numpy(np.array(table))
    other.load_state_dict(state)
    audio = np.random.default_rng(1).normal(size=(1, frames, 24)).astype(np.float32)
    with torch.no_grad():
        wanted = other(torch.from_numpy(audio)).last_hidden_state.numpy()
    np.testing.assert_allclose(run(parts.params, jnp.asarray(audio)), wanted, **CLOSE)
