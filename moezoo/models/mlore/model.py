"""MLoRE: mixtures of low-rank experts in a decoder for dense multi-task prediction.

Yang, Jiang, Hou, Zhang, Chen, Li: "Multi-Task Dense Prediction via Mixture of Low-Rank Experts",
CVPR 2024, arXiv:2403.17749. At each of four levels of a vision transformer two blocks follow each
other per task: 15 experts, 3x3 convolutions of ranks 16 to 128 that all tasks share, of which a
router per task takes 9 per image; a low-rank convolution of the task's own, weighted by the router;
and one full 3x3 convolution that all tasks share and that takes no gradient back to its input. The
levels are then mixed place by place.

What the paper claims, public code: PASCAL-Context with ViT-L: mIoU 81.41, parts 70.52, saliency
maxF 84.90, normals 13.51 degrees, odsF 75.42; NYUD-v2: 55.96, RMSE 0.5076, 18.33, 78.43. Its ViT-L
numbers of parameters, 407.69 M and 551.63 M, are those of this file (tests).

The published code is followed. It differs between its two data sets: for PASCAL-Context the softmax
comes before the choice and is not renormalised, for NYUD-v2 after it. The experts of a mixture
could be merged into one kernel per task and image for inference; here they run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moezoo.errors import UserError
from moezoo.fields import AxisSize, Range
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.multilevel import MultiLevelConfig, MultiLevelTrunk, task_record
from moezoo.models.shared.multitask import MultiTaskOutput, wanted
from moezoo.nn.context import NO_TASK
from moezoo.nn.conv import BatchNorm, Conv, ConvNorm
from moezoo.nn.layers import gelu
from moezoo.nn.maps import (
    GridRouter,
    LowRankConv,
    MapExperts,
    in_turn,
    joined,
    map_experts,
    mixture,
)
from moezoo.nn.moe import Record
from moezoo.nn.surgery import MixtureSize
from moezoo.ops import balance
from moezoo.ops.routing import SELECTIONS, Routing
from moezoo.ops.selection import check_learns

PASCAL_RANKS = tuple(range(16, 129, 8))
NYUD_RANKS = tuple(range(16, 241, 16))
OWN_LOSSES = {"importance": balance.Together(balance.importance_loss)}


@dataclass(frozen=True)
class MLoREConfig(MultiLevelConfig):
    """MLoRE; `MLoREConfig.large()` is the ViT-L model for PASCAL-Context."""

    card: ClassVar[Card] = Card(
        title="MLoRE",
        paper="Yang et al., CVPR 2024, arXiv:2403.17749",
        kind="low-rank convolutions in a decoder, nine of fifteen per image and task",
        parity="the published code: routing exact",
        fixtures=("taskexpert",),
        trained=("rooms/mlore_tiny",),
        headline="-2.8 % ± 0.5 % (Delta_m) against dense on rooms",
    )

    decoder_width: Annotated[int, Range(4, 2**16)] = 452
    """Channels of the decoder."""
    ranks: tuple[AxisSize, ...] = PASCAL_RANKS
    """The rank of each shared expert."""
    task_rank: AxisSize = 72
    """The rank of a task's own expert."""
    top_k: AxisSize = 9
    """Shared experts that an image of a task gets."""
    selection: Literal["softmax_then_top_k", "top_k_then_softmax"] = "softmax_then_top_k"
    """How weights come from logits: as for PASCAL-Context, or as for NYUD-v2, which needs a top_k
    from 2 on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ranks:
            raise UserError("ranks is empty; name the rank of every shared expert.")
        if not 1 <= self.top_k <= len(self.ranks):
            raise UserError(
                f"top_k is {self.top_k}; it must be between 1 and the number of ranks, "
                f"{len(self.ranks)}."
            )
        said = f"top_k is {self.top_k}, ranks {self.ranks} and selection {self.selection}"
        check_learns(SELECTIONS[self.selection], self.top_k, len(self.ranks), said)

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that this model does not have (`balancing`)."""
        return balancing.all_but(OWN_LOSSES, "MLoRE")

    def decoder_macs(self, places: int, tasks: int) -> tuple[int, int]:
        """(products, routers) of the decoder without heads, for `places` of the grid."""
        d, quarter = self.decoder_width, self.decoder_width // 4
        # 3x3 down and 1x1 up for every rank, whether an image takes its expert or not: all run.
        low_rank = 10 * d * (sum(self.ranks) + self.task_rank)
        block = tasks * (11 * d * d + low_rank)
        mixing = tasks * (self.levels * d * d + 9 * d * self.levels)
        router = places * quarter * (d + quarter) + places * d + quarter * d
        router += 2 * quarter * (2 * len(self.ranks) + 1)
        levels = self.levels * (self.width * d + 2 * block)
        return places * (levels + mixing), 2 * self.levels * tasks * router

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs) -> MLoRE:
        """The model for `{task name: channels}` on images of `image_size` (height, width).

        Its routers know the number of patches: other image sizes need another model. Raises
        UserError where sizes do not go together.
        """
        return MLoRE(self, tasks, image_size, rngs=rngs)


