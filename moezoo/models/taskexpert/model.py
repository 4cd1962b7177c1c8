"""Our Memorial-MoE: a reconstruction of TaskExpert from what is published of it.

Ye, Xu: "TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial
Mixture-of-Experts", ICCV 2023, arXiv:2307.15324. Its code was never released. Known from the
abstract and a figure: experts decompose a backbone level into features that all tasks share; a
router per task and sample assembles each task's feature from them; a memory of each task is updated
at every level, is one more expert of the assembly, and is what the heads finally read. Not known,
and chosen here (each choice a field of the configuration): the experts' layers, where routers look,
how the memory is read, written and started, and all sizes, which meet the 420 M parameters that
later papers give for it.

What the paper claims (recalled from other papers' tables, not verified): PASCAL-Context with
ViT-L: mIoU 80.64, parts 69.42, saliency maxF 84.87, normals 13.56 degrees, odsF 73.30; NYUD-v2:
mIoU 55.35, RMSE 0.5157, normals 18.54, odsF 78.40. Nothing here reproduces those numbers; results
of this file are results of our Memorial-MoE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.fields import AxisSize, Range
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.multilevel import MultiLevelConfig, MultiLevelTrunk, task_record
from moezoo.models.shared.multitask import MultiTaskOutput, wanted
from moezoo.nn.context import NO_TASK
from moezoo.nn.conv import Conv, ConvNorm
from moezoo.nn.layers import gelu
from moezoo.nn.maps import (
    ConstantRouter,
    ConvExpert,
    MapExperts,
    MLPRouter,
    joined,
    map_experts,
    mixture,
    placed,
    pooled,
)
from moezoo.nn.moe import Record
from moezoo.nn.surgery import MixtureSize
from moezoo.ops.routing import Routing, softmax_then_top_k_renormalised
from moezoo.ops.selection import check_learns


@dataclass(frozen=True)
class TaskExpertConfig(MultiLevelConfig):
    """Memorial-MoE on a plain vision transformer; the defaults meet the paper's budget with ViT-L.

    `TaskExpertConfig.large()` is that model.
    """

    card: ClassVar[Card] = Card(
        title="Memorial-MoE (TaskExpert)",
        paper="Ye and Xu, ICCV 2023, arXiv:2307.15324",
        kind="shared experts on four levels, a router and a memory per task",
        parity="none: a reconstruction, the paper's code was never released",
        trained=("rooms/taskexpert_tiny",),
        headline="+0.9 % ± 0.5 % (Delta_m) against dense on rooms",
    )

    class_token: bool = True
    """Whether a class token, which no level reads, takes part in the blocks."""
    decoder_width: AxisSize = 448
    """Channels of experts, memories and heads."""
    experts: AxisSize = 6
    """Experts of a level, the memory not counted."""
    top_k: AxisSize | None = None
    """Experts, memory included, that a decision mixes, their weights adding up to 1, so that they
    are at least 2; None: all."""
    gate: Literal["image", "token", "static"] = "image"
    """What routers see: the mean of the map, each place by itself, or nothing."""
    gate_hidden: AxisSize = 256
    """Hidden units of a router."""
    memory: Literal["expert", "none"] = "expert"
    """Whether routers see the memory and mix it as one more expert, or features are only summed."""
    memory_init: Literal["learned", "zeros"] = "learned"
    """What a memory starts from: a learned vector that starts at 0, or 0."""
    memory_update: Literal["residual", "replace", "ema"] = "residual"
    """How a level writes: add, replace, or a moving average."""
    memory_decay: Annotated[float, Range(0, 1)] = 0.5
    """Share of the old memory in a moving average."""
    share_experts: bool = False
    """One set of experts for all levels instead of one per level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chosen <= self.mixed:
            raise UserError(
                f"top_k is {self.top_k}; it must be between 1 and {self.mixed}, the number of "
                "experts and the memory."
            )
        said = f"top_k is {self.chosen} of {self.mixed}, the experts and the memory"
        check_learns(softmax_then_top_k_renormalised, self.chosen, self.mixed, said)
        self._check_memory()

    def _check_memory(self) -> None:
        """UserError where nothing of a level reaches the heads."""
        old = {"residual": 1.0, "replace": 0.0, "ema": self.memory_decay}[self.memory_update]
        if self.memory_update == "ema" and old == 1.0:
            raise UserError(
                "memory_decay is 1 and memory_update ema, so nothing would ever be written to a "
                "memory, and nothing before the heads would learn: take a memory_decay below 1."
            )
        if old == 0.0 and self.memory == "none" and self.levels > 1:
            raise UserError(
                "memory is none and every level replaces what the levels before it have written "
                "(memory_update replace, or ema with memory_decay 0), so only the last level would "
                "learn: take memory_update residual, memory expert, or levels 1."
            )

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach these routers nothing, and why (`balancing`)."""
        load = balancing.none_of_them("its routers have no noise, so loads have no gradient")
        return {"load": load["load"]} | balancing.of_tasks(tasks)

    def decoder_macs(self, places: int, tasks: int) -> tuple[int, int]:
        """(products, routers) of the decoder without heads, for `places` of the grid."""
        d, reads = self.decoder_width, self.memory == "expert"
        # 1x1 from the trunk's width, 3x3, 1x1.
        experts = self.experts * (self.width * d + 10 * d * d)
        # Per task: 3x3 to write the memory, 1x1 to read it.
        own = 9 * d * d + (d * d if reads else 0)
        seen = self.width + (d if reads else 0)
        rows = {"image": 1, "token": places, "static": 0}[self.gate]
        router = rows * self.gate_hidden * (seen + self.mixed)
        return self.levels * places * (experts + tasks * own), self.levels * tasks * router

    @property
    def mixed(self) -> int:
        """What a decision chooses from: the experts and the memory."""
        return self.experts + (self.memory == "expert")

    @property
    def chosen(self) -> int:
        """How many of them a decision mixes."""
        return self.mixed if self.top_k is None else self.top_k

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> TaskExpert:
        """The model for `{task name: channels}` on images of `image_size` (height, width).

        Raises UserError where sizes do not go together.
        """
        return TaskExpert(self, tasks, image_size, rngs=rngs)


class Assembly(NamedTuple):
    """What a level assembled for a task: the mixed map, its memory afterwards, the decision."""

    mixed_BHWD: Array
    memory_BHWD: Array
    routing: Routing


class TaskLevel(nnx.Module):
    """What one task has at one level: a router, a way to read its memory and one to write it."""

    def __init__(self, config: TaskExpertConfig, dtype: Any, rngs: nnx.Rngs):
        width = config.decoder_width
        reads = config.memory == "expert"
        self.router = GATES[config.gate](config, config.width + (width if reads else 0), rngs)
        self.read = Conv(width, width, 1, dtype=dtype, rngs=rngs) if reads else None
        self.write = ConvNorm(width, width, 3, dtype=dtype, rngs=rngs)
        self.rows = ROWS[config.gate]
        # The memory may be one of the experts.
        self.mixture_size = MixtureSize(DECISIONS[config.gate], config.mixed, config.chosen)
        self.update, self.decay = UPDATES[config.memory_update], config.memory_decay

    def __call__(
        self, x_BHWC: Array, maps: tuple[Array, ...], memory_BHWD: Array, train: bool
    ) -> Assembly:
        """Mix the experts' maps of the level's features and write the result to the memory."""
        seen_BHWC = x_BHWC
        if self.read is not None:
            seen_BHWC = jnp.concatenate([x_BHWC, memory_BHWD], axis=-1)
            maps = (*maps, self.read(memory_BHWD))
        routing = self.router(self.rows(seen_BHWC), NO_TASK)
        mixed_BHWD = mixture(maps, routing)
        new_BHWD = gelu(self.write(mixed_BHWD, train))
        return Assembly(mixed_BHWD, self.update(memory_BHWD, new_BHWD, self.decay), routing)


class TaskExpert(MultiLevelTrunk):
    """One pass of the trunk; every expert runs once per level, whatever the number of tasks."""

    config: TaskExpertConfig

    def __init__(
        self,
        config: TaskExpertConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, tasks, image_size, rngs=rngs)
        width = config.decoder_width

        def make(index: int, rngs: nnx.Rngs) -> nnx.Module:
            return ConvExpert(config.width, width, dtype=self.dtype, rngs=rngs)

        sets = 1 if config.share_experts else config.levels
        self.experts = nnx.List(map_experts(config.experts, make, rngs) for _ in range(sets))
        self.decoder = nnx.List(
            nnx.Dict({task: TaskLevel(config, self.dtype, rngs) for task in tasks})
            for _ in range(config.levels)
        )
        starts = config.memory == "expert" and config.memory_init == "learned"
        self.start = nnx.Dict(
            {task: nnx.Param(jnp.zeros((width,))) for task in tasks} if starts else {}
        )

    def __call__(
        self,
        image_BHWC: Array,
        *,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """Predict `tasks` (all by default) for images, float32; `key` only for stochastic depth."""
        names = wanted(self.tasks, tasks)
        levels = self.levels(image_BHWC, key if train else None)
        memory, records = self.decode(levels, names, train)
        return MultiTaskOutput(self.predict(memory, image_BHWC, train), {}, records)

    def decode(
        self, levels: list[Array], names: tuple[str, ...], train: bool
    ) -> tuple[dict[str, Array], dict[str, Record]]:
        """The tasks' final memories [B, h, w, decoder_width] from maps [B, h, w, D]."""
        memory = {task: self._first(task, levels[0]) for task in names}
        records: dict[str, Record] = {}
        for level, x_BHWC in enumerate(levels):
            features = self.assemble(level, x_BHWC, memory, train)
            memory = {task: feature.memory_BHWD for task, feature in features.items()}
            routing = joined([feature.routing for feature in features.values()])
            records[f"decoder/{level}"] = task_record(routing, self.tasks, names)
        return memory, records

    def assemble(
        self, level: int, x_BHWC: Array, memory: Mapping[str, Array], train: bool = False
    ) -> dict[str, Assembly]:
        """One level for the tasks that have a memory."""
        experts: MapExperts = self.experts[0 if self.config.share_experts else level]
        # Once for all tasks: only what follows is a task's own.
        maps = experts(x_BHWC, train)
        parts = self.decoder[level]
        return {task: parts[task](x_BHWC, maps, m, train) for task, m in memory.items()}

    def _first(self, task: str, like_BHWC: Array) -> Array:
        shape = (*like_BHWC.shape[:-1], self.config.decoder_width)
        if task not in self.start:
            return jnp.zeros(shape, self.dtype)
        return jnp.broadcast_to(self.start[task].get_value().astype(self.dtype), shape)


