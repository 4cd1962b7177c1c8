"""What decoders on several levels of a vision transformer share: its multi-level features, heads.

The tokens behind evenly spread blocks, as maps, are the levels that a decoder reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.vit import Block, Trunk, ViTConfig
from moezoo.errors import UserError
from moezoo.fields import AxisSize, Depth
from moezoo.models.shared.config import ModelTraits
from moezoo.models.shared.macs import Macs, dense_trunk
from moezoo.models.shared.multitask import check_tasks
from moezoo.nn.embed import grid_of
from moezoo.nn.heads import ConvHead
from moezoo.nn.layers import LayerNorm, trunc_normal
from moezoo.nn.moe import Record
from moezoo.ops.routing import Routing


@dataclass(frozen=True)
class MultiLevelConfig(ViTConfig, ModelTraits):
    """A vision transformer whose tokens are read after several blocks."""

    levels: Depth = 4
    """Levels that the decoder reads, evenly spread over the blocks; the last one follows the final
    normalisation."""
    class_token: bool = False
    """Whether a class token, which no level reads, takes part in the blocks."""
    decoder_width: AxisSize = 384
    """Channels of the decoder."""

    renamed: ClassVar[Mapping[str, str]] = {"taps": "levels"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.levels <= self.depth:
            raise UserError(
                f"levels is {self.levels}; it must be between 1 and the depth, {self.depth}."
            )

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """The indices of the blocks that are read, ascending."""
        return tuple(self.depth * (i + 1) // self.levels - 1 for i in range(self.levels))

    def decoder_macs(self, places: int, tasks: int) -> tuple[int, int]:
        """(products, routers) of the decoder without heads, for `places` of the grid."""
        raise NotImplementedError

    def macs(self, size: tuple[int, int], tasks: Mapping[str, int]) -> Macs:
        """One image, all `tasks` predicted in one call; every expert runs, whatever the choice."""
        height, width = grid_of(size, self.patch)
        places, d = height * width, self.decoder_width
        tokens = self.seen((height, width), int(self.class_token))
        decoder, routers = self.decoder_macs(places, len(tasks))
        # Heads work on maps of four times the height and width.
        heads = sum(16 * places * (9 * d * d + d * channels) for channels in tasks.values())
        trunk = dense_trunk(self, places, tokens)
        return Macs(trunk + decoder, routers, heads)

    @classmethod
    def large(cls, **changes: Any):
        """ViT-large: width 1024, 24 blocks, 16 heads."""
        return replace(cls(width=1024, depth=24, heads=16), **changes)


class MultiLevelTrunk(Trunk):
    """A trunk read at several levels, and one `ConvHead` per task."""

    config: MultiLevelConfig

    def __init__(
        self,
        config: MultiLevelConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        check_tasks(tasks)
        token = trunc_normal if config.class_token else None
        super().__init__(config, image_size, class_token=token, rngs=rngs)
        self.norm, self.tasks = LayerNorm(config.width), tuple(tasks)
        width, dtype = config.decoder_width, self.dtype
        self.heads = nnx.Dict(
            {task: ConvHead(width, n, dtype=dtype, rngs=rngs) for task, n in tasks.items()}
        )

    def levels(self, image_BHWC: Array, key: Array | None) -> list[Array]:
        """The tokens of every level as maps [B, h, w, D]; `key` is for stochastic depth."""
        grid = grid_of((image_BHWC.shape[1], image_BHWC.shape[2]), self.config.patch)
        found: list[Array] = []

        def step(block: Block, i: int, x_BTD: Array, key: Array | None) -> tuple[Array, dict]:
            x_BTD = block(x_BTD, key=key).x_BTD
            if i in self.config.level_blocks:
                last = i == self.config.depth - 1
                # The last one alone, as in the code base that TaskExpert and MLoRE come from.
                y_BTD = self.norm(x_BTD) if last else x_BTD
                first = int(self.config.class_token)
                y_BPD = y_BTD[:, first : first + grid[0] * grid[1]]
                found.append(y_BPD.reshape(y_BPD.shape[0], *grid, -1))
            return x_BTD, {}

        self.run(self.embed(image_BHWC), key, step=step)
        return found

    def predict(self, maps: Mapping[str, Array], image_BHWC: Array, train: bool) -> dict:
        """Each task's head on its maps [B, h, w, decoder_width], at image resolution."""
        size = (image_BHWC.shape[1], image_BHWC.shape[2])
        return {task: self.heads[task](x, size, train) for task, x in maps.items()}


def task_record(routing: Routing, tasks: Sequence[str], names: Sequence[str]) -> Record:
    """The record of a joined decision, row n * J + j for task `names[j]`; nothing is dropped."""
    ids = jnp.asarray([tasks.index(name) for name in names], jnp.int32)
    task_N = jnp.tile(ids, routing.mask_N.shape[0] // len(names))
    return Record(routing, task_N, jnp.zeros((), jnp.int32))
