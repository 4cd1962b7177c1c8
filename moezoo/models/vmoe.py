"""V-MoE: a vision transformer for classification whose MLPs are, in some blocks, experts.

Riquelme, Puigcerver, Mustafa, Neumann, Jenatton, Susano Pinto, Keysers, Houlsby: "Scaling Vision
with Sparse Mixture of Experts", NeurIPS 2021, arXiv:2106.05974; with the two routings that followed
it in the same code base: experts that choose their tokens (Zhou et al., arXiv:2202.09368) and Soft
MoE (Puigcerver et al., arXiv:2308.00951).

What the paper claims (trained on JFT-300M, 32 experts, k = 2): V-MoE-H/14 with experts in its last
5 odd blocks reaches 88.23 % on ImageNet after fine-tuning (dense ViT-H/14: 88.08 %), L/16 with
every second block 87.41 % (87.12 %); a model of 15 billion parameters 90.35 %; and at reduced
capacity batch priority keeps what the order of positions loses. Numbers of parameters of this file
equal the paper's (tests); its accuracies need a data set that was never published.

Where code and paper differ the code is followed: the softmax is taken over all experts before the
top k and not renormalised, "last n" means the last n of the odd blocks, the load loss has one
threshold for all experts, GELU is its tanh approximation. Away from the code: experts start
different from each other (`reference_quirks` "one_start" makes them equal), capacities are not
rounded up to a multiple of 4 unless asked, experts that choose look at one image at a time, so that
its answer does not depend on its neighbours, and there is no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.vit import Trunk
from moezoo.errors import UserError
from moezoo.fields import Size
from moezoo.models.multitask import Output, wanted
from moezoo.models.vmoe_layers import ACTIVATIONS, ExpertLayersConfig
from moezoo.nn.attention import MakeNorm
from moezoo.nn.embed import Positions, grid_of, sincos2d
from moezoo.nn.layers import LayerNorm, Linear, ScaleNorm, zeros
from moezoo.nn.moe import Record
from moezoo.nn.pooling import AttentionPool, first_token, mean_token
from moezoo.ops.routing import Routing


@dataclass(frozen=True)
class VMoEConfig(ExpertLayersConfig):
    """V-MoE; the defaults are V-MoE-B/16 with experts in every second block."""

    per_pixel: ClassVar[bool] = False

    width: Size = 768
    """Features of a token."""
    heads: Size = 12
    """Attention heads; they divide the width."""
    pool: Literal["token", "mean", "attention"] = "token"
    """What is classified: a class token, the mean of all tokens, or an attention pool."""
    positions: Literal["learned", "sincos2d"] = "learned"
    """Positions of the patches."""
    qk_norm: Literal["none", "layer"] = "none"
    """Norm of each head's queries and keys."""
    representation: Size | None = None
    """Width of a tanh layer before the classifier, as in pre-training; None: no such layer."""
    head_bias: float = 0.0
    """What the classifier's bias starts from; its matrix starts from 0."""

    def tokens(self, image_size: tuple[int, int]) -> int:
        """T, the class token included where there is one."""
        height, width = grid_of(image_size, self.patch)
        return height * width + (self.pool == "token")

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs) -> VMoE:
        """The classifier for `{task name: classes}` of images of `image_size` (height, width).

        Raises UserError where sizes do not go together.
        """
        return VMoE(self, tasks, image_size, rngs=rngs)

    # The code base's own sizes; its small one is not DeiT's.

    @classmethod
    def small(cls, **changes: Any):
        """V-MoE-S: width 512, 8 blocks."""
        return replace(cls(width=512, depth=8, heads=8), **changes)

    @classmethod
    def base(cls, **changes: Any):
        """V-MoE-B: width 768, 12 blocks."""
        return replace(cls(), **changes)

    @classmethod
    def large(cls, **changes: Any):
        """V-MoE-L: width 1024, 24 blocks."""
        return replace(cls(width=1024, depth=24, heads=16), **changes)

    @classmethod
    def huge(cls, **changes: Any):
        """V-MoE-H: width 1280, 32 blocks."""
        return replace(cls(width=1280, depth=32, heads=16, patch=14), **changes)


class VMoE(Trunk):
    """A classifier; several tasks on whole images read the same pooled tokens."""

    config: VMoEConfig

    def __init__(
        self,
        config: VMoEConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        if not tasks:
            raise UserError("A classifier needs a task, for example: --tasks scene.")
        for task, classes in tasks.items():
            if classes < 1:
                raise UserError(f"Task {task} has {classes} classes; it needs at least 1.")
        self.tasks, self.row = tuple(tasks), config.tokens(image_size)
        super().__init__(
            config,
            image_size,
            make_mlp=config.make_mlp(self.row),
            class_token=zeros if config.pool == "token" else None,
            fixed_positions=POSITIONS[config.positions],
            make_norm=NORMS[config.qk_norm],
            rngs=rngs,
        )
        self.norm = LayerNorm(config.width)
        self.pool = POOLS[config.pool](config, rngs)
        width = config.representation or config.width
        pre_logits = None
        if config.representation is not None:
            pre_logits = Linear(config.width, width, dtype=self.dtype, rngs=rngs)
        self.pre_logits = pre_logits
        self.heads = nnx.Dict(
            {task: Linear(width, n, init=zeros, rngs=rngs) for task, n in tasks.items()}
        )
        for head in self.heads.values():
            head.bias.set_value(jnp.full(head.bias.shape, config.head_bias))

    @property
    def balance_losses(self) -> Mapping[str, Callable[[Routing], Array]]:
        """The losses that the trainer may add, by name."""
        return self.config.balance_losses(self.row)

    def __call__(
        self,
        image_BHWC: Array,
        *,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> Output:
        """Logits [B, classes] of `tasks` (all by default), float32.

        `key` is for router noise and stochastic depth and acts in training only.
        """
        names = wanted(self.tasks, tasks)
        x_BTD = self.embed(image_BHWC)
        records: dict[str, Record] = {}
        for i, block in enumerate(self.blocks):
            block_key = jax.random.fold_in(key, i) if train and key is not None else None
            x_BTD, record = block(x_BTD, key=block_key)
            if record is not None:
                records[f"blocks/{i}/mlp"] = record
        x_BD = self.pool(self.norm(x_BTD))
        if self.pre_logits is not None:
            x_BD = jnp.tanh(self.pre_logits(x_BD))
        x_BD = x_BD.astype(jnp.float32)
        return Output({task: self.heads[task](x_BD) for task in names}, {}, records)


def _attention_pool(config: VMoEConfig, rngs: nnx.Rngs) -> AttentionPool:
    return AttentionPool(
        config.width,
        config.heads,
        config.mlp_hidden,
        activation=ACTIVATIONS[config.activation],
        make_norm=NORMS[config.qk_norm],
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


POOLS: dict[str, Callable[[VMoEConfig, nnx.Rngs], Callable[[Array], Array]]] = {
    "token": lambda config, rngs: first_token,
    "mean": lambda config, rngs: mean_token,
    "attention": _attention_pool,
}
POSITIONS: dict[str, Positions | None] = {"learned": None, "sincos2d": sincos2d}
NORMS: dict[str, MakeNorm | None] = {"none": None, "layer": ScaleNorm}
