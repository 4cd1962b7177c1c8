"""What PEFT's settings make of an adapter: followed exactly, or refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.nn import surgery
from moezoo.nn.injection import fold
from moezoo.nn.layers import Linear
from moezoo.schema_check import FormatFault
from moezoo.weights import peft
from moezoo.weights.peft_config import Patterns

TINY = DecoderConfig(vocabulary=11, width=8, depth=1, heads=2, groups=1, hidden=6)
ALPHA, RANK = 6.0, 2
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_rslora": False,
    "base_model_name_or_path": "somebody/base", "target_modules": ["q_proj", "up_proj"],
    "peft_version": "0.17.0", "task_type": "CAUSAL_LM", "modules_to_save": None,
}  # fmt: skip
PLACES = {"layers/0/attn/q": "self_attn.q_proj", "layers/0/mlp/up": "mlp.up_proj"}


def base(seed: int = 0) -> Any:
    return TINY.build(nnx.Rngs(seed))


def kernels(model: Any) -> dict[str, np.ndarray]:
    """Of every linear layer, with its update added."""
    fold(model)
    found = surgery.find(model, Linear)
    return {path: np.asarray(layer.kernel.get_value()) for path, layer in found.items()}


def written(folder: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]], **values: Any) -> Path:
    """An adapter folder: (A [r, D], B [O, r]) by our path."""
    folder.mkdir()
    arrays = {}
    for path, (a, b) in factors.items():
        name = f"base_model.model.model.layers.0.{PLACES[path]}"
        arrays[f"{name}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        arrays[f"{name}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    save_file(arrays, folder / peft.ARRAYS)
    (folder / peft.CONFIG).write_text(json.dumps(CONFIG | values))
    return folder


def pissa(weight_OD: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """What PEFT's `pissa_init` gives A and B."""
    u, s, vt = np.linalg.svd(weight_OD.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:RANK] / scale)
    return root[:, None] * vt[:RANK], u[:, :RANK] * root


def olora(weight_OD: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """What PEFT's `olora_init` gives A and B."""
    q, r = np.linalg.qr(weight_OD.astype(np.float64))
    return r[:RANK], q[:, :RANK]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", [pissa, olora])
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_what_it_learned(
    kind: Any, rslora: bool, tmp_path: Path
) -> None:
    plain = kernels(base())
    scale = ALPHA / (np.sqrt(RANK) if rslora else RANK)
    fresh = {path: kind(plain[path].T, scale) for path in PLACES}
    settings = {"init_lora_weights": kind.__name__, "use_rslora": rslora}
    model = base()
    peft.attach(model, peft.read(written(tmp_path / "fresh", fresh, **settings), base()))
    for path, kernel in kernels(model).items():
        np.testing.assert_allclose(kernel, plain[path], atol=2e-6, err_msg=path)
    rng = np.random.default_rng(0)
    trained = {p: (a + rng.normal(size=a.shape), b) for p, (a, b) in fresh.items()}
    model = base()
    peft.attach(model, peft.read(written(tmp_path / "trained", trained, **settings), base()))
    for path, kernel in kernels(model).items():
        if path in PLACES:
            (a, b), (a0, b0) = trained[path], fresh[path]
            assert np.abs(b @ a - b0 @ a0).max() > 0.1
            wanted = plain[path] + scale * (b @ a - b0 @ a0).T
            np.testing.assert_allclose(kernel, wanted, atol=5e-6, err_msg=path)


def some(folder: Path, **values: Any) -> Path:
    rng = np.random.default_rng(1)
    ranks = values.pop("arrays", RANK)
    factors = {"layers/0/attn/q": (rng.normal(size=(ranks, 8)), rng.normal(size=(8, ranks)))}
    return written(folder, factors, **values)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_beginnings_that_leave_the_base_alone(init: Any, tmp_path: Path) -> None:
    model = base()
    adapter = peft.read(some(tmp_path / "a", init_lora_weights=init), model)
    peft.attach(model, adapter)
    factors = adapter.layers["layers/0/attn/q"]
    wanted = kernels(base())["layers/0/attn/q"] + factors.scale * factors.down @ factors.up
    np.testing.assert_allclose(kernels(model)["layers/0/attn/q"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"}, {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "PiSSA"}, {"init_lora_weights": "unchanged"},
        {"init_lora_weights": 1}, {"init_lora_weights": ["pissa"]},
        {"use_dora": True}, {"use_qalora": True}, {"target_parameters": ["a"]},
        {"bias": "lora_only"}, {"lora_bias": True}, {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]}, {"layer_replication": [[0, 1]]},
        {"trainable_token_indices": [1]}, {"arrow_config": {"top_k": 2}},
        {"alora_invocation_tokens": [1, 2]}, {"use_bdlora": {"n": 2}},
        {"megatron_config": {"a": 1}}, {"something_new": 2}, {"something_new": True},
        {"use_dora": 1},
    ],
)  # fmt: skip
def test_settings_that_change_what_an_adapter_computes(values: dict, tmp_path: Path) -> None:
    (name,) = values
    with pytest.raises(UserError, match=f"has {name} = "):
        peft.read(some(tmp_path / "a", **values), base())