class DecodedMaps(NamedTuple):
    """A block's maps [B, h, w, D] by task, and its decision: row b * J + j for image b, task j."""

    maps: dict[str, Array]
    routing: Routing


class TaskPart(nnx.Module):
    """What one task has of its own in a block."""

    def __init__(self, config: MLoREConfig, places: int, dtype: Any, rngs: nnx.Rngs):
        width = config.decoder_width
        sizes = (width, places, len(config.ranks), config.top_k)
        self.enter = Conv(width, width, 1, dtype=dtype, rngs=rngs)
        self.router = GridRouter(*sizes, select=SELECTIONS[config.selection], rngs=rngs)
        self.own = LowRankConv(width, config.task_rank, dtype=dtype, rngs=rngs)
        self.norm_mixture, self.norm = BatchNorm(width), BatchNorm(width)
        self.leave = Conv(width, width, 1, dtype=dtype, rngs=rngs)

    def finish(
        self, mixed_BHWD: Array, shared_BHWD: Array, y_BHWD: Array, mix_B: Array, train: bool
    ) -> Array:
        """What leaves the block, from the shared experts' mixture and the shared convolution."""
        # `mix_B` is bounded by nothing, as published: it is no share.
        total = self.norm_mixture(mixed_BHWD, train) + self.own(y_BHWD) * mix_B + shared_BHWD
        return self.leave(gelu(self.norm(total, train)))


class MLoREBlock(nnx.Module):
    """Shared low-rank experts and a shared convolution, and every task's own part."""

    def __init__(
        self, config: MLoREConfig, tasks: tuple[str, ...], places: int, dtype: Any, rngs: nnx.Rngs
    ):
        width = config.decoder_width

        def make(index: int, rngs: nnx.Rngs) -> nnx.Module:
            return LowRankConv(width, config.ranks[index], dtype=dtype, rngs=rngs)

        self.experts: MapExperts = map_experts(len(config.ranks), make, rngs)
        self.shared = Conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.tasks = nnx.Dict({task: TaskPart(config, places, dtype, rngs) for task in tasks})
        self.mixture_size = MixtureSize(GridRouter.decision, self.experts.count, config.top_k)

    def __call__(self, maps: Mapping[str, Array], key: Array | None, train: bool) -> DecodedMaps:
        """Every task's map [B, h, w, D] through the block; `key` draws the routers' noise."""
        entered = {task: self.tasks[task].enter(x_BHWD) for task, x_BHWD in maps.items()}
        decided = {}
        for number, (task, y_BHWD) in enumerate(entered.items()):
            task_key = None if key is None else jax.random.fold_in(key, number)
            decided[task] = self.tasks[task].router(y_BHWD, NO_TASK, task_key)
        # What tasks share runs once, on rows of all of them.
        every = in_turn(list(entered.values()))
        routing = joined([one.routing for one in decided.values()])
        mixed = mixture(self.experts(every, train), routing)
        # As published: this convolution learns from the tasks and sends nothing back into them.
        shared = self.shared(lax.stop_gradient(every))
        out = {}
        for number, (task, y_BHWD) in enumerate(entered.items()):
            rows = slice(number, None, len(entered))
            mix_B = decided[task].mix_B[:, None, None, None].astype(y_BHWD.dtype)
            out[task] = self.tasks[task].finish(mixed[rows], shared[rows], y_BHWD, mix_B, train)
        return DecodedMaps(out, routing)


