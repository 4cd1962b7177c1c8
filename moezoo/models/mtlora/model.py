"""MTLoRA: a frozen transformer with LoRAs that tasks share, and LoRAs of each task's own.

Agiza, Neseem, Reda: "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning",
CVPR 2024, arXiv:2403.20320. Every linear layer of a Swin transformer gets a LoRA that all tasks
share; in the last block of each stage the projection of attention and both layers of the MLP get
one of every task besides, so that each task's decoder reads maps of its own of every stage, while
the shared features alone go on to the next stage. Norms and decoders train, the rest is frozen.

What the paper claims, as far as could be read (summaries by others): on PASCAL-Context with Swin-T
a mean gain over single tasks of 2.55 % with 8.34 M trained parameters (ranks 64 and 4), of 2.23 %
where all 30.06 M are trained, a loss of 2.17 % with plain LoRA. Not verified.

Where we differ from the published code: there a task's features pass through LoRAs only, the
frozen layers read the shared ones (`reference_quirks` "shared_base"; cheaper by two products for
every task and stage); here a task's features pass through the frozen layers of its block. The
code's dropout of 0.05 in front of LoRAs is left out, and it has no merging, which here is exact:
a task's path has one matrix for each frozen one, two where shared and own features part.

`MTLoRAViTConfig` is ours: the same on a vision transformer, one stage with one last block.
What we ran, and what came out: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
from flax import nnx
from jax import Array

from moezoo.backbones.swin import SwinBlock
from moezoo.backbones.vit import Block
from moezoo.fields import AxisSize, Positive, check
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.macs import Macs
from moezoo.models.shared.multitask import (
    MultiTaskConfig,
    MultiTaskOutput,
    MultiTaskTrunk,
    wanted,
)
from moezoo.models.swin_dense.model import SwinDense, SwinDenseConfig
from moezoo.nn.embed import grid_of
from moezoo.nn.injection import freeze
from moezoo.nn.layers import Linear, drop_path
from moezoo.nn.lowrank import LowRank
from moezoo.nn.task_lowrank import MODES, SharedLinear, Streams, TaskLinear

TRAINED = ("heads/*", "*norm*", "tam/*")
OWN_LAYERS = (("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2"))
SHARED_LAYERS = (("attn", "qkv"),)


@dataclass(frozen=True)
class TaskLoRAConfig:
    """The LoRAs; the defaults are those of the paper's larger model."""

    shared_ranks: AxisSize = 64
    """Rank of the LoRAs that all tasks share."""
    task_ranks: AxisSize = 4
    """Rank of a task's own LoRAs."""
    shared_scale: Positive = 4.0
    """What shared LoRAs are multiplied by, whatever their rank."""
    task_scale: Positive = 4.0
    """What a task's own are multiplied by."""
    mode: Literal["matrix", "matrixv2", "addition", "lora_only"] = "matrix"
    """How streams are made (`nn.task_lowrank`); lora_only: nothing is a task's own but its head."""
    merging: Literal["frozen", "adapted"] = "frozen"
    """Whether the layers between the stages of a Swin get a shared LoRA, as in "MTLoRA+"."""
    reference_quirks: tuple[Literal["shared_base"], ...] = ()
    """Accidents of the published code to repeat."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def has_streams(self) -> bool:
        """Whether tasks have features of their own."""
        return MODES[self.mode].of_task is not None

    @property
    def base_reads(self) -> str:
        """Whose features the frozen layers read in a task's stream."""
        return "shared" if "shared_base" in self.reference_quirks else "own"

    def needed(self, every: Sequence[str], names: Sequence[str]) -> Sequence[str]:
        """The tasks whose streams are computed for `names`: all where the shared one is a sum."""
        return every if MODES[self.mode].shared == "sum" else names

    def low_rank(self, base: Linear, ranks: int, scale: float, rngs: nnx.Rngs) -> LowRank:
        """A fresh LoRA of a layer."""
        inputs, outputs = base.kernel.get_value().shape
        return LowRank(inputs, outputs, ranks, scale=scale, dtype=base.dtype, rngs=rngs)

    def shared(self, base: Linear, rngs: nnx.Rngs) -> SharedLinear:
        """The layer with a shared LoRA."""
        return SharedLinear(base, self.low_rank(base, self.shared_ranks, self.shared_scale, rngs))

    def of_tasks(
        self, base: Linear, tasks: Sequence[str], read: bool, rngs: nnx.Rngs
    ) -> TaskLinear:
        """The layer with a LoRA of each task, and a shared one where its stream is `read`."""
        summed = MODES[self.mode].shared == "sum"
        shared = None if summed or not read else self.shared(base, rngs).shared
        own = {t: self.low_rank(base, self.task_ranks, self.task_scale, rngs) for t in tasks}
        return TaskLinear(base, shared, own, mode=self.mode, base_reads=self.base_reads)

    @property
    def unread(self) -> tuple[str, ...]:
        """Layers of the last block of all whose shared LoRA nobody reads, and nothing teaches.

        The published code has them all the same.
        """
        if self.mode != "matrix":
            return ()
        return ("proj", "fc1", "fc2") if self.base_reads == "own" else ("fc2",)

    def adapt(
        self, block: Any, tasks: Sequence[str], rngs: nnx.Rngs, unread: Sequence[str] = ()
    ) -> None:
        """Put the LoRAs into a block; `tasks` have their own there.

        unread: layers without a shared one.
        """
        for half, name in SHARED_LAYERS + OWN_LAYERS:
            layer = getattr(block, half)
            base = getattr(layer, name)
            own = tasks and (half, name) in OWN_LAYERS
            read = name not in unread
            made = self.of_tasks(base, tasks, read, rngs) if own else self.shared(base, rngs)
            setattr(layer, name, made)

    def block_macs(self, d: int, hidden: int, n: int, tasks: int) -> int:
        """What the LoRAs of a block add for n tokens, with streams of so many tasks."""
        own = (2 * d) + 2 * (d + hidden)  # inputs and outputs of the layers of `OWN_LAYERS`
        summed = tasks and MODES[self.mode].shared == "sum"
        total = self.shared_ranks * (4 * d + (0 if summed else own)) + tasks * self.task_ranks * own
        if tasks and self.base_reads == "own":
            # Both layers of the MLP once more for every task; attention's projection is shared.
            total += tasks * 2 * d * hidden
            if self.mode == "matrixv2":
                total += tasks * self.shared_ranks * 2 * (d + hidden)
        return n * total

    def unread_macs(self, d: int, hidden: int, n: int) -> int:
        """What nobody reads of the shared stream's last block, as heads read the tasks' streams."""
        ranks = 0 if MODES[self.mode].shared == "sum" else self.shared_ranks
        if not self.has_streams:
            return 0
        if self.base_reads == "own":
            # The first layer's LoRA is part of the tasks' streams where the mode adds it.
            first = 0 if self.mode == "matrixv2" else ranks * 2 * d
            return n * (2 * d * hidden + ranks * 2 * (d + hidden) + first)
        return n * ranks * (d + hidden) if self.mode == "matrix" else 0


