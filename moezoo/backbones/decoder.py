"""Decoder-only transformers of the Llama and Qwen families, equal to published weights' own code.

With experts in the MLPs also Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, dots.llm1 and GLM-4.5
(`backbones.decoder_mlp`), and with latent attention DeepSeek-V2 and V3 (`nn.latent_attention`).

Llama 2 (Touvron et al., arXiv:2307.09288), Llama 3 (arXiv:2407.21783), Qwen2 and Qwen2.5
(arXiv:2407.10671, arXiv:2412.15115: biases on q, k and v), Qwen3 (arXiv:2505.09388: a norm on the
queries and keys of every head, none of those biases). All have pre-norm blocks with RMSNorm,
rotary positions, grouped-query attention and SwiGLU (arXiv:2002.05202). Sliding windows, dropout on
attention and experts are not here.

Every product with a weight is a sub-module of its own, `layers/3/attn/q`, `k`, `v`, `o`,
`layers/3/mlp/gate`, `up`, `down` and `lm_head`, so that `nn.surgery` can put an adapter in its
place (`nn.context`); those with experts' weights are none. A tied head is no module either: it is
the embedding's table.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.decoder_mlp import ExpertsConfig, GatedMLP, SparseMLP
from moezoo.errors import UserError
from moezoo.fields import AxisSize, Count, Depth, Positive, Range, check
from moezoo.nn import depth
from moezoo.nn.causal_attention import (
    Cache,
    CausalAttention,
    KeyValues,
    NormOver,
    positions,
    visible,
)
from moezoo.nn.context import NO_TASK, Context, apply_linear
from moezoo.nn.latent_attention import LatentAttention, LatentConfig
from moezoo.nn.layers import Init, Linear, RMSNorm, normal
from moezoo.nn.rope import RopeConfig, Rotation, rotation
from moezoo.ops.attention import AttentionWay, check_way


class Embedding(nnx.Module):
    """One row of `table` [vocabulary, D] per token id."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        init: Init = normal,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.table = nnx.Param(init(rngs.params(), (vocabulary, width)).astype(param_dtype))
        self.dtype = dtype

    def __call__(self, tokens_BT: Array) -> Array:
        # Cast behind the lookup: in front of it the whole table would be cast.
        return self.table.get_value()[tokens_BT].astype(self.dtype)

    def logits(self, x: Array) -> Array:
        """The products of x [..., D] with all rows, for a tied head."""
        return x.astype(self.dtype) @ self.table.get_value().astype(self.dtype).T


class DecoderLayer(nnx.Module):
    """Attention and an MLP or experts, each behind a norm of its own and around a residual."""

    def __init__(
        self,
        attn: CausalAttention | LatentAttention,
        mlp: GatedMLP | SparseMLP,
        norm1: RMSNorm,
        norm2: RMSNorm,
    ):
        self.attn, self.mlp, self.norm1, self.norm2 = attn, mlp, norm1, norm2

    def __call__(
        self,
        x_BTD: Array,
        by: Rotation,
        seen_BTS: Array,
        context: Context,
        past: KeyValues | None = None,
        slot: Array | None = None,
    ) -> tuple[Array, KeyValues]:
        """The layer's output and the keys and values it looked at; see `CausalAttention`."""
        inner = context.within("attn")
        y_BTD, kv = self.attn(self.norm1(x_BTD), by, seen_BTS, inner, past, slot)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.norm2(x_BTD), context.within("mlp")), kv


Float = Literal["float32", "bfloat16", "float16"]
RUNS: dict[str, depth.RunLayers] = {"unrolled": depth.unrolled, "scanned": depth.scanned}


