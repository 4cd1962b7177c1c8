"""Adapters and their mixtures against the published code, number by number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.nn import module
from moezoo.nn.adapter_mixtures import (
    BiasedRouter,
    DenseAdapters,
    ExpertAxisRouter,
    SoftAdapters,
    UnitSoftAdapters,
)
from moezoo.nn.adapters import (
    Bottleneck,
    NormlessConformer,
    UnusedConvpass,
    bottleneck_experts,
    double_quick_gelu,
)
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import gelu, tanh_gelu
from moezoo.nn.soft import SoftRouter
from moezoo.ops import weight_mixtures
from moezoo.ops.expert import dense
from moezoo.ops.soft import similarity
from tests.fixtures import load, names, under
from tests.parity.soft_moa import (
    BOTTLENECK,
    CLOSE,
    CONFORMER,
    CONVPASS,
    MIXTURE,
    check_gradients,
    holding,
    ours,
    run,
)

RNGS: dict[str, Any] = {"rngs": nnx.Rngs(0)}
SOFT = names("soft_moa", "soft_moa_", ["soft_moa_n3_p2", "soft_moa_n7_p1", "soft_moa_norm"])
CONFORMERS = names("soft_moa", "adapter_conformer", ["adapter_conformer_k7"])


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, **CLOSE)


def rate_of(z: dict[str, np.ndarray]) -> tuple[int, int]:
    """Width, and hidden units at the file's reduction rate."""
    width = z["x"].shape[-1]
    return width, round(width / int(z["reduction_rate"]))


def test_bottleneck() -> None:
    z = load("soft_moa", "adapter_bottleneck")
    parts = holding(Bottleneck(*rate_of(z), **RNGS), ours(under(z, "w:"), BOTTLENECK))
    y, _, _, grads, gx = run(parts, z["x"], z["cot"])
    close(y, z["y"])
    close(gx, z["gx"])
    check_gradients(grads, ours(under(z, "g:"), BOTTLENECK))


def test_convpass() -> None:
    z = load("soft_moa", "adapter_convpass")
    parts = holding(UnusedConvpass(*rate_of(z), **RNGS), ours(under(z, "w:"), CONVPASS))
    y, _, _, grads, gx = run(parts, z["x"], z["cot"])
    close(y, z["y"])
    close(gx, z["gx"])
    check_gradients(grads, ours(under(z, "g:"), CONVPASS))


@pytest.mark.parametrize("name", CONFORMERS)
def test_conformer(name: str) -> None:
    z = load("soft_moa", name)
    made = NormlessConformer(*rate_of(z), kernel=int(z["kernel_size"]), **RNGS)
    weights = ours(under(z, "w:"), CONFORMER, skip=("num_batches_tracked",))
    parts = holding(made, weights)
    y, _, _, grads, gx = run(parts, z["x"], z["cot"])
    close(y, z["y_eval"])
    close(gx, z["gx_eval"])
    check_gradients(grads, ours(under(z, "g:"), CONFORMER))
    y, _, stats, grads, gx = run(parts, z["x"], z["cot"], train=True)
    close(y, z["y_train"])
    close(gx, z["gx_train"])
    check_gradients(grads, ours(under(z, "gt:"), CONFORMER))
    close(stats["batch_norm"]["mean"], z["running_mean_after"])
    close(stats["batch_norm"]["var"], z["running_var_after"])


@pytest.mark.parametrize("name", SOFT)
def test_soft_moa(name: str) -> None:
    z = load("soft_moa", name)
    width, hidden = rate_of(z)
    shape = (width, int(z["n"]), int(z["p"]))
    convpass = "w:moa.0.adapter_down.weight" in z
    options: dict[str, Any] = {"activation": double_quick_gelu if convpass else gelu, **RNGS}
    experts = bottleneck_experts(shape[1], width, hidden, **options)
    # A scale that is not used has neither a gradient nor a place here.
    skip = ("adapter_conv",) if bool(z["normalize"]) else ("adapter_conv", "scale")
    made = SoftAdapters(SoftRouter(*shape, scale=None, **RNGS), experts)
    if bool(z["normalize"]):
        made = UnitSoftAdapters(ExpertAxisRouter(*shape, **RNGS), experts)
    parts = holding(made, ours(under(z, "w:"), MIXTURE, skip))
    y, record, _, grads, gx = run(parts, z["x"], z["cot"])
    mixing = record.mixing
    close(mixing.logits_BTES, z["logits"])
    close(mixing.dispatch_BTES, z["D"])
    close(mixing.combine_BTES, z["C"])
    close(y, z["y"])
    close(gx, z["gx"])
    check_gradients(grads, ours(under(z, "g:"), MIXTURE, skip))
    shares = np.asarray(z["C"]).sum(-1).reshape(-1, shape[1])
    close(record.routing.weights_NK, shares)
    seen = z["x"]
    if bool(z["normalize"]):
        seen = seen / (np.linalg.norm(seen, axis=-1, keepdims=True) + 1e-6)
    slots_BESD = np.einsum("btes,btd->besd", mixing.dispatch_BTES, seen)
    close(slots_BESD, z["X_tilde"])
    own = module.merge(*parts)
    each = jax.vmap(lambda p, x: own.experts.fn(p, x, dense), (0, 1), 1)
    close(each(own.experts.stacked(), jnp.asarray(slots_BESD)), z["Y_tilde"])


