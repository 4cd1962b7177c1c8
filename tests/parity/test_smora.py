"""SMoRA's published layer, its kernels, baselines and training steps, number by number.

Its blocks repeat one score over the ranks of a block, each with a bias of its own: the same as
single ranks whose router columns are repeated. Ours scores whole blocks, which is equal wherever
the biases of a block are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moezoo.nn import exploration, module
from moezoo.nn.injection import Adapted
from moezoo.nn.layers import Linear
from moezoo.nn.lowrank import LowRank, lora, mixture, rank_experts, unweighted_router
from moezoo.ops import lowrank
from moezoo.ops.balance import choice_counts, updated_bias
from moezoo.ops.routing import dense_weights
from tests.fixtures import load, names
from tests.models.tiny import quick_jit

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
GRADIENT = {"rtol": 1e-4, "atol": 5e-5}  # as the fixtures' own notes suggest
LAYERS = ("layer_r8_k3", "layer_r16_k1", "layer_r16_k4_bias", "layer_r24_k8_p4", "layer_r64_k8")
BASELINES = names("smora", "baselines", ["baselines"])
STEPS = ("train_steps_frozenbias", "train_steps_shipped")


class Sizes(NamedTuple):
    k: int
    block: int
    alpha: float
    rate: float


def sizes(arrays: dict[str, np.ndarray]) -> Sizes:
    rate = float(arrays["u"]) if "u" in arrays else 1e-5
    return Sizes(int(arrays["k"]), int(arrays["p"]), float(arrays["alpha"]), rate)


def holding(build: Callable[[], nnx.Module], flat: dict[str, Any]) -> module.ModuleParts:
    """The module's parts with these arrays, all of them, and nothing computed."""
    shapes = module.abstract(build)
    groups = []
    for group in (shapes.params, shapes.stats):
        names = module.flatten(group)
        for name, leaf in names.items():
            assert leaf.shape == flat[name].shape, name
        groups.append(module.unflatten({name: jnp.asarray(flat[name]) for name in names}))
    return module.ModuleParts(shapes.definition, *groups)


def adapted(
    arrays: dict[str, Any], make: Callable[[int, int], LowRank], **own: Any
) -> module.ModuleParts:
    """A base of `W0` and `b0` with an update that holds `own`, by path inside it."""
    outputs, inputs = arrays["W0"].shape

    def build() -> Adapted:
        return Adapted(Linear(inputs, outputs, rngs=nnx.Rngs(0)), make(inputs, outputs))

    flat = {"base/kernel": arrays["W0"].T, "base/bias": arrays["b0"]}
    flat |= {f"update/{name.replace('__', '/')}": value for name, value in own.items()}
    return holding(build, flat)


def smora(arrays: dict[str, Any], block: int, kernel_DE: Any, bias_E: Any) -> module.ModuleParts:
    k, _, alpha, rate = sizes(arrays)
    # The published gate of a single block is always 1; ours of that name is then refused.
    gate = "published" if k > block else "unweighted"

    def make(inputs: int, outputs: int) -> LowRank:
        return rank_experts(
            inputs, outputs, len(arrays["A"]),
            active=k, block=block, alpha=alpha, rate=rate, gate=gate, rngs=nnx.Rngs(0),
        )  # fmt: skip

    bank = {"down": arrays["A"].T, "up": arrays["B"].T}
    return adapted(arrays, make, **bank, router__kernel=kernel_DE, router__bias=bias_E)


def by_rank(arrays: dict[str, Any]) -> module.ModuleParts:
    """The layer with every rank an expert of its own."""
    block = int(arrays["p"])
    return smora(arrays, 1, np.repeat(arrays["R"].T, block, axis=1), arrays["bias"])


def by_block(arrays: dict[str, Any]) -> module.ModuleParts:
    """The layer with every block an expert, its bias that of its first rank."""
    block = int(arrays["p"])
    return smora(arrays, block, arrays["R"].T, arrays["bias"][::block])


def run(parts: module.ModuleParts, x: Any) -> Any:
    """What the layer gives for x."""

    def forward(params: Any, stats: Any, x: Any) -> Any:
        return module.merge(parts.definition, params, stats)(x)

    return quick_jit(forward)(parts.params, parts.stats, jnp.asarray(x))


def observed(parts: module.ModuleParts, counts: Any) -> Any:
    """The router's bias after it was told what was chosen."""
    layer = module.merge(*parts)
    layer.router.observe(counts)
    return layer.router.bias.get_value()


def one_step(arrays: dict[str, Any]) -> dict[str, float]:
    """A step of a bias is as small as `CLOSE`: here its sign must be seen."""
    return {"rtol": 0.0, "atol": 0.1 * sizes(arrays).rate}