ARCHITECTURE = (
    "vocabulary", "width", "depth", "heads", "groups", "hidden",
    "norm_epsilon", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "qk_norm_over", "tied_head",
)  # fmt: skip


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; the defaults are those of Llama-2-7B."""

    vocabulary: Annotated[int, Range(1, 2**24)] = 32_000
    """Token ids."""
    width: AxisSize = 4096
    """Features of a token."""
    depth: Depth = 32
    """Layers."""
    heads: AxisSize = 32
    """Heads of queries."""
    groups: AxisSize = 32
    """Heads of keys and values, each shared by heads / groups heads of queries."""
    head_width: AxisSize | None = None
    """Features of a head; None = width / heads."""
    hidden: AxisSize = 11_008
    """Hidden units of a layer's gated MLP."""
    length: Count = 4096
    """Tokens of the longest text the model was made for; nothing is cut at it."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Positions."""
    norm_epsilon: Positive = 1e-5
    """Added to the mean square in every norm."""
    qkv_bias: bool = False
    """Biases of the products q, k and v."""
    out_bias: bool = False
    """A bias of the product o."""
    mlp_bias: bool = False
    """Biases of the products gate, up and down."""
    qk_norm: bool = False
    """Norms on queries and keys."""
    qk_norm_over: NormOver = "head"
    """What such a norm is over: every head by itself, or all heads at once (OLMoE)."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    """Keys and values made of a latent per token, in the place of groups, head_width and norms."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Experts in the place of MLPs."""
    tied_head: bool = False
    """The head is the embedding's table, transposed."""
    dtype: Float = "float32"
    """Type of the computation; norms, rotations, softmax and logits stay float32."""
    param_dtype: Float = "float32"
    """Type of the parameters."""
    attention: AttentionWay = "plain"
    """By plain products, or by cuDNN's kernel; auto: that on NVIDIA GPUs in 16 bits, if it fits."""
    layers: Literal["unrolled", "scanned"] = "unrolled"
    """How the layers are written into the program; scanned compiles many layers as fast as one and
    takes a second copy of their parameters while it runs."""
    remat: bool = False
    """Compute every layer again in the backward pass instead of keeping what it computed."""

    def __post_init__(self) -> None:
        check(self)
        if self.heads % self.groups:
            raise UserError(f"groups is {self.groups}; it must divide heads, {self.heads}.")
        if self.latent.rank and (self.head_width is not None or self.qk_norm):
            raise UserError(
                "latent attention has widths of heads of its own and no norms on queries and keys: "
                "leave out head_width and qk_norm."
            )
        if not self.latent.rank and self.head_width is None and self.width % self.heads:
            raise UserError(
                f"heads is {self.heads}; it must divide the width {self.width}, or give head_width."
            )
        if self.latent.rank and self.attention == "cudnn":
            raise UserError(
                "attention is cudnn, but latent attention's values are of another width than its "
                "keys: take auto or plain."
            )
        check_way(self.attention, self.dtype, self.width_of_head)
        beyond = [layer for layer in self.experts.dense if layer >= self.depth]
        if beyond:
            raise UserError(
                f"experts.dense names layer {beyond[0]}, but the depth is {self.depth}: layers are "
                "counted from 0."
            )
        if self.rotated_width < 4 or self.rotated_width % 2:
            raise UserError(
                f"A head turns in {self.rotated_width} features; rotation needs an even width from "
                "4 on."
            )

    def computes(self) -> dict[str, Any]:
        """Everything that decides what this decoder's weights compute, by the field's name."""
        rope = self.rope
        if rope.scaling == "none":  # then its other fields mean nothing
            rope = RopeConfig(theta=rope.theta, share=rope.share)
        derived = {"head_width": self.width_of_head, "rope": rope}
        experts = self.experts if self.experts.count else ExpertsConfig()
        told = {f"experts.{name}": value for name, value in vars(experts).items()}
        told.pop("experts.dispatch")  # changes no number
        latent = self.latent if self.latent.rank else LatentConfig()
        told |= {f"latent.{name}": value for name, value in vars(latent).items()}
        derived |= told
        return {name: getattr(self, name) for name in ARCHITECTURE} | derived

    @property
    def width_of_head(self) -> int:
        """Features of a head's query and key."""
        if self.latent.rank:
            return self.latent.width_of_head
        return self.head_width or self.width // self.heads

    @property
    def rotated_width(self) -> int:
        """Those of them that turn with the position."""
        if self.latent.rank:
            return self.latent.rotated
        return int(self.width_of_head * self.rope.share)

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of the keys, and of the values, that a cache keeps of a token."""
        if self.latent.rank:
            return (1, self.latent.rank), (1, self.latent.rotated)
        sizes = (self.groups, self.width_of_head)
        return sizes, sizes

    @property
    def types(self) -> dict[str, Any]:
        """The types of computation and parameters, as every layer takes them."""
        return {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}

    def build(self, rngs: nnx.Rngs) -> Decoder:
        """The model, freshly initialised: normal of deviation 0.02, biases 0, norms 1."""
        return Decoder(self, rngs=rngs)


class DecoderOutput(NamedTuple):
    """What a pass gives.

    logits_BTV: float32.   records: those of adapted layers by path (`nn.context`).
    cache: the one that was given, with these tokens in it.
    """

    logits_BTV: Array
    records: dict[str, Any]
    cache: Cache | None


class DecoderFeatures(NamedTuple):
    """x_BTD after the last norm, in the type of the computation, and the cache with these tokens.

    Records are in the context.
    """

    x_BTD: Array
    cache: Cache | None


class Decoder(nnx.Module):
    """Token ids to logits of the next token."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocabulary, config.width, rngs=rngs, **config.types)
        self.layers = nnx.List(_layer(config, i, rngs) for i in range(config.depth))
        self.norm = _norm(config, config.width)
        self.lm_head: Any = None if config.tied_head else _head(config, rngs)

    def __call__(
        self,
        tokens_BT: Array,
        *,
        mask_BT: Array | None = None,
        segments_BT: Array | None = None,
        positions_BT: Array | None = None,
        context: Context = NO_TASK,
        train: bool = False,
        key: Array | None = None,
        cache: Cache | None = None,
    ) -> DecoderOutput:
        """The logits of every token's successor.

        tokens_BT: int32. mask_BT: bool, False = padding, on either side; what comes out there
        means nothing. segments_BT: int32, the document of every token where several are packed
        into a row, 0 = padding. positions_BT: int32, counted from the mask and within segments
        where they are not given. context, train, key: for adapters (`nn.context`).
        cache: what earlier calls saw, with room for these tokens; not with segments.
        """
        if segments_BT is not None:
            own_BT = segments_BT > 0
            mask_BT = own_BT if mask_BT is None else mask_BT & own_BT
        # Dictionaries of its own: records are those of this pass.
        context = replace(context.collecting(), mask_BT=mask_BT, train=train, key=key)
        x_BTD, cache = self.features(
            tokens_BT, context, segments_BT=segments_BT, positions_BT=positions_BT, cache=cache
        )
        return DecoderOutput(self.logits(x_BTD, context), context.records, cache)

    def features(
        self,
        tokens_BT: Array,
        context: Context,
        *,
        segments_BT: Array | None = None,
        positions_BT: Array | None = None,
        cache: Cache | None = None,
    ) -> DecoderFeatures:
        """All but the head, for those who need the logits of some tokens only; see the call."""
        if cache is not None and segments_BT is not None:
            raise UserError("A decoder's cache holds one document per row: give no segments.")
        mask_BT = context.mask_BT
        whole_BT = jnp.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
        if positions_BT is None:
            # Counted before these tokens get their slots.
            before_B = None if cache is None else cache.lengths_B
            positions_BT = positions(whole_BT, segments_BT, before_B)
        by = rotation(self.config.rope, self.config.rotated_width, positions_BT)
        x_BTD = self.embed(tokens_BT)
        if cache is None:
            x_BTD = self._layers(
                x_BTD, by, visible(mask_BT, segments_BT, *x_BTD.shape[:2]), context
            )
        else:
            x_BTD, cache = self._cached_layers(x_BTD, by, context, cache.reserved(whole_BT))
        return DecoderFeatures(self.norm(x_BTD), cache)

    def logits(self, x_BTD: Array, context: Context) -> Array:
        """float32 logits of `features`, whole or of some tokens."""
        if self.lm_head is None:
            return self.embed.logits(x_BTD).astype(jnp.float32)
        return apply_linear(self.lm_head, x_BTD, context, "lm_head").astype(jnp.float32)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Room for `slots` tokens per row, padding included, in the type of the computation."""
        config = self.config
        return Cache.empty(config.depth, batch, slots, *config.kept, jnp.dtype(config.dtype))

    def _layers(self, x_BTD: Array, by: Rotation, seen_BTT: Array, context: Context) -> Array:
        def step(layer: Any, x_BTD: Array, here: Context) -> Array:
            return layer(x_BTD, by, seen_BTT, here)[0]

        run = RUNS[self.config.layers]
        remember = jax.checkpoint if self.config.remat else depth.everything
        return run(self.layers, step, x_BTD, context, remember=remember)

    def _cached_layers(
        self, x_BTD: Array, by: Rotation, context: Context, cache: Cache
    ) -> tuple[Array, Cache]:
        tokens = x_BTD.shape[1]
        seen_BTS, slot, filled = cache.visible(tokens), cache.used - tokens, []
        for i, (layer, past) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x_BTD, kv = layer(x_BTD, by, seen_BTS, context.within(f"layers/{i}"), past, slot)
            filled.append(kv)
        return x_BTD, cache._replace(layers=tuple(filled))


def _head(config: DecoderConfig, rngs: nnx.Rngs) -> Linear:
    sizes = (config.width, config.vocabulary)
    return Linear(*sizes, bias=False, init=normal, rngs=rngs, **config.types)


def _norm(config: DecoderConfig, width: int) -> RMSNorm:
    return RMSNorm(width, config.norm_epsilon, config.types["param_dtype"])


def _layer(config: DecoderConfig, number: int, rngs: nnx.Rngs) -> DecoderLayer:
    attn, mlp = _attention(config, rngs), _mlp(config, number, rngs)
    return DecoderLayer(attn, mlp, _norm(config, config.width), _norm(config, config.width))


def _attention(config: DecoderConfig, rngs: nnx.Rngs) -> CausalAttention | LatentAttention:
    common: dict[str, Any] = {"bias": config.qkv_bias, "out_bias": config.out_bias, "rngs": rngs}
    common |= config.types
    if config.latent.rank:
        factor = 1.0 if config.rope.scaling == "none" else config.rope.factor
        scale = config.latent.score_scale(factor)
        return LatentAttention(config.width, config.heads, config.latent, scale=scale, **common)
    return CausalAttention(
        config.width,
        config.heads,
        config.groups,
        config.width_of_head,
        make_norm=partial(_norm, config) if config.qk_norm else None,
        norm_over=config.qk_norm_over,
        way=config.attention,
        **common,
    )


def _mlp(config: DecoderConfig, number: int, rngs: nnx.Rngs) -> GatedMLP | SparseMLP:
    if config.experts.in_layer(number):
        return SparseMLP(config.width, config.experts, rngs=rngs, **config.types)
    return GatedMLP(config.width, config.hidden, bias=config.mlp_bias, rngs=rngs, **config.types)
