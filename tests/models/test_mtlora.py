"""MTLoRA: begins as its base, one task's path is exact, costs, what trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.deploy.specialise import specialise
from moezoo.models.mtlora.model import MTLoRAConfig, MTLoRAViTConfig, TaskLoRAConfig
from moezoo.models.swin_dense.model import SwinDenseConfig
from moezoo.nn import module
from moezoo.nn.upcycle import carry_over
from tests.models.tiny import TASKS, call, image, parts_of

LORA = TaskLoRAConfig(shared_ranks=3, task_ranks=2, merging="adapted")
SIZES: dict[str, Any] = {
    "width": 4, "depths": (2, 1), "heads": (1, 2), "patch": 2, "window": 2, "mlp_ratio": 2.0,
    "head_channels": 2,
}  # fmt: skip
SWIN = MTLoRAConfig(**SIZES, lora=LORA)
VIT = MTLoRAViTConfig(width=8, depth=2, heads=2, patch=4, head_channels=4, registers=1, lora=LORA)
SIZE = (8, 12)


@pytest.mark.parametrize("config", [SWIN, VIT], ids=["swin", "vit"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"mode": "matrixv2"}, {"reference_quirks": ("shared_base",)}, {"mode": "addition"},
     {"mode": "lora_only"}],
    ids=str,
)  # fmt: skip
def test_a_tasks_path_is_the_models(config: Any, changes: dict[str, Any]) -> None:
    config = replace(config, lora=replace(LORA, **changes))
    parts, x = parts_of(config, TASKS, SIZE), image(SIZE, 2)
    both, one = call(parts, x).predictions, call(parts, x, tasks=("depth",)).predictions
    assert both["semseg"].shape == (2, *SIZE, 3) and both["depth"].dtype == jnp.float32
    np.testing.assert_allclose(one["depth"], both["depth"], rtol=1e-4, atol=1e-5)
    own = specialise(module.merge(*parts), list(TASKS).index("depth"))
    found = module.split(own.model)
    left = call(found, x, tasks=("depth",)).predictions["depth"]
    np.testing.assert_allclose(left, both["depth"], rtol=1e-4, atol=1e-5)
    kinds = {layer.kind for layer in own.mixtures.values()}
    wanted = {"addition": {"whole"}, "lora_only": set()}
    assert kinds == wanted.get(config.lora.mode, {"exact_fold"})


def test_begins_as_its_base_and_only_adapters_norms_and_heads_train() -> None:
    base = parts_of(SwinDenseConfig(**SIZES), TASKS, SIZE)
    fresh = module.split(SWIN.build(TASKS, SIZE, nnx.Rngs(0)))
    learned = module.flatten(base.params) | module.flatten(base.stats)
    begun = [carry_over(learned, tree) for tree in (fresh.params, fresh.stats)]
    assert not set(begun[0].unused) & set(begun[1].unused)
    assert all("/shared/" in path or "/own/" in path for path in begun[0].fresh)
    parts = module.ModuleParts(fresh.definition, begun[0].params, begun[1].params)
    x = image(SIZE, 2)
    for task, y in call(base, x).predictions.items():
        np.testing.assert_allclose(call(parts, x).predictions[task], y, rtol=1e-4, atol=1e-5)
    trained = set(module.flatten(fresh.params))
    marks = ("/shared/", "/own/", "heads/", "norm")
    assert all(any(mark in path for mark in marks) for path in trained)


@pytest.mark.parametrize("reads", [(), ("shared_base",)], ids=["own", "shared"])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("swin", "matrix"), ("vit", "matrix"), ("vit", "matrixv2"), ("vit", "addition")],
)
def test_formulas_count_what_the_compiler_counts(kind: str, mode: Any, reads: Any) -> None:
    lora = TaskLoRAConfig(32, 16, mode=mode, merging="adapted", reference_quirks=reads)
    swin: dict[str, Any] = {"width": 64, "depths": (2, 1), "heads": (2, 4), "patch": 4, "window": 4}
    vit: dict[str, Any] = {"width": 64, "depth": 2, "heads": 2, "patch": 8}
    made = {"swin": (MTLoRAConfig, swin), "vit": (MTLoRAViTConfig, vit)}[kind]
    # Of convolutions the compiler leaves out what meets padding: heads are to count little.
    config = made[0](**made[1], head_channels=32 if kind == "swin" else 1, lora=lora)
    parts = module.abstract(lambda: config.build(TASKS, (32, 32), nnx.Rngs(0)))

    def run(params, stats, x):
        return module.merge(parts.definition, params, stats)(x).predictions

    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    cost = jax.jit(run).lower(parts.params, parts.stats, x).cost_analysis()
    flops = (cost if isinstance(cost, dict) else cost[0])["flops"]
    counted = 2 * config.macs((32, 32), TASKS).total
    assert counted < flops < 1.1 * counted


def test_published_sizes() -> None:
    """Swin-T with five tasks: the LoRAs alone, without norms and decoders.

    Shared ranks 64 in every block but where nobody reads them, own ranks 4 in the last block of
    each stage.
    """
    config, tasks = MTLoRAConfig(), {"a": 21, "b": 7, "c": 1, "d": 3, "e": 1}
    parts = module.abstract(lambda: config.build(tasks, (448, 448), nnx.Rngs(0)))
    flat = {path: leaf.size for path, leaf in module.flatten(parts.params).items()}
    widths = [96, 192, 384, 768]
    shared = sum(n * 64 * (16 * d) for d, n in zip(widths, (2, 2, 6, 2), strict=True))
    shared -= 64 * (2 * 768 + 2 * 5 * 768)  # proj, fc1 and fc2 of the last block of all
    own = sum(5 * 4 * (2 * d + 2 * 5 * d) for d in widths)
    assert sum(n for path, n in flat.items() if "/shared/" in path) == shared
    assert sum(n for path, n in flat.items() if "/own/" in path) == own