def test_settings_that_are_off_or_silent(tmp_path: Path) -> None:
    values = dict.fromkeys(["use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"], False)
    values |= dict.fromkeys(
        ["arrow_config", "megatron_config", "something_new", "layer_replication"]
    )
    values |= {"loftq_config": {}, "modules_to_save": [], "layers_to_transform": [0]}
    assert peft.read(some(tmp_path / "a", **values), base()).layers


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 3}, "says rank 3 for model.layers.0.self_attn.q_proj, whose arrays have 2"),
        ({"rank_pattern": {"q_proj": 4}}, "says rank 4"),
        ({"r": 0}, "r is 0, it must be from 1"),
        ({"r": 2.0}, "r is 2.0, it must be a whole number"),
        ({"r": 2**70}, "r is 1180591620717411303424"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern.q_proj is '8'"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is"),
        ({"peft_type": ["LORA"]}, "peft_type"),
    ],
)
def test_values_of_a_wrong_kind(values: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as raised:
        peft.read(some(tmp_path / "a", **values), base())
    assert "\n" not in str(raised.value)


def test_ranks_by_pattern(tmp_path: Path) -> None:
    folder = some(tmp_path / "a", rank_pattern={r"layers\.0\.self_attn\.q_proj": 3}, arrays=3)
    assert peft.read(folder, base()).layers["layers/0/attn/q"].scale == ALPHA / 3


EVIL = [
    r"(a+)+$", r"(.*)*x", r"(\w+\.?)+!", r"((a|a)*)*!", r".*.*.*.*.*!", r"\w*\w*\w*\w*x",
    "a?" * 30 + "a" * 30, "(.|.)" * 30 + "!", r"(?=.*a)+", r"(.)\1", r"(\w{1,9}){1,9}!", "(" * 5000,
    "x" * 3000 + "*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", EVIL)
def test_patterns_without_end(pattern: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="too involved|no regular expression"):
        peft.read(some(tmp_path / "a", alpha_pattern={pattern: 1.0}), base())
    assert time.monotonic() - began < 5


def test_patterns_that_people_write() -> None:
    given = {
        r"layers\.[0-3]\.self_attn\.(q|k)_proj": 1, r".*\.mlp\..*": 2, r"layers\.\d+\.o_proj": 3,
        "^model.layers.0.v_proj": 4, "k_proj": 5,
    }  # fmt: skip
    patterns = Patterns(given, "rank_pattern")
    names = {
        "model.layers.2.self_attn.k_proj": 1, "model.layers.9.self_attn.k_proj": 5,
        "model.layers.9.mlp.up_proj": 2, "model.layers.11.o_proj": 3, "model.layers.0.v_proj": 4,
        "model.layers.9.self_attn.q_proj": 0, "model.layers.0.xk_proj": 0,
    }  # fmt: skip
    assert {name: patterns.of(name, 0) for name in names} == names


def test_many_slow_patterns_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moezoo.weights.peft_config.SECONDS", 0.0)
    with pytest.raises(FormatFault, match="take too long"):
        Patterns({r".*\d+.*!": 1}, "rank_pattern").of("model." + "1" * 50, 0)


def test_pickles_and_values_that_are_not_finite(tmp_path: Path) -> None:
    folder = some(tmp_path / "a")
    arrays = load_file(folder / peft.ARRAYS)
    next(iter(arrays.values()))[0, 0] = np.nan
    save_file(arrays, folder / peft.ARRAYS)
    with pytest.raises(UserError, match="not finite"):
        peft.read(folder, base())
    (folder / peft.ARRAYS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle of PyTorch"):
        peft.read(folder, base())
