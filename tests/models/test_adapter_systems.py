"""Systems with adapters on a frozen decoder against their equations, layer by layer."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.models.adapter_fusion.model import AdapterFusionConfig
from moezoo.models.alter.model import ALTERConfig
from moezoo.models.cpoly.model import CPolyConfig
from moezoo.models.meteora.model import GateLoss, MeteoRAConfig
from moezoo.models.mocle.model import MoCLEConfig
from moezoo.models.phatgoose.model import PhatgooseConfig
from moezoo.models.polytropon.model import PolyConfig
from moezoo.models.smora.model import SMoRAConfig
from moezoo.nn import module, surgery
from moezoo.nn.context import Context
from moezoo.nn.injection import Adapted, fold
from tests.models.tiny import filled

DECODER = DecoderConfig(vocabulary=20, width=8, depth=1, heads=2, groups=1, hidden=6, length=16)
TEXT, SIZE = {"lm": 20}, (1, 16)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
METEORA = MeteoRAConfig(decoder=DECODER, loras=3, rank=2, temperature=2.0)
CPOLY = CPolyConfig(decoder=DECODER, tasks=3, shared=2, own=1, rank=2)
MOCLE = MoCLEConfig(decoder=DECODER, cluster_of_task=(0, 1, 0), loras=2, rank=2, cluster_width=4)
GATED = PhatgooseConfig(decoder=DECODER, rank=2)
POLY = PolyConfig(decoder=DECODER, tasks=3, skills=2, rank=2, heads=2)
X_ND = np.random.default_rng(3).normal(size=(4, 8)).astype(np.float32)


def built(config: Any) -> Any:
    return module.merge(*filled(lambda: config.build(TEXT, SIZE, nnx.Rngs(0))))


def layer(config: Any) -> Any:
    return surgery.get(built(config), "layers/0/attn/q").update


def added(update: Any, task: int = 0) -> np.ndarray:
    return np.asarray(update(jnp.asarray(X_ND), Context(task))[0])


def parts(update: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A_e and B_e of every expert."""
    a, b = (np.asarray(p.get_value()) for p in (update.down, update.up))
    return np.split(a, update.experts, axis=1), np.split(b, update.experts, axis=0)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def test_meteora_is_its_equation() -> None:
    update = layer(METEORA)
    a, b = parts(update)
    gate = np.asarray(update.router.kernel.get_value())
    y = added(update)
    for n, x in enumerate(X_ND):
        logits = x @ gate
        best = np.argsort(-logits)[:2]
        weights = softmax(logits[best] / 2)
        wanted = sum(w * x @ a[e] @ b[e] for w, e in zip(weights, best, strict=True))
        np.testing.assert_allclose(y[n], 16 / 2 * wanted, **CLOSE)


@pytest.mark.slow
def test_meteora_asks_its_gates_for_the_task() -> None:
    model = built(METEORA)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 5)), jnp.int32)
    task = jnp.asarray([[0] * 5, [2, 2, 1, 7, 0]], jnp.int32)  # 7: of no LoRA; the last is padding
    segments = jnp.ones((2, 5), jnp.int32).at[1, 4].set(0)
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    rows = {"tokens": tokens, "segments": segments, "positions": positions, "task": task}
    output = model.read(rows, train=True, key=jax.random.key(0))
    losses = []
    for record in output.records.values():
        logits = np.asarray(record.routing.logits_NE)
        known = [n for n in range(9) if int(task.reshape(-1)[n]) < 3]
        losses.append(
            np.mean([-np.log(softmax(logits[n])[int(task.reshape(-1)[n])]) for n in known])
        )
    np.testing.assert_allclose(output.losses["gate"], 50 * np.mean(losses), rtol=1e-4)
    assert not model.read(rows, train=False).losses
    assert replace(METEORA, gate_weight=0.0).judge() is None
    assert isinstance(METEORA.judge(), GateLoss)


@pytest.mark.slow
def test_cpoly_is_its_equation_and_folds_into_a_task_s_decoder() -> None:
    update = layer(CPOLY)
    a, b = parts(update)
    for task in (0, 2, 5):
        row = np.zeros(5) if task == 5 else 100 * np.asarray(update.router.kernel.get_value())[task]
        sigmoid = 1 / (1 + np.exp(-row[:2]))
        weights = [*(sigmoid / sigmoid.sum()), *row[2:]]
        wanted = sum(w * X_ND @ a[e] @ b[e] for e, w in enumerate(weights))
        np.testing.assert_allclose(added(update, task), 16 / 2 * wanted, **CLOSE)
    fresh = start_of(CPOLY)
    np.testing.assert_allclose(fresh, np.concatenate([fresh[:, :2], np.eye(3)], 1), atol=1e-6)
    assert np.abs(fresh[:, :2]).max() <= 1.001e-3
    model = built(CPOLY)
    tokens = jnp.asarray([[1, 2, 3]])
    wanted = np.asarray(model.features(tokens, Context(1)).x_BTD)
    fold(model, 1)
    np.testing.assert_allclose(model.features(tokens, Context()).x_BTD, wanted, **CLOSE)