def _residual(old: Array, new: Array, decay: float) -> Array:
    return old + new


def _replace(old: Array, new: Array, decay: float) -> Array:
    return new


def _average(old: Array, new: Array, decay: float) -> Array:
    return decay * old + (1.0 - decay) * new


UPDATES: dict[str, Callable[[Array, Array, float], Array]] = {
    "residual": _residual,
    "replace": _replace,
    "ema": _average,
}


def _seeing(config: TaskExpertConfig, width: int, rngs: nnx.Rngs) -> nnx.Module:
    sizes = (width, config.gate_hidden, config.mixed, config.chosen)
    return MLPRouter(*sizes, select=softmax_then_top_k_renormalised, rngs=rngs)


def _constant(config: TaskExpertConfig, width: int, rngs: nnx.Rngs) -> nnx.Module:
    return ConstantRouter(config.mixed, config.chosen, select=softmax_then_top_k_renormalised)


GATES: dict[str, Callable[[TaskExpertConfig, int, nnx.Rngs], nnx.Module]] = {
    "image": _seeing,
    "token": _seeing,
    "static": _constant,
}
# As a path of one task has them: of its own routers, an image or a place decides, or nothing.
DECISIONS = {"image": "row", "token": "token", "static": "constant"}
# A constant router reads nothing of a row, only how many there are.
ROWS: dict[str, Callable[[Array], Array]] = {"image": pooled, "token": placed, "static": pooled}