@dataclass(frozen=True)
class MTLoRAConfig(SwinDenseConfig):
    """MTLoRA on a Swin transformer; the defaults are Swin-T with the larger ranks."""

    card: ClassVar[Card] = Card(
        title="MTLoRA",
        paper="Agiza et al., CVPR 2024, arXiv:2403.20320",
        kind="LoRAs on a frozen Swin: shared ones everywhere, each task's own at the end of stages",
        parity="the published code's linear layer: four modes",
        fixtures=("mtlora",),
        trained=("rooms/mtlora_tiny",),
        headline="parts mIoU 0.159, saliency maxF 0.438 on rooms from a small Swin, one seed",
    )

    lora: TaskLoRAConfig = TaskLoRAConfig()

    def macs(self, size: tuple[int, int], tasks: Mapping[str, int]) -> Macs:
        """One image, all `tasks` predicted in one call, LoRAs not merged."""
        dense, grids, windows = super().macs(size, tasks), self.grids(size), self.windows(size)
        total = dense.encoder
        for stage, (grid, window) in enumerate(zip(grids, windows, strict=True)):
            d, hidden, n = self.width_of(stage), self.hidden_of(stage), grid[0] * grid[1]
            beyond = (grid[0] + -grid[0] % window) * (grid[1] + -grid[1] % window) - n
            total += self.depths[stage] * beyond * self.lora.shared_ranks * 4 * d  # qkv
            streams = len(tasks) if self.lora.has_streams else 0
            plain = self.lora.block_macs(d, hidden, n, 0)
            total += (self.depths[stage] - 1) * plain
            total += self.lora.block_macs(d, hidden, n, streams)
            if stage and self.lora.merging == "adapted":
                total += n * self.lora.shared_ranks * 3 * d  # 2 d inputs, d outputs
        total -= self.lora.unread_macs(d, hidden, n)  # of the last stage
        return Macs(total, dense.routers, dense.heads)

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> MTLoRA:
        """The model for `{task name: channels}` on images of `image_size` (height, width).

        Raises UserError where sizes do not go together.
        """
        return MTLoRA(self, tasks, image_size, rngs=rngs)