def start_of(config: CPolyConfig) -> np.ndarray:
    """Logits of a fresh table."""
    update = config.make_update(8, 8, nnx.Rngs(0))
    return config.pace * np.asarray(update.router.kernel.get_value())


def test_mocle_is_its_equation() -> None:
    update = layer(MOCLE)
    a, b = parts(update)
    vectors = np.asarray(update.router.clusters.get_value())
    kernel = np.asarray(update.router.kernel.get_value())
    for task, vector in ((0, vectors[0]), (1, vectors[1]), (2, vectors[0]), (9, 0 * vectors[0])):
        probs = softmax(vector @ kernel / 0.1)
        best = probs.argmax()
        wanted = probs[best] * X_ND @ a[best] @ b[best] + (1 - probs[best]) * X_ND @ a[2] @ b[2]
        np.testing.assert_allclose(added(update, task), 16 / 2 * wanted, **CLOSE)


def test_phatgoose_trains_a_gate_on_a_lora_that_is_held() -> None:
    made = filled(lambda: GATED.build(TEXT, SIZE, nnx.Rngs(0)))
    assert all(path.endswith("/router/kernel") for path in module.flatten(made.params))
    update = layer(GATED)
    a, b = parts(update)
    gate = 1 / (1 + np.exp(-(X_ND @ np.asarray(update.router.kernel.get_value()))))
    np.testing.assert_allclose(added(update), 16 / 2 * gate * (X_ND @ a[0] @ b[0]), **CLOSE)
    fresh = GATED.make_update(8, 8, nnx.Rngs(0))
    assert not np.asarray(fresh.router.kernel.get_value()).any()


def test_mhr_z_trains_the_table_alone_and_mhr_mu_has_none() -> None:
    table = filled(lambda: replace(POLY, trained="table", tasks=1).build(TEXT, SIZE, nnx.Rngs(0)))
    assert all(path.endswith("/router/kernel") for path in module.flatten(table.params))
    even = replace(POLY, trained="skills")
    held = filled(lambda: even.build(TEXT, SIZE, nnx.Rngs(0)))
    assert not any("router" in path for path in module.flatten(held.params))
    update = layer(even)
    a, b = parts(update)
    wanted = X_ND @ np.mean(a, axis=0) @ np.mean(b, axis=0)
    np.testing.assert_allclose(added(update, 2), 16 / 2 * wanted, **CLOSE)
    model = built(even)
    fold(model)  # nothing decides, so no task is needed
    assert not surgery.find(model, Adapted)


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (METEORA, {"top_k": 4}, "Cannot choose 4 of 3"),
        (METEORA, {"top_k": 1, "gate_weight": 0.0}, "nothing would teach the gates"),
        (MOCLE, {"cluster_of_task": (0, 2)}, "each must have at least one task"),
        (MOCLE, {"cluster_of_task": ()}, "each must have at least one task"),
        (MOCLE, {"loras": 1}, "nothing to choose"),
    ],
)
def test_what_cannot_be_is_refused(config: Any, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(config, **change)


NAMES = ("a", "b", "c", "d", "e")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (METEORA, "d, e: no LoRA of their own"),
        (CPOLY, "d, e: no row of the table"),
        (MOCLE, "d, e: in no cluster .* LoRA 0 with weight 1/2"),
        (POLY, "d, e: no row of the table .* mix all skills evenly"),
        (
            ALTERConfig(DECODER, "adapters", tasks=3, layers=(0,)),
            "d, e: no adapter .*teach nothing",
        ),
        (AdapterFusionConfig(DECODER, "adapters", tasks=3), "d, e: no adapter"),
    ],
)
def test_tasks_that_tables_lack_are_told(config: Any, says: str) -> None:
    assert re.match(says, config.beyond(NAMES))
    assert config.beyond(NAMES[:3]) is None


def test_of_tasks_that_nothing_is_told_nothing_is_said() -> None:
    assert replace(POLY, trained="skills").beyond(NAMES) is None
    assert AdapterFusionConfig(DECODER, "fusion", tasks=3).beyond(NAMES) is None


def test_another_update_is_called_what_it_is() -> None:
    smora = SMoRAConfig(decoder=DECODER)
    assert smora.variant() is None
    assert "plain LoRA of rank 8" in str(replace(smora, update="lora", ranks=8).variant())
    assert "mixture of 8 LoRAs" in str(replace(smora, update="mixture").variant())
