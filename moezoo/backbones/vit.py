"""Vision transformers with the sub-module names of DeiT and timm.

Touvron et al. (arXiv:2012.12877) for the sizes; pre-norm blocks, biases everywhere, exact GELU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.fields import AxisSize, Depth, Range, Ratio, Share, check
from moezoo.nn.attention import Attention, MakeNorm
from moezoo.nn.context import NO_TASK, Context, LayerOutput
from moezoo.nn.embed import STEMS, Positions, grid_of
from moezoo.nn.layers import MLP, Init, LayerNorm, Linear, drop_path, trunc_normal
from moezoo.nn.moe import Record
from moezoo.ops.attention import AttentionWay, check_way
from moezoo.ops.interpolate import resize


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer; the defaults are ViT-small/16."""

    width: AxisSize = 384
    """Features of a token."""
    depth: Depth = 12
    """Blocks."""
    heads: AxisSize = 6
    """Attention heads; they divide the width."""
    patch: AxisSize = 16
    """Side of the square of pixels that becomes one token."""
    mlp_ratio: Ratio = 4.0
    """Hidden width of a dense block's MLP over the width."""
    stem: Literal["patch", "conv"] = "patch"
    """How pixels become tokens: one linear map per patch, or a few convolutions of stride 2."""
    registers: Annotated[int, Range(0, 256)] = 0
    """Learned tokens beside the patches that take part in the blocks and that no head reads."""
    qk_norm: Literal["none", "layer"] = "none"
    """Norm of each head's queries and keys."""
    drop_path: Share = 0.0
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, routers and normalisations stay float32."""
    attention: AttentionWay = "plain"
    """By plain products, or by cuDNN's kernel; auto: that on NVIDIA GPUs in 16 bits, if it fits."""

    def __post_init__(self) -> None:
        check(self)
        if self.width % self.heads:
            raise UserError(f"heads is {self.heads}; it must divide the width {self.width}.")
        check_way(self.attention, self.dtype, self.width // self.heads)
        if self.mlp_hidden < 1:
            raise UserError(f"mlp_ratio is {self.mlp_ratio}; the MLP needs a hidden unit.")
        if self.stem == "conv" and self.patch & (self.patch - 1):
            raise UserError(f"patch is {self.patch}; a convolutional stem needs a power of two.")

    @property
    def mlp_hidden(self) -> int:
        """Hidden units of a dense block's MLP."""
        return int(self.width * self.mlp_ratio)

    def seen(self, grid: tuple[int, int], class_tokens: int = 1) -> int:
        """T, the tokens that a block computes: patches of a grid, class tokens and registers."""
        return grid[0] * grid[1] + class_tokens + self.registers

    @classmethod
    def tiny(cls, **changes: Any):
        """ViT-tiny: width 192, 3 heads."""
        return replace(cls(width=192, heads=3), **changes)

    @classmethod
    def small(cls, **changes: Any):
        """ViT-small: width 384, 6 heads."""
        return replace(cls(), **changes)

    @classmethod
    def base(cls, **changes: Any):
        """ViT-base: width 768, 12 heads."""
        return replace(cls(width=768, heads=12), **changes)


# The MLP or MoE of the block with this index, or its attention.
MakeMLP = Callable[[int, nnx.Rngs], nnx.Module]


class BlockOutput(NamedTuple):
    """x_BTD, and the record of the pass where the block is an MoE one."""

    x_BTD: Array
    record: Record | None


class Block(nnx.Module):
    """Attention and an MLP or MoE, each behind a LayerNorm and around a residual.

    `attn` in the place of plain attention: another width of heads, or heads that are experts
    (`MoA`). A call gives the record of the MLP; where attention has one too, call the halves.

    `router_sees`: "mlp_input" is what the experts see too; "block_input" is the tokens before
    attention (the reference's option `gate_input_ahead`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: nnx.Module,
        *,
        attn: nnx.Module | None = None,
        drop_path: float = 0.0,
        router_sees: Literal["mlp_input", "block_input"] = "mlp_input",
        make_norm: MakeNorm | None = None,
        way: AttentionWay = "plain",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn: Any = attn or Attention(
            width, heads, make_norm=make_norm, way=way, dtype=dtype, rngs=rngs
        )
        self.mlp = mlp
        self.drop_path, self.router_sees = drop_path, router_sees

    def attend(
        self, x_BTD: Array, context: Context = NO_TASK, key: Array | None = None
    ) -> BlockOutput:
        """The first half: x + attention, with the record of the heads where they are experts."""
        normed_BTD = self.norm1(x_BTD)
        y, record = _half(self.attn, normed_BTD, normed_BTD, context, _fold(key, 3))
        # Each use of `key` in a block has a number of its own, 0 to 3.
        return BlockOutput(x_BTD + drop_path(y, self.drop_path, _fold(key, 0)), record)

    def feed(
        self,
        x_BTD: Array,
        normed_BTD: Array,
        block_input_BTD: Array,
        context: Context,
        key: Array | None = None,
    ) -> BlockOutput:
        """The second half: x + MLP or MoE of `normed_BTD`, which is `norm2` of x."""
        seen_BTD = block_input_BTD if self.router_sees == "block_input" else normed_BTD
        y, record = _half(self.mlp, normed_BTD, seen_BTD, context, _fold(key, 1))
        return BlockOutput(x_BTD + drop_path(y, self.drop_path, _fold(key, 2)), record)

    def __call__(
        self, x_BTD: Array, context: Context = NO_TASK, key: Array | None = None
    ) -> BlockOutput:
        y_BTD = self.attend(x_BTD, context, key).x_BTD
        return self.feed(y_BTD, self.norm2(y_BTD), x_BTD, context, key)


def _half(
    layer: Any, x_BTD: Array, seen_BTD: Array, context: Context, key: Array | None
) -> LayerOutput:
    """What a block's attention or MLP gives; layers of experts are told what their routers see."""
    in_block = getattr(layer, "in_block", None)
    if in_block is None:
        return LayerOutput(layer(x_BTD))
    return in_block(x_BTD, seen_BTD, context, key)


# What happens in one block: (block, its number, tokens, key) to tokens and the records of its
# halves, "attn" and "mlp".
BlockStep = Callable[[Block, int, Array, "Array | None"], tuple[Array, dict[str, Any]]]


def whole_block(context: Context) -> BlockStep:
    """Every block as it stands, under one context."""

    def step(block: Block, i: int, x_BTD: Array, key: Array | None) -> tuple[Array, dict[str, Any]]:
        x_BTD, record = block(x_BTD, context, key)
        return x_BTD, {"mlp": record}

    return step


AS_THEY_STAND = whole_block(NO_TASK)
QK_NORMS: dict[str, MakeNorm | None] = {"none": None, "layer": LayerNorm}


class Trunk(nnx.Module):
    """Patches, class token, positions, registers and blocks: the beginning of every one here.

    `make_mlp` gives each block its MLP or MoE, `make_attention` its attention; dense by default.
    `class_token` says what the class token starts from; without one there is none.
    `fixed_positions` stand in for learned ones; the class token has none of them. `make_norm` is
    that of `Attention`; the configuration's `qk_norm` decides where it is not given. Registers
    (Darcet et al., arXiv:2309.16588) have no position, so they stand behind the patches in the
    blocks, whatever the order in files, and `run` takes them away again.
    """

    def __init__(
        self,
        config: ViTConfig,
        image_size: tuple[int, int],
        *,
        make_mlp: MakeMLP | None = None,
        make_attention: MakeMLP | None = None,
        router_sees: Literal["mlp_input", "block_input"] = "mlp_input",
        class_token: Init | None = trunc_normal,
        fixed_positions: Positions | None = None,
        make_norm: MakeNorm | None = None,
        rngs: nnx.Rngs,
    ):
        grid = grid_of(image_size, config.patch)
        width, dtype = config.width, jnp.dtype(config.dtype)
        make_mlp = make_mlp or (lambda i, rngs: dense_mlp(config, rngs))
        make_norm = make_norm or QK_NORMS[config.qk_norm]
        self.config, self.grid, self.dtype = config, grid, dtype
        self.patch_embed = STEMS[config.stem](config.patch, width, dtype=dtype, rngs=rngs)
        self.cls_token = class_token and nnx.Param(class_token(rngs.params(), (1, 1, width)))
        tokens = bool(class_token) + grid[0] * grid[1]
        learned = fixed_positions is None
        table = trunc_normal(rngs.params(), (1, tokens, width)) if learned else None
        self.pos_embed = None if table is None else nnx.Param(table)
        self.fixed_positions = fixed_positions
        self.register_tokens = _registers(config, rngs)
        self.blocks = nnx.List(
            Block(
                width,
                config.heads,
                make_mlp(i, rngs),
                attn=make_attention(i, rngs) if make_attention else None,
                drop_path=config.drop_path * i / max(config.depth - 1, 1),
                router_sees=router_sees,
                make_norm=make_norm,
                way=config.attention,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(config.depth)
        )

    def run(
        self,
        x_BTD: Array,
        key: Array | None = None,
        records: dict[str, Any] | None = None,
        step: BlockStep = AS_THEY_STAND,
    ) -> Array:
        """Tokens after all blocks, one after the other; the only place that goes through them.

        step: what a system does in a block; the tokens that it gets end with the registers. Fills
        `records` by the paths of the layers. key: each block gets one of its own; none means no
        noise and no stochastic depth.
        """
        x_BTD = self._with_registers(x_BTD)
        for i, block in enumerate(self.blocks):
            x_BTD, found = step(block, i, x_BTD, _fold(key, i))
            if records is not None:
                records |= {f"blocks/{i}/{name}": r for name, r in found.items() if r is not None}
        return x_BTD[:, : x_BTD.shape[1] - self.config.registers]

    def _with_registers(self, x_BTD: Array) -> Array:
        if self.register_tokens is None:
            return x_BTD
        tokens_1RD = self.register_tokens.get_value().astype(x_BTD.dtype)
        sizes = (x_BTD.shape[0], *tokens_1RD.shape[1:])
        return jnp.concatenate([x_BTD, jnp.broadcast_to(tokens_1RD, sizes)], axis=1)

    def embed(self, image_BHWC: Array) -> Array:
        """Tokens [B, 1 + P, D], the class token first if there is one.

        Learned positions are resized to other grids.
        """
        grid = grid_of((image_BHWC.shape[1], image_BHWC.shape[2]), self.config.patch)
        x_BTD = self.patch_embed(image_BHWC)
        first = 0
        if self.cls_token is not None:
            token = self.cls_token.get_value().astype(self.dtype)
            token = jnp.broadcast_to(token, (x_BTD.shape[0], 1, x_BTD.shape[2]))
            x_BTD, first = jnp.concatenate([token, x_BTD], axis=1), 1
        return x_BTD + self._positions(grid, first).astype(self.dtype)

    def _positions(self, grid: tuple[int, int], first: int) -> Array:
        """[1, T, D] for tokens of which `first` are no patches."""
        if self.pos_embed is None:
            fixed = self.fixed_positions(grid, self.config.width)  # type: ignore[misc]
            return jnp.pad(fixed, ((0, 0), (first, 0), (0, 0)))
        learned = self.pos_embed.get_value()
        return learned if grid == self.grid else _other_grid(learned, first, self.grid, grid)


def _registers(config: ViTConfig, rngs: nnx.Rngs) -> nnx.Param | None:
    if not config.registers:
        return None
    return nnx.Param(trunc_normal(rngs.params(), (1, config.registers, config.width)))


class Classified(NamedTuple):
    """float32 logits [B, classes] and the records of MoE blocks by path."""

    logits: Array
    records: dict[str, Record]


class ViT(Trunk):
    """A trunk with a final norm and a classifier on the class token, as for ImageNet."""

    def __init__(
        self,
        config: ViTConfig,
        image_size: tuple[int, int] = (224, 224),
        classes: int = 1000,
        *,
        make_mlp: MakeMLP | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, image_size, make_mlp=make_mlp, rngs=rngs)
        self.norm = LayerNorm(config.width)
        self.head = Linear(config.width, classes, rngs=rngs)

    def __call__(
        self, image_BHWC: Array, context: Context = NO_TASK, key: Array | None = None
    ) -> Classified:
        records: dict[str, Any] = {}
        x_BTD = self.run(self.embed(image_BHWC), key, records, whole_block(context))
        return Classified(self.head(self.norm(x_BTD[:, 0]).astype(jnp.float32)), records)


def dense_mlp(config: ViTConfig, rngs: nnx.Rngs) -> MLP:
    """The MLP of a dense block."""
    dtype = jnp.dtype(config.dtype)
    return MLP(config.width, config.mlp_hidden, dtype=dtype, rngs=rngs)


def _other_grid(position: Array, first: int, own: tuple[int, int], grid: tuple[int, int]) -> Array:
    image = position[:, first:].reshape(1, *own, -1)
    patches = resize(image, grid).reshape(1, grid[0] * grid[1], -1)
    return jnp.concatenate([position[:, :first], patches], axis=1)


def _fold(key: Array | None, number: int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, number)