@dataclass(frozen=True)
class MTLoRAViTConfig(MultiTaskConfig):
    """The same LoRAs on a vision transformer, whose last block has each task's own."""

    card: ClassVar[Card] = Card(
        title="MTLoRA on a ViT",
        paper="after Agiza et al., CVPR 2024, arXiv:2403.20320",
        kind="the LoRAs of MTLoRA on a plain vision transformer: one stage",
        parity="none of its own: its layers are MTLoRA's",
        trained=("rooms/mtlora_vit_tiny",),
        headline="parts mIoU 0.196, saliency maxF 0.529 on rooms, one seed; heads alone 0.522",
    )

    lora: TaskLoRAConfig = TaskLoRAConfig()

    idle_losses = balancing.nothing_chosen

    def macs(self, size: tuple[int, int], tasks: Mapping[str, int]) -> Macs:
        """One image, all `tasks` predicted in one call, LoRAs not merged."""
        dense, n = super().macs(size, tasks), self.seen(grid_of(size, self.patch))
        plain = self.lora.block_macs(self.width, self.mlp_hidden, n, 0)
        streams = len(tasks) if self.lora.has_streams else 0
        last = self.lora.block_macs(self.width, self.mlp_hidden, n, streams)
        last -= self.lora.unread_macs(self.width, self.mlp_hidden, n)
        return dense._replace(encoder=dense.encoder + (self.depth - 1) * plain + last)

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> MTLoRAViT:
        """The model for `{task name: channels}` on images of `image_size` (height, width).

        Raises UserError where sizes do not go together.
        """
        return MTLoRAViT(self, tasks, image_size, rngs=rngs)


# Attention in front of its last layer, of the normalised tokens or map.
MixedHeads = Callable[[Array], Array]


def last_block(
    block: Any, x: Array, mixed: MixedHeads, names: Sequence[str], key: Array | None
) -> Streams:
    """A block whose tasks part behind attention: the shared stream, and those of `names`.

    key: for stochastic depth, which drops the same examples from all streams.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    seen = block.attn.proj.streams(mixed(block.norm1(x)), {}, names)
    shared = x + drop_path(seen.shared, block.drop_path, keys[0])
    own = {t: x + drop_path(y, block.drop_path, keys[0]) for t, y in seen.tasks.items()}
    normed = {t: block.norm2(y) for t, y in own.items()}
    hidden = block.mlp.fc1.streams(block.norm2(shared), normed, names)
    active = {t: block.mlp.activation(y) for t, y in hidden.tasks.items()}
    fed = block.mlp.fc2.streams(block.mlp.activation(hidden.shared), active, names)
    shared = shared + drop_path(fed.shared, block.drop_path, keys[1])
    tasks = {t: own[t] + drop_path(y, block.drop_path, keys[1]) for t, y in fed.tasks.items()}
    return Streams(shared, tasks)


class MTLoRA(SwinDense):
    """A frozen Swin whose stages end in blocks with a stream for every task."""

    def __init__(
        self,
        config: MTLoRAConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, tasks, image_size, rngs=rngs)
        self.lora = config.lora
        for level, stage in enumerate(self.stages):
            for i, block in enumerate(stage.blocks):
                last = i == len(stage.blocks) - 1 and config.lora.has_streams
                unread = config.lora.unread if level == len(self.stages) - 1 else ()
                config.lora.adapt(block, self.tasks if last else (), rngs, unread)
            if stage.merge is not None and config.lora.merging == "adapted":
                stage.merge.reduction = config.lora.shared(stage.merge.reduction, rngs)
        freeze(self, trained=TRAINED)

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
        own: dict[str, list[Array]] = {name: [] for name in names}

        def step(block: SwinBlock, stage: int, i: int, x: Array, key: Array | None) -> Array:
            if not self.lora.has_streams or i < len(self.stages[stage].blocks) - 1:
                return block(x, key)

            def mixed(x: Array) -> Array:
                return block.in_windows(x, block.attn.mixed)

            x, streams = last_block(block, x, mixed, self.lora.needed(self.tasks, names), key)
            for name in names:
                own[name].append(streams[name])
            return x

        shared = self.levels(image_BHWC, key if train else None, step)
        if self.lora.has_streams:
            maps = {name: [*found[:-1], self.norm(found[-1])] for name, found in own.items()}
        else:
            maps = {name: shared for name in names}
        return self.predicted(maps, image_BHWC, train)


class MTLoRAViT(MultiTaskTrunk):
    """A frozen vision transformer whose last block has a stream for every task."""

    def __init__(
        self,
        config: MTLoRAViTConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, tasks, image_size, rngs=rngs)
        self.lora = config.lora
        for i, block in enumerate(self.blocks):
            last = i == config.depth - 1 and config.lora.has_streams
            config.lora.adapt(block, self.tasks if last else (), rngs, config.lora.unread)
        freeze(self, trained=TRAINED)

    def __call__(
        self,
        image_BHWC: Array,
        *,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """Predict `tasks` (all by default) for float32 images; `key` only for stochastic depth."""
        names = self.wanted(tasks)
        own: dict[str, Array] = {}

        def step(block: Block, i: int, x_BTD: Array, key: Array | None) -> tuple[Array, dict]:
            if not self.lora.has_streams or i < len(self.blocks) - 1:
                return block(x_BTD, key=key).x_BTD, {}
            needed = self.lora.needed(self.tasks, names)
            x_BTD, streams = last_block(block, x_BTD, block.attn.mixed, needed, key)
            own.update(streams)
            return x_BTD, {}

        x_BTD = self.run(self.embed(image_BHWC), key if train else None, step=step)
        rows = x_BTD.shape[1]  # registers, which come last, are cut off
        tokens = {name: own[name][:, :rows] if own else x_BTD for name in names}
        return self.decode(tokens, image_BHWC, train, {})