def test_dense_moa() -> None:
    z = load("soft_moa", "dense_moa")
    width, hidden = rate_of(z)
    experts = bottleneck_experts(int(z["n"]), width, hidden, **RNGS)
    made = DenseAdapters(BiasedRouter(width, int(z["n"]), **RNGS), experts)
    parts = holding(made, ours(under(z, "w:"), MIXTURE))
    y, record, _, grads, gx = run(parts, z["x"], z["cot"])
    close(record.routing.probs_NE, z["probs"].reshape(-1, z["probs"].shape[-1]))
    close(y, z["y"])
    close(gx, z["gx"])
    check_gradients(grads, ours(under(z, "g:"), MIXTURE))
    # Each expert by itself, which the mixture never forms: with gates of one for it alone.
    own = module.merge(*parts)
    x_ND, params = jnp.asarray(z["x"]).reshape(-1, width), own.experts.stacked()
    for e in range(int(z["n"])):
        gates_NE = jnp.zeros((x_ND.shape[0], int(z["n"]))).at[:, e].set(1.0)
        alone = weight_mixtures.mixed(params, x_ND, gates_NE, gelu)
        close(alone.reshape(z["x"].shape), z["expert_out"][..., e])


def test_soft_moe_of_vmoe() -> None:
    z = load("soft_moa", "vmoe_soft_moe")
    width, n, p = z["w:Router.mu"].shape
    assert (n, p) == (int(z["n"]), int(z["p"]))
    hidden = z["w:Mlp.Dense_0.bias"].shape[1]
    experts = MLPExperts(n, width, hidden, activation=tanh_gelu, **RNGS)

    def renamed(prefix: str) -> dict[str, np.ndarray]:
        given = {
            "router/kernel": z[f"{prefix}Router.mu"],
            "router/scale": z[f"{prefix}Router.scale"],
        }
        for i in (0, 1):
            for part in ("kernel", "bias"):
                given[f"experts/fc{i + 1}/{part}"] = z[f"{prefix}Mlp.Dense_{i}.{part}"]
        return given

    parts = holding(SoftAdapters(SoftRouter(width, n, p, **RNGS), experts), renamed("w:"))
    y, record, _, grads, gx = run(parts, z["x"], z["cot"])
    mixing = record.mixing
    for found, wanted in zip(mixing, (z["D"], z["C"], z["logits"]), strict=False):
        close(found, wanted)
    close(np.einsum("btes,btd->besd", mixing.dispatch_BTES, z["x"]), z["X_tilde"])
    close(y, z["y"])
    np.testing.assert_allclose(y, z["y_bf16_dispatcher"], rtol=2e-2, atol=1e-2)
    close(gx, z["gx"])
    check_gradients(grads, renamed("g:"))
    combine = np.asarray(mixing.combine_BTES).reshape(*z["x"].shape[:2], n * p)
    dispatch = np.asarray(mixing.dispatch_BTES).reshape(*z["x"].shape[:2], n * p).swapaxes(1, 2)
    for name, weights in (("combine", combine), ("dispatch", dispatch)):
        close(weights.min(2).mean(), z[f"metric:{name}_weights_min_mean"])
        close(weights.max(2).mean(), z[f"metric:{name}_weights_max_mean"])
        alike = similarity(jnp.asarray(weights))
        for field, kind in (("least", "min"), ("mean", "mean")):
            close(getattr(alike, field), z[f"metric:{name}_weights_similarity_{kind}"])
    assert float(z["metric:auxiliary_loss"]) == 0.0