class LevelMixture(nnx.Module):
    """The levels of one task mixed place by place, by a softmax over what they say together."""

    def __init__(self, width: int, levels: int, *, dtype: Any, rngs: nnx.Rngs):
        self.look = ConvNorm(levels * width, width, 1, dtype=dtype, rngs=rngs)
        self.out = Conv(width, levels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, levels: list[Array], train: bool) -> Array:
        seen = gelu(self.look(jnp.concatenate(levels, axis=-1), train))
        share_BHWL = jax.nn.softmax(self.out(seen).astype(jnp.float32), axis=-1)
        mixed = sum(share_BHWL[..., i, None] * x for i, x in enumerate(levels))
        return jnp.asarray(mixed).astype(levels[0].dtype)


class MLoRE(MultiLevelTrunk):
    """One pass of the trunk; two blocks per level, which mix the tasks' own features."""

    config: MLoREConfig

    def __init__(
        self,
        config: MLoREConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, tasks, image_size, rngs=rngs)
        width, dtype, levels = config.decoder_width, self.dtype, range(config.levels)
        places = self.grid[0] * self.grid[1]
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}

        def block() -> MLoREBlock:
            return MLoREBlock(config, self.tasks, places, dtype, rngs)

        self.fuse = nnx.List(Conv(config.width, width, 1, **options) for _ in levels)
        self.first, self.second = (nnx.List(block() for _ in levels) for _ in range(2))
        self.mix = nnx.Dict({task: LevelMixture(width, config.levels, **options) for task in tasks})

    @property
    def balance_losses(self) -> Mapping[str, Callable[[Routing], Array]]:
        """The published loss: how unevenly all tasks together weigh the experts of a block."""
        return OWN_LOSSES

    def __call__(
        self,
        image_BHWC: Array,
        *,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """Predict `tasks` (all by default) for images, float32.

        `key` is for router noise and stochastic depth and acts in training only. Raises UserError
        for images of another grid than the model's.
        """
        names, key = wanted(self.tasks, tasks), key if train else None
        maps, records = self.decode(self.levels(image_BHWC, key), names, key, train)
        return MultiTaskOutput(self.predict(maps, image_BHWC, train), {}, records)

    def decode(
        self, levels: list[Array], names: tuple[str, ...], key: Array | None, train: bool
    ) -> tuple[dict[str, Array], dict[str, Record]]:
        """The tasks' mixed maps [B, h, w, decoder_width] from maps [B, h, w, D]."""
        maps: dict[str, list[Array]] = {task: [] for task in names}
        records: dict[str, Record] = {}
        for level, x_BHWC in enumerate(levels):
            self._check_grid(x_BHWC)
            x_BHWD = self.fuse[level](x_BHWC)
            y: dict[str, Array] = {task: x_BHWD for task in names}
            for name, blocks in (("first", self.first), ("second", self.second)):
                # Behind the numbers that the trunk's blocks fold into the same key.
                number = len(self.blocks) + 2 * level + (name == "second")
                block_key = None if key is None else jax.random.fold_in(key, number)
                y, routing = blocks[level](y, block_key, train)
                records[f"{name}/{level}"] = task_record(routing, self.tasks, names)
            for task, y_BHWD in y.items():
                maps[task].append(y_BHWD)
        return {task: self.mix[task](found, train) for task, found in maps.items()}, records

    def _check_grid(self, x_BHWC: Array) -> None:
        if x_BHWC.shape[1:3] != self.grid:
            patch = self.config.patch
            raise UserError(
                f"This MLoRE reads images of {self.grid[0] * patch}x{self.grid[1] * patch} pixels "
                "only: its routers weigh every patch."
            )
