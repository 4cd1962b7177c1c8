"""A dense multi-task Swin transformer: one shared pass, one HRNet-style head per task.

The base of MTLoRA (arXiv:2403.20320), which freezes it and adapts it by LoRAs that tasks share and
LoRAs of their own; here everything is trained and nothing is added. Swin (arXiv:2103.14030) gives a
map behind each of its stages, the head of HRNetV2 (arXiv:1908.07919, section 3.2) reads all of them
side by side on the finest grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jax import Array

from moezoo.backbones.swin import SwinConfig, SwinTrunk
from moezoo.fields import AxisSize
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.config import ModelTraits
from moezoo.models.shared.macs import Macs, mlp
from moezoo.models.shared.multitask import MultiTaskOutput, check_tasks, wanted
from moezoo.nn.heads import PyramidHead


@dataclass(frozen=True)
class SwinDenseConfig(SwinConfig, ModelTraits):
    """A Swin transformer with one head over all of its stages per task."""

    head_channels: AxisSize = 18
    """Channels that a head keeps of the first stage; twice as many of each further one."""

    card: ClassVar[Card] = Card(
        title="dense multi-task Swin",
        paper="",
        kind="no experts: shifted windows on four levels, the base of MTLoRA",
        parity="none of its own: its trunk equals transformers'",
        trained=("rooms/swin_dense_tiny",),
        headline="mIoU 0.315 on rooms, one seed; the dense ViT 0.409",
    )
    begins_with: ClassVar[str] = "swin"

    idle_losses = balancing.nothing_chosen

    @property
    def kept_channels(self) -> tuple[int, ...]:
        """Channels that a head keeps of each stage."""
        return tuple(self.head_channels * 2**stage for stage in range(len(self.depths)))

    def macs(self, size: tuple[int, int], tasks: Mapping[str, int]) -> Macs:
        """One image, all `tasks` predicted in one call; places that fill up windows count."""
        grids, windows = self.grids(size), self.windows(size)
        places = grids[0][0] * grids[0][1]
        encoder = 3 * self.patch**2 * self.width * places
        for stage, (grid, window) in enumerate(zip(grids, windows, strict=True)):
            d, n = self.width_of(stage), grid[0] * grid[1]
            seen = (grid[0] + -grid[0] % window) * (grid[1] + -grid[1] % window)
            attended = 4 * d * d * seen + 2 * window * window * d * seen
            encoder += self.depths[stage] * (attended + mlp(d, self.hidden_of(stage), n))
            encoder += 2 * d * d * n if stage else 0  # merging: 4 (d / 2) inputs, d outputs
        all_channels = sum(self.kept_channels)
        heads = 0
        for channels in tasks.values():
            for stage, kept in enumerate(self.kept_channels):
                heads += grids[stage][0] * grids[stage][1] * self.width_of(stage) * kept
            heads += places * all_channels * (all_channels + channels)
        return Macs(encoder, 0, heads)

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> SwinDense:
        """The model for `{task name: channels}` on images of `image_size` (height, width).

        Raises UserError where sizes do not go together.
        """
        return SwinDense(self, tasks, image_size, rngs=rngs)


class SwinDense(SwinTrunk):
    """All tasks read the same maps."""

    def __init__(
        self,
        config: SwinDenseConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        check_tasks(tasks)
        super().__init__(config, image_size, rngs=rngs)
        self.tasks = tuple(tasks)
        widths = tuple(config.width_of(stage) for stage in range(len(config.depths)))
        sizes = (widths, config.kept_channels)
        self.heads = nnx.Dict(
            {task: PyramidHead(*sizes, n, dtype=self.dtype, rngs=rngs) for task, n in tasks.items()}
        )

    def __call__(
        self,
        image_BHWC: Array,
        *,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """Predict `tasks` (all by default) for float32 images; `key` only for stochastic depth."""
        names = wanted(self.tasks, tasks)
        maps = self.levels(image_BHWC, key if train else None)
        return self.predicted({task: maps for task in names}, image_BHWC, train)

    def predicted(
        self, maps: Mapping[str, Sequence[Array]], image_BHWC: Array, train: bool
    ) -> MultiTaskOutput:
        """What each task's head makes of its maps of all levels."""
        size = (image_BHWC.shape[1], image_BHWC.shape[2])
        heads = {task: self.heads[task](own, size, train) for task, own in maps.items()}
        return MultiTaskOutput(heads, {}, {})