@pytest.mark.parametrize("name", names("smora", "layer_", LAYERS))
def test_layer(name: str) -> None:
    arrays = load("smora", name)
    k, block, _, _ = sizes(arrays)
    parts, cot = by_rank(arrays), jnp.asarray(arrays["cot"])
    ranks = len(arrays["A"])

    def loss(params: Any, stats: Any, x: jax.Array) -> Any:
        y, record = module.merge(parts.definition, params, stats)(x)
        gates = k * dense_weights(record.routing, ranks)
        return jnp.sum(y * cot), (y, gates, choice_counts(record.routing))

    gradient = quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, told), grads = gradient(parts.params, parts.stats, jnp.asarray(arrays["x"]))
    y, gates, counts = told
    np.testing.assert_allclose(y, arrays["y_eval"], **CLOSE)
    np.testing.assert_allclose(y, arrays["y_train"], **CLOSE)
    gates = np.asarray(gates).reshape(arrays["gates"].shape)
    np.testing.assert_array_equal(gates > 0, arrays["gates"] > 0)
    np.testing.assert_allclose(gates, arrays["gates"], **CLOSE)
    np.testing.assert_array_equal(counts, arrays["counts"])
    np.testing.assert_allclose(observed(parts, counts), arrays["bias_after"], **one_step(arrays))
    update, d_bias = grads[0]["update"], grads[1]["update"]["router"]["bias"]
    router = np.asarray(update["router"]["kernel"])
    d_router_DE = router.reshape(router.shape[0], -1, block).sum(-1)
    found = {"x": grads[2], "A": update["down"].T, "B": update["up"].T, "R": d_router_DE.T}
    for part, value in (found | {"bias": d_bias}).items():
        np.testing.assert_allclose(value, arrays[f"g{part}"], **GRADIENT)
    if k == 1:
        assert np.abs(router).max() < 1e-6, "a weight that is always 1 trains no router"


