"""REAP's and MoNE's saliencies of a tiny Mixtral, from its published arrays, in NumPy alone.

The oracle reads the Hugging Face folder and computes the whole decoder in float64 by the names and
equations that transformers has for Mixtral; then the papers' sums over tokens. REAP
(arXiv:2510.13999): the mean over the tokens that chose e of g_e |y_e|. MoNE (arXiv:2507.00390, the
published code's `fusion`): the deviation of y_e over those tokens times the mean of g_e over all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.deploy import calibrate, scores, task_path
from moezoo.domains.text.domain import TextDataConfig
from moezoo.domains.text.paths import RowPaths, RowReader
from moezoo.nn import module
from moezoo.weights import hf
from tests.models.tiny import filled

pytestmark = pytest.mark.slow

CONFIG = DecoderConfig(
    vocabulary=259, width=16, depth=2, heads=4, groups=2, hidden=16, experts=ExpertsConfig(4, 2, 12)
)
DATA = TextDataConfig(length=24, train=8, test=8, only=("reverse",))
Arrays = dict[str, np.ndarray]


class Asked(NamedTuple):
    """One sparse layer on one row: the choices' weights, and what all experts give."""

    gates_TE: np.ndarray
    outputs_TED: np.ndarray


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def turned(x_THD: np.ndarray, theta: float) -> np.ndarray:
    """Rotary positions, halves of a head as pairs."""
    half = x_THD.shape[-1] // 2
    angle = np.arange(len(x_THD))[:, None] / theta ** (np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x_THD[..., :half], x_THD[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(x: np.ndarray, w: Arrays, at: str, told: Any, theta: float) -> np.ndarray:
    heads, groups = told["num_attention_heads"], told["num_key_value_heads"]
    split = {"q": heads, "k": groups, "v": groups}
    q, k, v = ((x @ w[f"{at}.{n}_proj.weight"].T).reshape(len(x), h, -1) for n, h in split.items())
    q, k = turned(q, theta), turned(k, theta)
    k, v = (np.repeat(one, heads // groups, axis=1) for one in (k, v))
    logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    later = np.triu(np.ones((len(x), len(x)), bool), 1)
    mixed = np.einsum("hts,shd->thd", softmax(np.where(later, -np.inf, logits)), v)
    return mixed.reshape(len(x), -1) @ w[f"{at}.o_proj.weight"].T


def sparse(x: np.ndarray, w: Arrays, at: str, told: Any) -> Asked:
    probs = softmax(x @ w[f"{at}.gate.weight"].T)
    kept = np.argsort(-probs, axis=-1)[:, : told["num_experts_per_tok"]]
    gates = np.zeros_like(probs)
    np.put_along_axis(gates, kept, np.take_along_axis(probs, kept, -1), -1)
    outputs = [
        (silu(x @ w[f"{one}.w1.weight"].T) * (x @ w[f"{one}.w3.weight"].T))
        @ w[f"{one}.w2.weight"].T
        for one in (f"{at}.experts.{e}" for e in range(told["num_local_experts"]))
    ]
    return Asked(gates / gates.sum(-1, keepdims=True), np.stack(outputs, axis=1))


def oracle(tokens: np.ndarray, w: Arrays, told: Any, theta: float) -> list[Asked]:
    """Every sparse layer on one row."""
    x, eps, asked = w["model.embed_tokens.weight"][tokens], told["rms_norm_eps"], []
    for i in range(told["num_hidden_layers"]):
        at = f"model.layers.{i}"
        seen = norm(x, w[f"{at}.input_layernorm.weight"], eps)
        x = x + attention(seen, w, f"{at}.self_attn", told, theta)
        seen = norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        asked.append(sparse(seen, w, f"{at}.block_sparse_moe", told))
        x = x + np.einsum("te,ted->td", *asked[-1])
    return asked


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The zoo's calibration, and the oracle's layers over the same rows."""
    parts = filled(lambda: CONFIG.build(nnx.Rngs(0)))
    folder: Path = tmp_path_factory.mktemp("mixtral") / "made"
    hf.save(folder, CONFIG, parts.params)
    told = json.loads((folder / "config.json").read_text())
    assert told["model_type"] == "mixtral"
    theta = (told.get("rope_parameters") or told).get("rope_theta", 10_000.0)
    (file,) = folder.glob("*.safetensors")
    arrays = {k: v.astype(np.float64) for k, v in safetensors.numpy.load_file(file).items()}
    exporter = RowPaths(DATA, "reverse")
    source = exporter.open("train")
    rows = exporter.stack([source[i] for i in range(8)], (), source.info)["rows"]
    whole = task_path.task_path(
        RowReader(module.merge(*parts), "reverse"), "reverse", exporter.input
    )
    found = calibrate.calibrate(whole, [{"rows": rows, "valid": np.ones(8, bool)}], "rows")
    layers = [oracle(row[0][row[0] >= 0], arrays, told, theta) for row in rows]
    joined = [
        Asked(*map(np.concatenate, zip(*one, strict=True))) for one in zip(*layers, strict=True)
    ]
    return found, joined


def test_reap_is_the_papers_sum(both: Any) -> None:
    found, layers = both
    assert len(found.layers) == len(layers) == 2
    for usage, one in zip(found.layers.values(), layers, strict=True):
        norms_TE = np.linalg.norm(one.outputs_TED, axis=-1)
        chosen_TE = one.gates_TE > 0
        np.testing.assert_array_equal(usage.count_E, chosen_TE.sum(0))
        wanted = (one.gates_TE * norms_TE).sum(0) / chosen_TE.sum(0)
        np.testing.assert_allclose(scores.reap_mean(usage), wanted, rtol=1e-4)
        np.testing.assert_allclose(scores.reap(usage), wanted * chosen_TE.sum(0), rtol=1e-4)
        assert np.ptp(wanted) > 1e-2 * wanted.max(), "experts differ"


def test_mone_is_the_published_fusion(both: Any) -> None:
    found, layers = both
    for usage, one in zip(found.layers.values(), layers, strict=True):
        deviation = [
            np.sqrt(one.outputs_TED[one.gates_TE[:, e] > 0, e].var(axis=0).sum())
            for e in range(one.gates_TE.shape[1])
        ]
        wanted = np.asarray(deviation) * one.gates_TE.mean(axis=0)
        np.testing.assert_allclose(scores.mone(usage), wanted, rtol=1e-4)
