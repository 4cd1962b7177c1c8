"""Blocks and whole models with adapters against the published code, number by number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.ast import SPECIAL, ASTBlock, ASTConfig, special_token
from moezoo.models.soft_moa.model import DoubleAdditionBlock, SoftMoAConfig, dense, reverse, soft
from moezoo.nn import module
from moezoo.nn.adapters import Bottleneck, NormlessConformer
from moezoo.nn.attention import SplitAttention
from moezoo.nn.context import Context, LayerOutput
from moezoo.nn.injection import ARRANGEMENTS, Inserted, inject
from moezoo.nn.lowrank import LowRank
from moezoo.nn.lowrank import lora as make_lora
from moezoo.weights.ast import AST_NAMES
from moezoo.weights.names import NameTable, ParameterName, linear, to_ours
from tests.fixtures import load, names, under
from tests.models.tiny import quick_jit
from tests.parity.soft_moa import (
    BOTTLENECK,
    CLOSE,
    CONFORMER,
    EXPERT,
    LAYER,
    MIXTURE,
    ROUTER,
    check_gradients,
    holding,
    ours,
    run,
    sizes,
    stacked,
)

SITES = {"MHSA": "attn", "FFN": "mlp"}
MODELS = names("soft_moa", "model_soft", ["model_soft_samelen", "model_soft_shorter"])


class Alone(ASTBlock):
    """A block as a module by itself."""

    wants_context = True

    def __call__(self, x_BTD: jax.Array, context: Context) -> Any:
        return LayerOutput(super().__call__(x_BTD, context))


class AloneTwice(DoubleAdditionBlock):
    """The same with its adapter's output added twice."""

    wants_context = True

    def __call__(self, x_BTD: jax.Array, context: Context) -> Any:
        return LayerOutput(super().__call__(x_BTD, context))


def close(found: Any, wanted: Any, message: str = "") -> None:
    np.testing.assert_allclose(found, wanted, err_msg=message, **CLOSE)


def block_with(
    z: dict[str, np.ndarray],
    kind: type[ASTBlock],
    inserted: dict[str, tuple[nnx.Module, dict[str, np.ndarray]]],
    how: str,
) -> module.ModuleParts:
    """A block with the file's weights and adapters, {"attn": (adapter, its weights)}."""
    base = ours(under(z, "base:"), LAYER)
    block = kind(sizes(z, base), rngs=nnx.Rngs(0))
    weights = dict(base)
    for site, (adapter, own) in inserted.items():
        setattr(block, site, Inserted(getattr(block, site), adapter, ARRANGEMENTS[how]))
        for path in [p for p in base if p.startswith(f"{site}/")]:
            weights[path.replace(f"{site}/", f"{site}/base/", 1)] = weights.pop(path)
        weights |= {f"{site}/adapter/{path}": array for path, array in own.items()}
    return holding(block, weights)


def mixture_of(z: dict[str, np.ndarray], kind: str, number: int) -> tuple[nnx.Module, dict]:
    """The file's soft or dense mixture number 1 or 2."""
    own = {n.replace("moa_moa.", "moa."): a for n, a in under(z, f"{kind}{number}:").items()}
    width = z["x"].shape[-1]
    config = SoftMoAConfig(
        ast=ASTConfig(width=width, heads=int(z["heads"])),
        experts=int(z["n"]),
        slots=int(z["p"]),
        bottleneck=round(width / int(z["reduction_rate"])),
    )
    made = {"soft": soft, "dense": dense}[kind](config, 1, nnx.Rngs(0))
    return made, ours(own, MIXTURE)