@pytest.mark.parametrize("name", names("smora", "layer_", LAYERS))
def test_layer_of_blocks(name: str) -> None:
    arrays = load("smora", name)
    block = int(arrays["p"])
    ranks = len(arrays["A"])
    # The published trajectory never breaks a block; only another bias inside one would.
    arrays = {**arrays, "bias": np.repeat(arrays["bias"][::block], block)}
    ours, theirs = (run(make(arrays), arrays["x"]) for make in (by_block, by_rank))
    np.testing.assert_allclose(ours[0], theirs[0], **CLOSE)
    wide = np.repeat(np.asarray(dense_weights(ours[1].routing, ranks // block)), block, axis=1)
    np.testing.assert_allclose(wide / block, dense_weights(theirs[1].routing, ranks), **CLOSE)


@pytest.mark.parametrize("name", names("smora", "dropout_train", ["dropout_train"]))
def test_dropout(name: str) -> None:
    arrays = load("smora", name)
    added, record = run(by_rank(arrays | {"b0": 0 * arrays["b0"]}), arrays["x_dropped"])
    kept = arrays["x"] / (1.0 - float(arrays["dropout"]))
    np.testing.assert_allclose(
        np.where(arrays["x_dropped"] != 0, kept, 0.0), arrays["x_dropped"], **CLOSE
    )
    # The frozen path sees what was not dropped.
    seen = arrays["x"] - arrays["x_dropped"]
    y = added + seen @ arrays["W0"].T + arrays["b0"]
    np.testing.assert_allclose(y, arrays["y_train"], **CLOSE)
    counts = choice_counts(record.routing)
    after = observed(by_rank(arrays), counts)
    np.testing.assert_allclose(after, arrays["bias_after"], **one_step(arrays))


@pytest.mark.parametrize("name", names("smora", "bias_trajectory", ["bias_trajectory"]))
def test_bias_trajectory(name: str) -> None:
    arrays = load("smora", name)
    parts = by_rank(arrays)

    @quick_jit
    def step(stats: Any, x: jax.Array) -> Any:
        layer = module.merge(parts.definition, parts.params, stats)
        counts = choice_counts(layer(x)[1].routing)
        layer.router.observe(counts)
        return module.updated_stats(layer), counts

    stats, biases = parts.stats, [arrays["bias"]]
    for x, counts in zip(arrays["xs"], arrays["counts"], strict=True):
        stats, found = step(stats, jnp.asarray(x))
        np.testing.assert_array_equal(found, counts)
        biases.append(stats["update"]["router"]["bias"])
    np.testing.assert_allclose(np.stack(biases), arrays["bias_traj"], **CLOSE)


def plain(arrays: dict[str, Any], ranks: int, down_RI: Any, up_OR: Any) -> module.ModuleParts:
    def make(inputs: int, outputs: int) -> LowRank:
        return lora(inputs, outputs, ranks, alpha=float(arrays["alpha"]), rngs=nnx.Rngs(0))

    return adapted(arrays, make, down=down_RI.T, up=up_OR.T)


@pytest.mark.parametrize("name", names("smora", "equiv_plain_lora", ["equiv_plain_lora"]))
def test_all_ranks_with_equal_gates_are_plain_lora(name: str) -> None:
    arrays = load("smora", name)
    y, _ = run(plain(arrays, len(arrays["A"]), arrays["A"], arrays["B"]), arrays["x"])
    gated, _ = run(by_rank(arrays), arrays["x"])
    np.testing.assert_allclose(y, arrays["y_lora"], **CLOSE)
    np.testing.assert_allclose(gated, arrays["y_srmole"], **CLOSE)
    np.testing.assert_allclose(gated, y, **CLOSE)


def mixture_of(
    arrays: dict[str, Any], name: str, k: int, alpha: float, **how: Any
) -> module.ModuleParts:
    a_EDr, b_ErO = arrays[f"{name}_A"], arrays[f"{name}_B"]
    experts, _, rank = a_EDr.shape

    def make(inputs: int, outputs: int) -> LowRank:
        made = {"experts": experts, "k": k, "alpha": alpha, "rngs": nnx.Rngs(0)}
        return mixture(inputs, outputs, experts * rank, **made, **how)

    down, up = lowrank.stacked(a_EDr, b_ErO)
    return adapted(arrays, make, down=down, up=up, router__kernel=arrays[f"{name}_R"].T)


@pytest.mark.parametrize("name", names("smora", "equiv_moelora_top2", ["equiv_moelora_top2"]))
def test_blocks_are_a_mixture_of_loras(name: str) -> None:
    arrays = load("smora", name)
    k, block = int(arrays["k"]), int(arrays["p"])
    alpha = float(arrays["alpha_srmole"])
    assert alpha == float(arrays["alpha_moelora"])
    arrays["alpha"] = arrays["alpha_srmole"]
    for make in (by_rank, by_block):
        np.testing.assert_allclose(run(make(arrays), arrays["x"])[0], arrays["y_srmole"], **CLOSE)
    y, _ = run(mixture_of(arrays, "moe", k // block, alpha), arrays["x"])
    np.testing.assert_allclose(y, arrays["y_moelora"], **CLOSE)


@pytest.mark.parametrize("name", names("smora", "indexed_matmul", ["indexed_matmul"]))
def test_indexed_products(name: str) -> None:
    arrays = load("smora", name)
    chosen = jnp.asarray(arrays["M"])

    def down(x: Any, a: Any) -> Any:
        y = lowrank.chosen_columns(x, a.T, chosen)
        return jnp.sum(y * arrays["cot_Y"]), y

    def up(z: Any, b: Any) -> Any:
        o = lowrank.chosen_rows(z, b.T, chosen)
        return jnp.sum(o * arrays["cot_O"]), o

    for run, first, second, out in ((down, "X", "A", "Y"), (up, "Z", "B", "O")):
        both = jnp.asarray(arrays[first]), jnp.asarray(arrays[second])
        (_, found), grads = quick_jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(*both)
        np.testing.assert_allclose(found, arrays[out], **CLOSE)
        for gradient, name in zip(grads, (first, second), strict=True):
            np.testing.assert_allclose(gradient, arrays[f"g{name}"], **GRADIENT)


@pytest.mark.parametrize("name", ["top1", "top2", "soft", "smear"])
@pytest.mark.parametrize("file", BASELINES)
def test_baseline_mixtures(file: str, name: str) -> None:
    arrays = load("smora", file)
    experts, rank = int(arrays["E"]), int(arrays["r"])
    k = {"top1": 1, "top2": 2}.get(name, experts)
    how: dict[str, Any] = {"combine": lowrank.by_factor} if name == "smear" else {}
    if name == "top1":  # as the published code evaluates it
        how = {"make_router": unweighted_router}
    parts = mixture_of(arrays, f"moe_{name}", k, float(arrays["alpha"]), **how)

    def loss(params: Any) -> Any:
        y, _ = module.merge(parts.definition, params, parts.stats)(jnp.asarray(arrays["x"]))
        return jnp.sum(y * arrays["cot"]), y

    (_, y), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(parts.params)
    np.testing.assert_allclose(y, arrays[f"moe_{name}_y"], **CLOSE)
    update = grads["update"]
    found = (
        *lowrank.unstacked(update["down"], update["up"], experts),
        update["router"]["kernel"].T,
    )
    assert found[0].shape[-1] == rank
    for gradient, part in zip(found, "ABR", strict=True):
        np.testing.assert_allclose(gradient, arrays[f"moe_{name}_g{part}"], **GRADIENT)


@pytest.mark.parametrize("file", BASELINES)
def test_baseline_with_one_down_projection(file: str) -> None:
    arrays = load("smora", file)
    x = jnp.asarray(arrays["x"]).reshape(-1, arrays["x"].shape[-1])
    scale = float(arrays["alpha"]) / int(arrays["r"])

    def run(a: Any, b: Any, r: Any) -> Any:
        gates_NE = jax.nn.softmax(x @ r.T)
        stacked = b.reshape(-1, b.shape[-1])
        added = scale * lowrank.one_down(x, a, stacked, gates_NE)
        y = x @ arrays["W0"].T + arrays["b0"] + added
        return jnp.sum(y * arrays["cot"].reshape(y.shape)), y

    given = tuple(jnp.asarray(arrays[f"hydra_{part}"]) for part in "ABR")
    (_, y), grads = quick_jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(*given)
    np.testing.assert_allclose(y.reshape(arrays["hydra_y"].shape), arrays["hydra_y"], **CLOSE)
    for gradient, part in zip(grads, "ABR", strict=True):
        np.testing.assert_allclose(gradient, arrays[f"hydra_g{part}"], **GRADIENT)


@pytest.mark.parametrize("file", BASELINES)
def test_baseline_of_mixed_subspaces_and_plain_lora(file: str) -> None:
    arrays = load("smora", file)
    down = {"mos": arrays["mos_M"] @ arrays["mos_A"], "lora": arrays["lora_A"]}  # B (M A) x
    for name, a_RI in down.items():
        parts = plain(arrays, int(arrays["r"]), a_RI, arrays[f"{name}_B"])
        np.testing.assert_allclose(run(parts, arrays["x"])[0], arrays[f"{name}_y"], **CLOSE)


@pytest.mark.parametrize("name", names("smora", "train_steps_", STEPS))
def test_training_steps(name: str) -> None:
    arrays = load("smora", name)
    shipped = "shipped" in name  # there AdamW moves the bias as well
    both = {f"l{i}": by_rank(two_layers(arrays, i)) for i in (1, 2)}
    frozen = {n: parts.params["base"] for n, parts in both.items()}
    params = {n: parts.params["update"] for n, parts in both.items()}
    stats, optimiser = (
        {n: parts.stats for n, parts in both.items()},
        optax.adamw(float(arrays["lr"]), weight_decay=0.0),
    )

    def net(params: Any, stats: Any) -> Any:
        made = {
            n: module.merge(parts.definition, {"base": frozen[n], "update": params[n]}, stats[n])
            for n, parts in both.items()
        }
        return nnx.Dict(made)

    def loss(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> Any:
        layers = net(params, stats)
        hidden, first = layers["l1"](x)
        out, second = layers["l2"](jnp.tanh(hidden))
        choices = exploration.choices(layers, {"l1": first, "l2": second})
        exploration.observe(layers, choices)
        moved = {n: module.updated_stats(layer) for n, layer in layers.items()}
        return jnp.mean(jnp.square(out - y)), moved

    gradient = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    trained = (params, stats) if shipped else (params,)
    moments = optimiser.init(trained)
    for x, y, wanted in zip(arrays["xs"], arrays["ys"], arrays["losses"], strict=True):
        (value, stats), grads = gradient(params, stats, x, y)
        np.testing.assert_allclose(value, wanted, **CLOSE)
        trained = (params, stats) if shipped else (params,)
        updates, moments = optimiser.update(grads[: len(trained)], moments, trained)
        params, *rest = optax.apply_updates(trained, updates)  # type: ignore[misc]
        stats = rest[0] if rest else stats
    for layer in ("l1", "l2"):
        last = params[layer]
        found = {"A": last["down"].T, "B": last["up"].T, "R": last["router"]["kernel"].T}
        found["bias"] = stats[layer]["update"]["router"]["bias"]
        for part, value in found.items():
            np.testing.assert_allclose(value, arrays[f"{layer}_{part}_final"], **GRADIENT)


def two_layers(arrays: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
    """The arrays of one of the two layers under the names of a single one."""
    prefix = f"l{index}_"
    own = {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
    common = {
        "k": arrays[f"k{index}"],
        "p": np.array(1),
        "alpha": arrays["alpha"],
        "u": arrays["u"],
    }
    return own | common


def test_sign_rule_is_the_one_of_the_core() -> None:
    counts = jnp.asarray([3, 1, 2, 2])
    np.testing.assert_allclose(updated_bias(jnp.zeros(4), counts, 0.5), [-0.5, 0.5, 0, 0])
