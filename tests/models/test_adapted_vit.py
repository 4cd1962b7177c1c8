"""DyT and MoSA: they begin as their base, what they train, what is left at inference, costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.deploy.specialise import specialise
from moezoo.models.dyt.model import DyTConfig
from moezoo.models.mosa.model import MoSAConfig
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.nn import module
from moezoo.nn.upcycle import carry_over
from tests.models.tiny import TASKS, call, image, parts_of

SIZES: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2, "patch": 4, "head_channels": 4}
DYT, MOSA = DyTConfig(**SIZES, bottleneck=3), MoSAConfig(**SIZES, bottleneck=3)
SIZE = (8, 16)
KEY = jax.random.key(3)


def all_kept(params: dict) -> dict:
    """The same with dispatchers that keep every token."""
    flat = module.flatten(params)
    changed = {
        path: jnp.full_like(leaf, 50.0) if path.endswith("bias") else 0 * leaf
        for path, leaf in flat.items()
        if path.startswith("dispatch/")
    }
    return module.unflatten(flat | changed)


@pytest.mark.parametrize("config", [DYT, MOSA], ids=["dyt", "mosa"])
def test_begins_as_its_base_and_only_adapters_and_heads_train(config: Any) -> None:
    base = parts_of(ViTDenseConfig(**SIZES), TASKS, SIZE)
    fresh = module.split(config.build(TASKS, SIZE, nnx.Rngs(0)))
    learned = module.flatten(base.params) | module.flatten(base.stats)
    params, stats = (carry_over(learned, tree) for tree in (fresh.params, fresh.stats))
    assert not set(params.unused) & set(stats.unused)
    parts = module.ModuleParts(fresh.definition, all_kept(params.params), stats.params)
    for task, y in call(base, image(SIZE)).predictions.items():
        found = call(parts, image(SIZE)).predictions[task]
        np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)
    trained = {path.partition("/")[0] for path in module.flatten(fresh.params)}
    assert trained <= {"heads", "adapters", "dispatch"}


def test_gathered_tokens_are_the_masked_ones_where_there_is_room() -> None:
    masked = parts_of(DYT, TASKS, SIZE)
    output = call(masked, image(SIZE))
    kept = [int(r.routing.experts_NK.reshape(8, -1).sum(1).max()) for r in output.records.values()]
    assert 1 < max(kept) < 9  # some tokens are skipped, and not all
    room = (max(kept) - 0.5) / 9
    gathered = parts_of(replace(DYT, inference="gathered", room=room), TASKS, SIZE)
    for task, y in call(gathered, image(SIZE)).predictions.items():
        np.testing.assert_allclose(y, output.predictions[task], rtol=1e-4, atol=1e-5)
    less = parts_of(replace(DYT, inference="gathered", room=0.2), TASKS, SIZE)
    y = call(less, image(SIZE)).predictions["depth"]
    assert np.abs(y - output.predictions["depth"]).max() > 1e-3


def test_the_complete_network_teaches_and_the_budget_counts_patches() -> None:
    parts = parts_of(DYT, TASKS, SIZE)
    found = call(parts, image(SIZE), key=KEY, train=True)
    assert set(found.losses) == {"budget"} and set(found.compared) == set(TASKS)
    for task, (own, whole) in found.compared.items():
        np.testing.assert_array_equal(own, found.predictions[task])
        np.testing.assert_array_equal(whole, found.auxiliary[task][0])
        assert np.abs(own - whole).max() > 1e-3
    kept = np.stack([r.routing.experts_NK.reshape(8, 9) for r in found.records.values()])
    patches = kept[..., 1:].mean(-1)  # without the class token
    wanted = 2 * ((patches.mean() - 0.5) ** 2 + np.maximum(0.1 - patches, 0).sum())
    np.testing.assert_allclose(found.losses["budget"], wanted, rtol=1e-4)
    assert kept[..., 0].all()
    quiet = call(parts, image(SIZE))
    assert not quiet.losses and not quiet.compared


def test_several_adapters_of_a_block() -> None:
    parts = parts_of(replace(DYT, adapters=3), TASKS, SIZE)
    assert parts.params["adapters"]["0"]["mixture"]["experts"]["fc1"]["kernel"].shape == (3, 8, 3)
    assert np.isfinite(call(parts, image(SIZE)).predictions["depth"]).all()


@pytest.mark.parametrize("shared", ["down", "none"])
def test_a_path_of_sparse_adapters_is_dense_and_exact(shared: Any) -> None:
    parts = parts_of(replace(MOSA, shared=shared), TASKS, SIZE)
    both = call(parts, image(SIZE)).predictions
    own = specialise(module.merge(*parts), 1)
    assert {layer.kind for layer in own.mixtures.values()} == {"exact_fold"}
    left = module.split(own.model)
    names = module.flatten(left.params) | module.flatten(left.stats)
    assert not [name for name in names if "owner" in name]
    y = call(left, image(SIZE), tasks=("depth",)).predictions["depth"]
    np.testing.assert_allclose(y, both["depth"], rtol=1e-4, atol=1e-5)


def test_two_passes_with_other_experts_are_compared() -> None:
    parts = parts_of(MOSA, TASKS, SIZE)
    found = call(parts, image(SIZE), key=KEY, train=True)
    for task, (first, second) in found.compared.items():
        np.testing.assert_array_equal(first, found.predictions[task])
        assert np.abs(first - second).max() > 1e-3
    one = parts_of(replace(MOSA, consistency=0.0), TASKS, SIZE)
    assert not call(one, image(SIZE), key=KEY, train=True).compared


@pytest.mark.parametrize("config", [MoSAConfig, DyTConfig])
def test_formulas_count_what_the_compiler_counts(config: Any) -> None:
    """Without a share of skipped tokens, which no compiler sees."""
    sizes: dict[str, Any] = {"width": 64, "depth": 2, "heads": 2, "patch": 8, "head_channels": 1}
    whole: dict[str, Any] = {"keep": 1.0} if config is DyTConfig else {}
    made = config(**sizes, **whole)
    parts = module.abstract(lambda: made.build(TASKS, (32, 32), nnx.Rngs(0)))

    def run(params: Any, stats: Any, x: Any) -> Any:
        return module.merge(parts.definition, params, stats)(x).predictions

    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    cost = jax.jit(run).lower(parts.params, parts.stats, x).cost_analysis()
    flops = (cost if isinstance(cost, dict) else cost[0])["flops"]
    counted = 2 * made.macs((32, 32), TASKS).total
    assert counted < flops < 1.1 * counted


def test_fewer_tokens_cost_less() -> None:
    whole, half = (replace(DYT, keep=share).macs(SIZE, TASKS).total for share in (1.0, 0.5))
    assert whole - half == DYT.depth * 9 * DYT.width * DYT.mlp_hidden
    assert replace(DYT, inference="gathered", room=0.5).rows(SIZE) == 5