def gradients(z: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The file's gradients of a block with mixtures by our paths."""
    found: dict[str, np.ndarray] = {}
    given = under(z, prefix)
    norms = {n: a for n, a in given.items() if n.startswith("layernorm")}
    found |= ours(norms, LAYER)
    both = any(n.startswith(("moa_mhsa", "moa_ffn")) for n in given)
    for site, mark in (("attn", "_mhsa"), ("mlp", "_ffn")):
        if both:
            own = {n.replace(mark, "", 1): a for n, a in given.items() if mark in n.split(".")[0]}
        else:
            own = {n: a for n, a in given.items() if not n.startswith("layernorm")}
        own = {n.removeprefix("moa.") if n != "moa" else n: a for n, a in own.items()}
        own = {n.replace("moa.moa.", "moa."): a for n, a in own.items()}
        found |= {f"{site}/adapter/{p}": a for p, a in ours(own, MIXTURE).items()}
    return found


def test_plain_block() -> None:
    z = load("soft_moa", "blocks_moa")
    y, _, _, _, gx = run(block_with(z, Alone, {}, "parallel"), z["x"], z["cot"])
    close(y, z["plain_y"])
    close(gx, z["plain_gx"])


@pytest.mark.parametrize("kind", ["soft", "dense"])
@pytest.mark.parametrize("place", ["mhsa", "mhsa once", "ffn", "houlsby"])
def test_blocks_with_mixtures(kind: str, place: str) -> None:
    z = load("soft_moa", "blocks_moa")
    sites = {"mhsa": ["attn"], "ffn": ["mlp"]}.get(place.split()[0], ["attn", "mlp"])
    inserted = {site: mixture_of(z, kind, i) for i, site in enumerate(sites, 1)}
    block = AloneTwice if place == "mhsa" else Alone
    suffix, mark = ("_single", "gs:") if place == "mhsa once" else ("", "g:")
    case = f"{kind}|{place.split()[0]}/"
    y, _, _, grads, gx = run(block_with(z, block, inserted, "parallel"), z["x"], z["cot"])
    close(y, z[f"{case}y{suffix}"])
    close(gx, z[f"{case}gx{suffix}"])
    wanted = gradients(z, case + mark)
    assert {p for p in grads if "/adapter/" in p or p.startswith("norm")} <= set(wanted)
    for path in grads.keys() & wanted.keys():
        close(grads[path], wanted[path], path)


def adapter_of(z: dict[str, np.ndarray], kind: str, site: str) -> tuple[nnx.Module, dict]:
    """The file's single adapter of a sub-layer."""
    width = z["x"].shape[-1]
    shape, rngs = (width, round(width / int(z["reduction_rate"]))), nnx.Rngs(0)
    given = under(z, f"{kind}_{site}:")
    if kind == "bottleneck":
        return Bottleneck(*shape, rngs=rngs), ours(given, BOTTLENECK)
    made = NormlessConformer(*shape, kernel=int(z["kernel_size"]), rngs=rngs)
    return made, ours(given, CONFORMER, skip=("num_batches_tracked",))


@pytest.mark.parametrize("kind", ["bottleneck", "conformer"])
@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_blocks_with_adapters(kind: str, how: str) -> None:
    z = load("soft_moa", "blocks_adapter")
    for sites in (["FFN"], ["MHSA", "FFN"]):
        for residual, mark in (("", "nores"), ("_residual", "res")):
            inserted = {SITES[site]: adapter_of(z, kind, site) for site in sites}
            parts = block_with(z, Alone, inserted, how + residual)
            y, _, _, _, gx = run(parts, z["x"], z["cot"])
            case = f"{'Houlsby' if len(sites) > 1 else 'Pfeiffer'}|{how}|{mark}|{kind}/"
            close(y, z[f"{case}y"], case)
            close(gx, z[f"{case}gx"], case)


ABLATION = {
    "parallel|before": "parallel",
    "parallel|after": "sequential_residual",
    "sequential|before": "before",
    "sequential|after": "sequential_residual",
}


@pytest.mark.parametrize("case", ABLATION)
def test_every_position_of_an_adapter(case: str) -> None:
    z = load("soft_moa", "blocks_adapter")
    for site in SITES:
        adapter = adapter_of(z, "bottleneck", "FFN")
        parts = block_with(z, Alone, {SITES[site]: adapter}, ABLATION[case])
        y, _, _, _, gx = run(parts, z["x"], z["cot"])
        close(y, z[f"ablation|{site}|{case}/y"], site)
        close(gx, z[f"ablation|{site}|{case}/gx"], site)


class Mixed(SplitAttention):
    """Attention before its last linear layer."""

    def __call__(self, x_BTD: jax.Array, context: Context) -> LayerOutput:
        return LayerOutput(self.mixed(x_BTD, context))


def test_lora_on_attention() -> None:
    z = load("soft_moa", "lora_selfattn")
    width = z["x"].shape[-1]
    ranks = z["w:lora_down_q.weight"].shape[0]
    scale = int(z["alpha"]) / int(z["reduction_rate"])
    made = Mixed(width, int(z["heads"]), rngs=nnx.Rngs(0))
    options = {"alpha": scale * ranks, "rngs": nnx.Rngs(0)}
    inject(made, ["q", "v"], lambda i, o: make_lora(i, o, ranks, **options))
    table: NameTable = [
        *linear("q/base", "query"),
        *linear("k", "key"),
        *linear("v/base", "value"),
        *(
            ParameterName(f"{n}/update/{part}", f"lora_{part}_{n}.weight", linear("", "")[0].layout)
            for n in "qv"
            for part in ("down", "up")
        ),
    ]
    weights = ours(under(z, "w:"), table)
    last = {"o/kernel": np.zeros((width, width)), "o/bias": np.zeros(width)}
    y, _, _, grads, gx = run(holding(made, weights | last), z["x"], z["cot"])
    close(y, z["y"])
    close(gx, z["gx"])
    check_gradients(grads, ours(under(z, "g:"), table))


def test_reversed_start_of_lora() -> None:
    update = make_lora(8, 6, 4, alpha=1.0, rngs=nnx.Rngs(0))
    reverse(update, jax.random.key(0))
    assert isinstance(update, LowRank)
    assert not update.down.get_value().any()
    up = np.asarray(update.up.get_value())
    assert 0 < abs(up).max() <= 4**-0.5  # PyTorch's uniform bound, 1 / sqrt(inputs)


MODEL: NameTable = [
    *(ParameterName(line.ours, f"model.{line.theirs}", line.layout) for line in AST_NAMES),
    *linear("heads/event", "classification_head"),
]


def model_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A whole model's weights or gradients by our paths."""
    found: dict[str, np.ndarray] = {}
    layers: dict[str, dict[str, np.ndarray]] = {}
    rest = {}
    for name, array in arrays.items():
        if ".moa." in name:
            layer, _, own = name.removeprefix("model.encoder.layer.").partition(".moa.")
            layers.setdefault(layer, {})[own] = array
        else:
            rest[name] = array
    for layer, own in layers.items():
        mixed = to_ours(stacked(own), [*ROUTER, *EXPERT])
        assert not mixed.unknown
        found |= {f"blocks/{layer}/mlp/adapter/{p}": a for p, a in mixed.arrays.items()}
    base = to_ours(rest, MODEL)
    assert not base.unknown
    for path, array in base.arrays.items():
        found[path.replace("/mlp/", "/mlp/base/")] = array
    return found


def model_of(z: dict[str, np.ndarray], frames: int) -> tuple[SoftMoAConfig, dict]:
    """The configuration of the file's model, made for so many frames, and its weights."""
    weights = model_arrays(under(z, "w:"))
    width, hidden = weights["blocks/0/mlp/base/fc1/kernel"].shape
    patch = weights["patch_embed/kernel"].shape[0]
    depth = len({p.split("/")[1] for p in weights if p.startswith("blocks/")})
    tokens = {"mel": z["x"].shape[2], "patch": patch, "frames": frames}
    config = SoftMoAConfig(
        ast=ASTConfig(width=width, hidden=hidden, heads=int(z["heads"]), depth=depth, **tokens),
        experts=int(z["n"]),
        slots=int(z["p"]),
        bottleneck=weights["blocks/0/mlp/adapter/experts/fc1/kernel"].shape[2],
        place="mlp",
        sharing="one",
        padding="seen",
        reference_quirks=("zero_positions",),
    )
    return config, weights


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    z = load("soft_moa", name)
    audio, other = jnp.asarray(z["x"]), bool(z.get("pos_is_zero", False))
    frames = audio.shape[1] + (20 if other else 0)  # another table: there are no positions at all
    config, weights = model_of(z, frames)
    parts = module.split(
        config.build({"event": z["cot"].shape[1]}, (frames, audio.shape[2]), nnx.Rngs(0))
    )
    if other:
        assert not weights["pos_embed"].any()
        weights["pos_embed"] = np.ones(parts.stats["pos_embed"].shape, np.float32)
    groups = [
        module.unflatten({p: jnp.asarray(weights.pop(p)) for p in module.flatten(tree)})
        for tree in (parts.params, parts.stats)
    ]
    assert not weights
    wanted = model_arrays({n: z[f"w:{n}"] for n in z["trainable"]})
    assert set(wanted) == set(module.flatten(groups[0]))

    def loss(params: Any, audio: jax.Array) -> tuple:
        model = module.merge(parts.definition, params, groups[1])
        output = model(audio)
        tokens = model.embed(audio)
        x_BTD = model.norm(model.encode(tokens, Context()))
        first = model.heads["event"](x_BTD[:, 0])
        logits = output.predictions["event"]
        return jnp.sum(logits * z["cot"]), (logits, first, tokens)

    grads, (logits, first, tokens) = quick_jit(jax.grad(loss, (0, 1), has_aux=True))(
        groups[0], audio
    )
    close(tokens, z["patch_tokens"])
    close(logits, z["logits_ALL"])
    close(first, z["logits_CLS"])
    close(grads[1], z["gx_ALL"])
    check_gradients(module.flatten(grads[0]), model_arrays(under(z, "g:")))
    assert tokens.shape[1] == config.ast.tokens(audio.shape[1]) >= SPECIAL
    assert special_token(tokens).shape == (audio.shape[0], tokens.shape[2])
