"""The baseline of every MoE model here: a dense multi-task vision transformer.

One shared pass, one head per task. With mlp_ratio 4 a block costs what an MoE block of the same
width with K experts of hidden width 4 D / K costs, the router apart: equal active FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array

from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.multitask import MultiTaskConfig, MultiTaskOutput, MultiTaskTrunk


@dataclass(frozen=True)
class ViTDenseConfig(MultiTaskConfig):
    """A dense multi-task vision transformer."""

    card: ClassVar[Card] = Card(
        title="dense multi-task ViT",
        paper="",
        kind="no experts: the baseline of equal active FLOPs",
        parity="none of its own: M3ViT without experts",
        trained=("rooms/vit_dense_tiny",),
        headline="mIoU 0.409 ± 0.002 on rooms",
    )

    idle_losses = balancing.nothing_chosen

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> ViTDense:
        """The model for `{task name: channels}` on images of `image_size` (height, width).

        Raises UserError where sizes do not go together.
        """
        return ViTDense(self, tasks, image_size, rngs=rngs)


class ViTDense(MultiTaskTrunk):
    """All tasks read the same tokens."""

    def __call__(
        self,
        image_BHWC: Array,
        *,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """Predict `tasks` (all by default) for float32 images; `key` only for stochastic depth."""
        x_BTD = self.run(self.embed(image_BHWC), key if train else None)
        tokens = {task: x_BTD for task in self.wanted(tasks)}
        return self.decode(tokens, image_BHWC, train, {})
