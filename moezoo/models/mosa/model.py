"""MoSA: a frozen vision transformer with sparse adapters that become one adapter after training.

Zhang, Zhang, Gu, Zhang, Li, Zhang: "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning",
arXiv:2312.02923. Beside the MLP of every block stands an adapter whose matrices are split at random
into disjoint sets of entries, one of each expert. For a batch every block draws an expert; two such
passes are to agree:

    loss = loss(p1) + (KL(p2 || p1) + KL(p1 || p2)) / 2

At inference the experts' mean is one ordinary adapter: no router, no further cost.

What the paper claims (abstract): on 27 visual tasks consistently better than other adapters; no
number that we could read. With one expert this file is AdaptFormer (arXiv:2205.13535).

Followed from the code: the matrix into the bottleneck is shared and dense, the other is split
(`shared`); biases have copies; targets of the divergence are detached; merging divides by the
number of experts, although each entry has only one owner (`merge` "union" does not). Ours: experts
are stored as one matrix and the owners of its entries, which computes the same; the adapter reads
the normalised tokens that the MLP reads; several dense tasks read the same tokens.

What we ran, and what came out: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
from flax import nnx
from jax import Array

from moezoo.backbones.vit import Block
from moezoo.fields import AxisSize, NotNegative, Positive, Share, check
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.macs import Half, mlp
from moezoo.models.shared.multitask import MultiTaskConfig, MultiTaskOutput, MultiTaskTrunk
from moezoo.nn.context import NO_TASK
from moezoo.nn.injection import freeze
from moezoo.nn.layers import drop_path
from moezoo.nn.sparse_adapters import SparseAdapters
from moezoo.ops.divergence import Agreement, Divergence, symmetric

TRAINED = ("heads/*", "tam/*", "adapters/*")
AGREE: Agreement = symmetric


@dataclass(frozen=True)
class MoSAConfig(MultiTaskConfig):
    """A vision transformer with sparse adapters; the defaults are the published ones for FGVC."""

    card: ClassVar[Card] = Card(
        title="MoSA",
        paper="Zhang et al., 2023, arXiv:2312.02923",
        kind="sparse adapters on a frozen ViT, one drawn in a pass; merged after training",
        parity="the published code: masks, consistency loss",
        fixtures=("dyt_mosa_mixda",),
        trained=("rooms/mosa_tiny",),
        headline="parts mIoU 0.192, saliency maxF 0.524 on rooms, one seed; so do heads alone",
    )

    bottleneck: AxisSize = 64
    """Hidden units of an adapter."""
    sparse: AxisSize = 4
    """Sparse adapters that one is split into; 1: an ordinary adapter."""
    shared: Literal["down", "none"] = "down"
    """down: all have the same dense matrix into the bottleneck; none: both matrices are split."""
    merge: Literal["mean", "union"] = "mean"
    """How they become one: the mean of all, or each entry as its owner has it."""
    adapter_scale: Positive = 0.1
    """What adapters' outputs are multiplied by."""
    dropout: Share = 0.1
    """Share of an adapter's hidden units that are set to 0 in training."""
    consistency: NotNegative = 1.0
    """Factor of the divergence of two passes; 0: there is only one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)

    idle_losses = balancing.nothing_chosen

    def halves(self, block: int, n: int) -> tuple[Half, Half]:
        """What attention and MLP of a block cost in one pass of n tokens, adapters merged."""
        first, dense = super().halves(block, n)
        return first, Half(dense.products + mlp(self.width, self.bottleneck, n))

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs) -> MoSA:
        """The model for `{task name: channels}` on images of `image_size` (height, width).

        Raises UserError where sizes do not go together.
        """
        return MoSA(self, tasks, image_size, rngs=rngs)


class MoSA(MultiTaskTrunk):
    """All tasks read the same tokens."""

    def __init__(
        self,
        config: MoSAConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, tasks, image_size, rngs=rngs)
        options: dict[str, Any] = {
            "shared": config.shared,
            "merge": config.merge,
            "scale": config.adapter_scale,
            "dropout": config.dropout,
            "dtype": self.dtype,
        }
        sizes = (config.width, config.bottleneck, config.sparse)
        self.adapters: Any = nnx.List(
            [SparseAdapters(*sizes, rngs=rngs, **options) for _ in range(config.depth)]
        )
        self.options = config
        freeze(self, trained=TRAINED)

    def agreement(self, divergence: Divergence, first: Array, second: Array) -> Array:
        """Two passes with other experts give the same."""
        return self.options.consistency * AGREE(divergence, first, second)

    def encode(self, image_BHWC: Array, key: Array | None) -> Array:
        """Tokens behind all blocks; a key draws the experts."""

        def step(block: Block, i: int, x_BTD: Array, key: Array | None) -> tuple[Array, dict]:
            # Numbers that a block's own uses of the key, 0 to 3, leave.
            draw, depth = (None if key is None else jax.random.fold_in(key, n) for n in (4, 2))
            x_BTD = block.attend(x_BTD, NO_TASK, key).x_BTD
            seen_BTD = block.norm2(x_BTD)
            fed_BTD = drop_path(block.mlp(seen_BTD), block.drop_path, depth)
            adapter: Any = self.adapters[i]
            adapted_BTD = adapter(seen_BTD) if draw is None else adapter(seen_BTD, draw)
            return x_BTD + fed_BTD + adapted_BTD, {}

        return self.run(self.embed(image_BHWC), key, step=step)

    def __call__(
        self,
        image_BHWC: Array,
        *,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """Predict `tasks` (all by default) for float32 images; `key` acts in training only."""
        names, key = self.wanted(tasks), key if train else None
        x_BTD = self.encode(image_BHWC, key)
        output = self.decode({task: x_BTD for task in names}, image_BHWC, train, {})
        if key is None or not self.options.consistency:
            return output
        again_BTD = self.encode(image_BHWC, jax.random.fold_in(key, self.config.depth))
        again = self.decode({task: again_BTD for task in names}, image_BHWC, train, {}).predictions
        return output._replace(
            compared={task: (own, again[task]) for task, own in output.predictions.items()}
        )
