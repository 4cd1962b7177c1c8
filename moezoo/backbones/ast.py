"""Audio Spectrogram Transformer: a vision transformer on overlapping patches of a spectrogram.

Gong, Chung, Glass: "AST: Audio Spectrogram Transformer", Interspeech 2021, arXiv:2104.01778, in the
form that transformers publishes as `ASTModel` (checkpoints `MIT/ast-finetuned-audioset-*`). Tokens
are [class, distillation, patches], patch (f, t) of a grid F x T at f * T + t. Every product with a
weight is one sub-module (`blocks/3/attn/q`, `blocks/3/mlp/fc1`), so that `nn.surgery` can put an
adapter in its place; layers are told of padding and tasks by `nn.context`.

Positions are learned for one length. For a shorter clip the middle columns are taken, for a longer
one all are stretched (bilinear), as the authors' own code does; transformers does neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moezoo.errors import UserError
from moezoo.fields import AxisSize, Depth, Positive, check
from moezoo.nn.attention import SplitAttention
from moezoo.nn.context import Context, LayerOutput, apply_linear
from moezoo.nn.layers import MLP, LayerNorm, trunc_normal
from moezoo.ops.attention import AttentionWay, check_way
from moezoo.ops.interpolate import resize

SPECIAL = 2  # class and distillation token
Grid = tuple[int, int]  # patches along frequency and time
FitPositions = Callable[[Array, Grid, Grid], Array]  # (table of a grid, own grid, wanted grid)


@dataclass(frozen=True)
class ASTConfig:
    """Sizes of an AST; the defaults are those of the AudioSet checkpoints."""

    frames: AxisSize = 1024
    """Frames of a clip that the table of positions is made for; clips may have others."""
    mel: AxisSize = 128
    """Mel bands of a frame."""
    patch: AxisSize = 16
    """Side of the square of the spectrogram that becomes one token."""
    stride_time: AxisSize = 10
    """Frames from one patch to the next."""
    stride_freq: AxisSize = 10
    """Bands from one patch to the next."""
    width: AxisSize = 768
    """Features of a token."""
    depth: Depth = 12
    """Blocks."""
    heads: AxisSize = 12
    """Attention heads; they divide the width."""
    hidden: AxisSize = 3072
    """Hidden units of a block's MLP."""
    norm_epsilon: Positive = 1e-12
    """Added to the variance in every norm."""
    qkv_bias: bool = True
    """Biases of queries, keys and values."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, softmaxes and normalisations stay float32."""
    attention: AttentionWay = "plain"
    """By plain products, or by cuDNN's kernel; auto: that on NVIDIA GPUs in 16 bits, if it fits."""
    init_std: Positive = 0.02
    """Deviation that matrices of blocks and positions start from. Narrow trunks that are trained
    from nothing need about 1 / sqrt(width): with less their blocks hardly change anything."""

    def __post_init__(self) -> None:
        check(self)
        if self.width % self.heads:
            raise UserError(f"heads is {self.heads}; it must divide the width {self.width}.")
        check_way(self.attention, self.dtype, self.width // self.heads)
        self.grid(self.frames)

    def grid(self, frames: int) -> Grid:
        """Patches along frequency and time in a clip of so many frames.

        Raises UserError where a clip, or the spectrum, is smaller than a patch.
        """
        if frames < self.patch or self.mel < self.patch:
            raise UserError(
                f"Clips of {frames} frames and {self.mel} mel bands are smaller than a patch of "
                f"{self.patch} x {self.patch}: take longer clips or a smaller patch."
            )
        rows = (self.mel - self.patch) // self.stride_freq + 1
        return rows, (frames - self.patch) // self.stride_time + 1

    def tokens(self, frames: int) -> int:
        """Tokens of a clip of so many frames, the two special ones included."""
        rows, columns = self.grid(frames)
        return SPECIAL + rows * columns


def fitted(table_1TD: Array, own: Grid, grid: Grid) -> Array:
    """The middle of a table of positions where it is too long, all of it stretched where too short.

    Each axis by itself; the two special tokens keep theirs. AST's own code, `ast_models.py`.
    """
    maps = table_1TD[:, SPECIAL:].reshape(1, *own, -1)
    for axis, (have, wanted) in enumerate(zip(own, grid, strict=True), start=1):
        if wanted < have:
            # The middle as `ast_models.py` finds it, which rounds both halves down.
            maps = lax.slice_in_dim(maps, have // 2 - wanted // 2, None, axis=axis)
            maps = lax.slice_in_dim(maps, 0, wanted, axis=axis)
    patches = resize(maps, grid).reshape(1, grid[0] * grid[1], -1)
    return jnp.concatenate([table_1TD[:, :SPECIAL], patches], axis=1)


def zero_elsewhere(table_1TD: Array, own: Grid, grid: Grid) -> Array:
    """No positions at all for another length, the special tokens included.

    What transformers makes of a table whose size does not match.
    """
    return jnp.zeros((1, SPECIAL + grid[0] * grid[1], table_1TD.shape[-1]))


class SpectrogramPatches(nnx.Module):
    """One linear map of every patch, overlapping or not; kernel [bands, frames, 1, D]."""

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        side, self.config = config.patch, config
        self.kernel = nnx.Param(trunc_normal(rngs.params(), (side, side, 1, config.width)))
        self.bias = nnx.Param(jnp.zeros((config.width,)))

    def __call__(self, audio_BTF: Array) -> Array:
        """Tokens [B, P, D], those of the lowest bands first."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        maps = lax.conv_general_dilated(
            # Bands are rows: published kernels and the order of tokens have it so.
            jnp.swapaxes(audio_BTF, 1, 2)[..., None].astype(dtype),
            self.kernel.get_value().astype(dtype),
            window_strides=(config.stride_freq, config.stride_time),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x_BPD = maps.reshape(maps.shape[0], maps.shape[1] * maps.shape[2], maps.shape[3])
        return x_BPD + self.bias.get_value().astype(dtype)


class ASTBlock(nnx.Module):
    """Attention and an MLP, each behind a LayerNorm and around a residual.

    Either of the four may be replaced by a module that wants the context.
    """

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.norm1: Any = LayerNorm(config.width, config.norm_epsilon)
        self.norm2: Any = LayerNorm(config.width, config.norm_epsilon)
        init = partial(trunc_normal, std=config.init_std)
        options: dict[str, Any] = {"dtype": dtype, "init": init, "rngs": rngs}
        chosen: dict[str, Any] = {"bias": config.qkv_bias, "way": config.attention}
        self.attn: Any = SplitAttention(config.width, config.heads, **chosen, **options)
        self.mlp: Any = MLP(config.width, config.hidden, **options)

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        x_BTD += apply_linear(self.attn, self.normed("norm1", x_BTD, context), context, "attn")
        return x_BTD + apply_linear(self.mlp, self.normed("norm2", x_BTD, context), context, "mlp")

    def normed(self, name: str, x_BTD: Array, context: Context) -> Array:
        """What the sub-layer behind this norm sees."""
        return apply_linear(getattr(self, name), x_BTD, context, name)


class AST(nnx.Module):
    """Patches, two special tokens, positions, blocks and a last norm.

    `fit` makes the positions of clips of another length than the table's; `make_block` is
    `ASTBlock` or a kind of it.
    """

    def __init__(
        self,
        config: ASTConfig,
        *,
        fit: FitPositions = fitted,
        make_block: type[ASTBlock] = ASTBlock,
        rngs: nnx.Rngs,
    ):
        self.config, self.fit = config, fit
        width, tokens = config.width, config.tokens(config.frames)
        self.patch_embed = SpectrogramPatches(config, rngs=rngs)
        init = partial(trunc_normal, std=config.init_std)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, width)))
        self.dist_token = nnx.Param(init(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, tokens, width)))
        self.blocks = nnx.List(make_block(config, rngs=rngs) for _ in range(config.depth))
        self.norm: Any = LayerNorm(width, config.norm_epsilon)

    def embed(self, audio_BTF: Array) -> Array:
        """Tokens [B, 2 + F * T, D] of log-mel spectrograms [B, frames, mel bands].

        Raises UserError for another number of bands, and for clips smaller than a patch.
        """
        config = self.config
        if audio_BTF.shape[2] != config.mel:
            raise UserError(
                f"The model reads {config.mel} mel bands, but the clips have "
                f"{audio_BTF.shape[2]}: set data.mel, or model.ast.mel, to the other's."
            )
        grid, own = config.grid(audio_BTF.shape[1]), config.grid(config.frames)
        x_BPD = self.patch_embed(audio_BTF)
        b, _, d = x_BPD.shape
        special = [
            jnp.broadcast_to(token.get_value().astype(x_BPD.dtype), (b, 1, d))
            for token in (self.cls_token, self.dist_token)
        ]
        table = self.pos_embed.get_value()
        table = table if grid == own else self.fit(table, own, grid)
        return jnp.concatenate([*special, x_BPD], axis=1) + table.astype(x_BPD.dtype)

    def encode(self, x_BTD: Array, context: Context) -> Array:
        """Embedded tokens through all blocks, before the last norm."""
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, context.within(f"blocks/{i}"))
        return x_BTD

    def __call__(self, audio_BTF: Array, context: Context | None = None) -> LayerOutput:
        """Tokens after the last norm, [B, T, D]: transformers' `last_hidden_state`."""
        context = context or Context()
        x_BTD = self.encode(self.embed(audio_BTF), context)
        return LayerOutput(apply_linear(self.norm, x_BTD, context, "norm"), context.records)


def token_mask(config: ASTConfig, frames: int, frames_B: Array) -> Array:
    """bool [B, T]: False for patches that lie wholly behind the last true frame of a clip.

    frames: of the padded clips. frames_B: int32, true frames of each. Special tokens are True.
    """
    rows, columns = config.grid(frames)
    real_BT = jnp.arange(columns) * config.stride_time < frames_B[:, None]
    real_BP = jnp.tile(real_BT, (1, rows))
    special = jnp.ones((real_BP.shape[0], SPECIAL), bool)
    return jnp.concatenate([special, real_BP], axis=1)


def special_token(x_BTD: Array, mask_BT: Array | None = None) -> Array:
    """The mean of class and distillation token, [B, D]: transformers' `pooler_output`."""
    return (x_BTD[:, 0] + x_BTD[:, 1]) / 2
