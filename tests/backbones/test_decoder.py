"""Decoders against a slow float64 oracle: sizes, padding, packing, cache, adapters, gradients."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from moezoo.backbones.decoder import Decoder, DecoderConfig
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.context import Context, LayerOutput
from moezoo.nn.latent_attention import LatentConfig
from moezoo.nn.layers import Linear
from moezoo.nn.rope import RopeConfig
from tests.backbones import decoder_oracle as oracle

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
V, T = 19, 7
BASE = {"vocabulary": V, "width": 12, "depth": 2, "heads": 4, "groups": 2, "hidden": 10}
LLAMA3 = RopeConfig(theta=50.0, scaling="llama3", factor=4.0, original_length=16)
SIGMOIDS = "sigmoid_then_top_k_renormalised"
GROUPS: dict[str, Any] = {
    "choice": "score_plus_bias", "group_score": "two_best", "shared_weight": "one",
}  # fmt: skip
CONFIGS = {
    "llama": DecoderConfig(**BASE, head_width=4, rope=LLAMA3, tied_head=True),
    "qwen2": DecoderConfig(**BASE, head_width=6, qkv_bias=True),
    "qwen3": DecoderConfig(**(BASE | {"groups": 1}), head_width=8, qk_norm=True),
    "biases": DecoderConfig(
        **(BASE | {"depth": 1, "heads": 2, "groups": 2, "width": 8}),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        rope=RopeConfig(scaling="dynamic", factor=2.0, original_length=4),
    ),
    "olmoe": DecoderConfig(
        **BASE,
        qk_norm=True,
        qk_norm_over="width",
        experts=ExpertsConfig(5, 3, 7, "softmax_then_top_k"),
        head_width=4,
        layers="scanned",
    ),
    "qwen2_moe": DecoderConfig(
        **(BASE | {"depth": 4}),
        head_width=4,
        experts=ExpertsConfig(4, 2, 7, every=2, dense=(1,), shared=6),
    ),
    "glm4_moe": DecoderConfig(
        **(BASE | {"depth": 1}),
        head_width=8,
        rope=RopeConfig(theta=50.0, share=0.5),
        experts=ExpertsConfig(4, 2, 7, SIGMOIDS, shared=6, factor=1.7, **GROUPS),
    ),
    "deepseek_v3": DecoderConfig(
        **(BASE | {"groups": 4}),
        latent=LatentConfig(5, 6, 3, 4, 5, growth=1.2),
        rope=RopeConfig(theta=50.0, scaling="linear", factor=3.0),
        experts=ExpertsConfig(
            6, 2, 7, SIGMOIDS, groups=3, top_groups=2, dense=(0,), shared=6, factor=0.6, **GROUPS
        ),
    ),
    "deepseek_v2": DecoderConfig(
        **(BASE | {"groups": 4, "depth": 1}),
        qkv_bias=True,
        out_bias=True,
        latent=LatentConfig(5, 0, 3, 4, 5, neighbours=False),
        experts=ExpertsConfig(
            6, 2, 7, "softmax_then_top_k", groups=3, top_groups=1, shared=6, shared_weight="one"
        ),
    ),
}
TOKENS = np.random.default_rng(0).integers(0, V, (3, T)).astype(np.int32)
LEFT = np.arange(T) >= np.array([0, 2, 4])[:, None]
RIGHT = LEFT[:, ::-1]


# Jitted, a whole decoder compiles once per structure; op by op it compiles a hundred programs.
@partial(jax.jit, static_argnums=0)
def apply(definition, params, tokens, options):
    return module.merge(definition, params, {})(tokens, **options).logits_BTV


class Case(NamedTuple):
    config: DecoderConfig
    parts: module.ModuleParts

    def logits(self, **options) -> np.ndarray:
        return np.asarray(apply(self.parts.definition, self.parts.params, TOKENS, options))

    def oracle(self, row: int, real=None, segments=None) -> np.ndarray:
        flat = {k: np.asarray(v) for k, v in module.flatten(self.parts.params).items()}
        # T is the length of the batch's longest text in all tests.
        return oracle.logits(self.config, flat, TOKENS[row].tolist(), real, segments, longest=T)


def random_parts(config: DecoderConfig, seed: int = 1) -> module.ModuleParts:
    """Parameters so large that every part of the architecture shows in the logits."""
    shapes = module.abstract(lambda: config.build(nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.4 * rng.standard_normal(leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes.params)
    return module.ModuleParts(shapes.definition, params, shapes.stats)


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest) -> Case:
    config = CONFIGS[request.param]
    return Case(config, random_parts(config))


@pytest.fixture(scope="module")
def qwen2() -> Case:
    return Case(CONFIGS["qwen2"], random_parts(CONFIGS["qwen2"]))


@pytest.fixture(scope="module", params=["qwen2", "deepseek_v3"])
def kept(request: pytest.FixtureRequest) -> Case:
    """One of each kind of cache: keys and values, and latents."""
    config = CONFIGS[request.param]
    return Case(config, random_parts(config))


def test_padding_on_either_side(case: Case) -> None:
    for mask in (LEFT, RIGHT):
        found = case.logits(mask_BT=jnp.asarray(mask))
        assert np.isfinite(found).all()
        for row in range(3):
            wanted = case.oracle(row, mask[row].tolist())
            assert np.abs(wanted).max() > 0.5
            np.testing.assert_allclose(found[row][mask[row]], wanted[mask[row]], **CLOSE)


def test_padding_chooses_no_expert_and_records_say_who_was_chosen() -> None:
    config = CONFIGS["qwen2_moe"]
    model: Decoder = module.merge(*random_parts(config))
    found = model(jnp.asarray(TOKENS), mask_BT=jnp.asarray(LEFT)).records
    assert list(found) == ["layers/3/mlp/routed"]
    routing = found["layers/3/mlp/routed"].routing
    assert routing.experts_NK.shape == (TOKENS.size, 2)
    np.testing.assert_array_equal(np.asarray(routing.experts_NK >= 0).all(1), LEFT.reshape(-1))


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other(case: Case) -> None:
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [5, 3, 3, 3, 4, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    found = case.logits(segments_BT=jnp.asarray(segments, jnp.int32))
    for row in range(3):
        real = segments[row] > 0
        wanted = case.oracle(row, real.tolist(), segments[row].tolist())
        np.testing.assert_allclose(found[row][real], wanted[real], **CLOSE)


def test_biases_norms_and_a_head_exist_where_the_family_has_them() -> None:
    def names(kind: str) -> set[str]:
        flat = module.flatten(module.abstract(lambda: CONFIGS[kind].build(nnx.Rngs(0))).params)
        return {path.removeprefix("layers/0/") for path in flat if "layers/1" not in path}

    kernels = {f"attn/{n}/kernel" for n in "qkvo"} | {
        f"mlp/{n}/kernel" for n in ("gate", "up", "down")
    }
    always = kernels | {"norm1/scale", "norm2/scale", "norm/scale", "embed/table"}
    head = {"lm_head/kernel"}
    assert names("llama") == always
    assert names("qwen2") == always | head | {f"attn/{n}/bias" for n in "qkv"}
    assert names("qwen3") == always | head | {f"attn/{n}_norm/scale" for n in "qk"}
    assert names("biases") == always | head | {k.replace("kernel", "bias") for k in kernels}


def test_cached_passes_give_the_same_logits(kept: Case) -> None:
    for mask in (LEFT, RIGHT):
        whole = kept.logits(mask_BT=jnp.asarray(mask))

        @jax.jit
        def pieces(params, mask):
            model = module.merge(kept.parts.definition, params, kept.parts.stats)
            cache, found = model.empty_cache(3, T + 2), []
            for start, end in ((0, 5), (5, T)):
                part = slice(start, end)
                out = model(jnp.asarray(TOKENS[:, part]), mask_BT=mask[:, part], cache=cache)
                cache = out.cache
                found.append(out.logits_BTV)
            return jnp.concatenate(found, axis=1), cache.lengths_B

        found, lengths = pieces(kept.parts.params, jnp.asarray(mask))
        np.testing.assert_allclose(np.asarray(found)[mask], whole[mask], **CLOSE)
        np.testing.assert_array_equal(lengths, mask.sum(1))


def test_a_cache_takes_no_segments(qwen2: Case) -> None:
    model: Decoder = module.merge(*qwen2.parts)
    with pytest.raises(UserError, match="give no segments"):
        model(jnp.asarray(TOKENS), segments_BT=jnp.ones((3, T)), cache=model.empty_cache(3, T))


@pytest.mark.slow
def test_recomputing_layers_changes_no_gradient(qwen2: Case) -> None:
    params = qwen2.parts.params | {"layers": {"0": qwen2.parts.params["layers"]["0"]}}

    def gradient(remat: bool):
        sizes = BASE | {"qkv_bias": True, "head_width": 6, "depth": 1, "remat": remat}
        config = DecoderConfig(**sizes)
        definition = module.abstract(lambda: config.build(nnx.Rngs(0))).definition

        def loss(params):
            model = module.merge(definition, params, {})
            return jnp.square(model(jnp.asarray(TOKENS)).logits_BTV).mean()

        traced = jax.jit(jax.grad(loss)).trace(params)
        assert ("remat" in str(traced.jaxpr)) == remat
        return module.flatten(traced.lower().compile()(params))

    plain, again = gradient(False), gradient(True)
    for path, leaf in plain.items():
        np.testing.assert_allclose(again[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
        assert np.abs(leaf).max() > 0, path


class Counting(nnx.Module):
    """An adapter that adds 0 and reports what it was told."""

    wants_context = True

    def __init__(self, base: Linear):
        self.base = base

    def __call__(self, x: Array, context: Context) -> LayerOutput:
        task = jnp.broadcast_to(jnp.asarray(context.task_B), (x.shape[0],))
        assert context.train
        assert context.mask_BT is not None and context.key is not None
        draw = jax.random.uniform(context.key)
        return LayerOutput(
            self.base(x), {"tokens": context.mask_BT.sum(), "task": task, "draw": draw}
        )


def test_adapted_layers_are_told_the_context_and_report_by_path(qwen2: Case) -> None:
    config = DecoderConfig(**(BASE | {"qkv_bias": True, "head_width": 6, "remat": True}))
    definition = module.abstract(lambda: config.build(nnx.Rngs(0))).definition
    model: Decoder = module.merge(definition, qwen2.parts.params, {})
    paths = ["layers/0/attn/q", "layers/1/attn/o", "layers/1/mlp/down", "lm_head"]
    for path in paths:
        surgery.replace(model, path, Counting(surgery.get(model, path)))
    parts = module.split(model)

    @jax.jit
    def run(params, task_B, key):
        return module.merge(parts.definition, params, parts.stats)(
            jnp.asarray(TOKENS),
            mask_BT=jnp.asarray(LEFT),
            context=Context(task_B),
            train=True,
            key=key,
        )

    out = run(parts.params, jnp.asarray([2, 0, 1]), jax.random.key(3))
    assert sorted(out.records) == sorted(paths)
    for record in out.records.values():
        assert int(record["tokens"]) == LEFT.sum()
        np.testing.assert_array_equal(record["task"], [2, 0, 1])
    # Every layer draws for itself.
    assert len({float(record["draw"]) for record in out.records.values()}) == len(paths)
    plain = qwen2.logits(mask_BT=jnp.asarray(LEFT))
    np.testing.assert_allclose(np.asarray(out.logits_BTV)[LEFT], plain[LEFT], **CLOSE)


def test_parameters_and_computation_have_types_of_their_own() -> None:
    sizes = BASE | {"depth": 1, "hidden": 64}
    config = DecoderConfig(**sizes, head_width=4, dtype="bfloat16", param_dtype="float16")
    parts = module.create(lambda: config.build(nnx.Rngs(0)))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(parts.params)} == {"float16"}
    model: Decoder = module.merge(*parts)
    shapes = jax.eval_shape(lambda t: model.features(t, Context())[0], TOKENS)
    assert shapes.dtype == jnp.bfloat16
    assert jax.eval_shape(lambda t: model(t).logits_BTV, TOKENS).dtype == jnp.float32
    kernel = parts.params["layers"]["0"]["mlp"]["up"]["kernel"]
    assert 0.015 < float(kernel.astype(jnp.float32).std()) < 0.025


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"groups": 3}, "groups is 3; it must divide heads, 4"),
        ({"width": 10}, "heads is 4; it must divide the width 10, or give head_width"),
        ({"head_width": 5}, "A head turns in 5 features; rotation needs an even width from 4"),
        ({"latent": LatentConfig(4), "qk_norm": True}, "latent attention has widths of heads of"),
        ({"experts": ExpertsConfig(4, dense=(2,))}, "experts.dense names layer 2, but the depth"),
    ],
)
def test_impossible_sizes(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DecoderConfig(**(BASE | changes))


def test_what_decides_what_weights_compute() -> None:
    def told(**changes) -> dict:
        return DecoderConfig(**BASE, head_width=4, experts=ExpertsConfig(4, **changes)).computes()

    assert told() == told(dispatch="blocks")
    assert told()["experts.selection"] != told(selection="softmax_then_top_k")["experts.selection"]
    without = DecoderConfig(**BASE, head_width=4, experts=ExpertsConfig(top_k=3)).computes()
    assert without == DecoderConfig(**BASE, head_width=4).computes()  # nobody chooses three of none


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "experts.top_k is 5, but experts.count is 4"),
        ({"top_k": 1}, "experts.top_k is 1 of 4 .* its router would never learn; take softmax"),
        ({"count": 1, "top_k": 1}, "there is nothing to choose"),
        ({"selection": "top_k"}, "Unknown selection 'top_k'"),
        ({"dispatch": "block"}, "did you mean blocks"),
        ({"groups": 3}, "experts.groups is 3, which does not divide experts.count, 4"),
        ({"groups": 4, "group_score": "two_best"}, "a group has one expert: take best"),
        ({"groups": 4, "top_groups": 1}, "top_groups is 1 of 4 with 1 experts each: a token needs"),
    ],
)
def test_impossible_experts(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExpertsConfig(**({"count": 4, "top_k": 2} | changes))


LLAMA2 = {"vocabulary": 32_000}
LLAMA3_1 = {"vocabulary": 128_256, "width": 4096, "groups": 8, "hidden": 14_336}
QWEN2_5 = {"width": 3584, "heads": 28, "groups": 4, "hidden": 18_944, "qkv_bias": True}
SMALL = {"width": 896, "heads": 14, "groups": 2, "hidden": 4864, "qkv_bias": True}
QWEN3 = {"width": 4096, "groups": 8, "hidden": 12_288, "qk_norm": True, "head_width": 128}
PUBLISHED = {
    "Llama-2-7B": (LLAMA2, 32, 6_738_415_616),
    "Llama-2-13B": (LLAMA2 | {"width": 5120, "heads": 40, "groups": 40, "hidden": 13_824}, 40)
    + (13_015_864_320,),
    "Llama-3.1-8B": (LLAMA3_1, 32, 8_030_261_248),
    "Qwen2.5-7B": (QWEN2_5 | {"vocabulary": 152_064}, 28, 7_615_616_512),
    "Qwen2.5-0.5B": (SMALL | {"vocabulary": 151_936, "tied_head": True}, 24, 494_032_768),
    "Qwen3-8B": (QWEN3 | {"vocabulary": 151_936}, 36, 8_190_735_360),
    "Mixtral-8x7B": (
        {"vocabulary": 32_000, "groups": 8, "experts": ExpertsConfig(8, 2, 14_336)},
        32,
        46_702_792_704,
    ),
    "OLMoE-1B-7B": (
        {"vocabulary": 50_304, "width": 2048, "heads": 16, "groups": 16, "qk_norm": True}
        | {"qk_norm_over": "width", "experts": ExpertsConfig(64, 8, 1024, "softmax_then_top_k")},
        16,
        6_919_161_856,
    ),
    "Qwen3-30B-A3B": (
        {"vocabulary": 151_936, "width": 2048, "groups": 4, "head_width": 128, "qk_norm": True}
        | {"experts": ExpertsConfig(128, 8, 768)},
        48,
        30_532_122_624,
    ),
    "Qwen1.5-MoE-A2.7B": (
        {"vocabulary": 151_936, "width": 2048, "heads": 16, "groups": 16, "qkv_bias": True}
        | {"experts": ExpertsConfig(60, 4, 1408, "softmax_then_top_k", shared=5632)},
        24,
        14_315_784_192,
    ),
    "DeepSeek-V2-Lite": (
        {"vocabulary": 102_400, "width": 2048, "heads": 16, "groups": 16, "hidden": 10_944}
        | {"latent": LatentConfig(512, 0)}
        | {"experts": ExpertsConfig(64, 6, 1408, dense=(0,), shared=2816, shared_weight="one")},
        27,
        15_706_484_224,
    ),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_parameters_of_published_models(name: str) -> None:
    sizes, depth, wanted = PUBLISHED[name]

    def count(layers: int) -> int:
        config = DecoderConfig(**sizes, depth=layers)
        return module.count(module.abstract(lambda: config.build(nnx.Rngs(0))).params)

    one = count(1)
    assert one + (depth - 1) * (count(2) - one) == wanted
