"""What dense-prediction models share: a vision transformer, one head per task, the TAM branch.

TAM (M3ViT, arXiv:2210.14793, supplement A.1) is a branch in which tasks learn from each other in
training; nothing of it is left at inference. The published code is followed for its arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.vit import MakeMLP, Trunk, ViTConfig
from moezoo.errors import UserError, unknown
from moezoo.fields import AxisSize, Whole
from moezoo.models.shared.config import ModelTraits
from moezoo.models.shared.macs import Half, Macs, attention, mlp, stem, up_convolution_head
from moezoo.nn.conv import Conv, ConvNorm, UpConvNorm
from moezoo.nn.embed import grid_of
from moezoo.nn.heads import UpConvHead, upsamplings
from moezoo.nn.moe import Record
from moezoo.ops.interpolate import resize


def shares(attention: Array, tasks: int) -> list[Array]:
    """The weight of each task's features: the first half shares A, the others 1 - A."""
    # A single task has all of A; nobody is left for 1 - A.
    first = max(tasks // 2, 1)
    return [
        attention / first if j < first else (1 - attention) / (tasks - first) for j in range(tasks)
    ]


class TAM(nnx.Module):
    """Task attention at one level of the heads' features.

    A common map, taken from all tasks' features, is squeezed through a small hourglass to a gate
    of every task's features; a convolution over all tasks then predicts each task again.
    `refined`: channels before that prediction. Height and width must be multiples of 4.
    """

    def __init__(
        self,
        tasks: Mapping[str, int],
        channels: int,
        refined: int,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        both, c = len(tasks) * channels, channels
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.fuse = ConvNorm(both, c, **options)
        self.attend = ConvNorm(c, c, **options)
        self.mix = ConvNorm(both, c, **options)
        self.down = nnx.List([ConvNorm(c, c, stride=2, **options) for _ in range(2)])
        self.up = nnx.List([UpConvNorm(c, c, **options) for _ in range(2)])
        self.refine = nnx.Dict({t: ConvNorm(both, refined, **options) for t in tasks})
        self.project = nnx.Dict({t: Conv(refined, n, 1, **options) for t, n in tasks.items()})

    def __call__(self, features: Mapping[str, Array], train: bool = False) -> dict[str, Array]:
        """One more prediction per task, float32 [B, H, W, its channels], from [B, H, W, C] each.

        `features` lies in the order of the tasks.
        """
        relu, stack = jax.nn.relu, list(features.values())
        fused = relu(self.fuse(jnp.concatenate(stack, -1), train))
        weights = shares(jax.nn.sigmoid(self.attend(fused, train)), len(stack))
        weighted = [f * w for f, w in zip(stack, weights, strict=True)]
        x = relu(self.mix(jnp.concatenate(weighted, -1), train))
        for layer in (*self.down, self.up[0]):
            x = relu(layer(x, train))
        # As published: the gate adds to features and takes nothing from them.
        gate = 1 + jax.nn.sigmoid(self.up[1](x, train))
        gated = jnp.concatenate([f * gate for f in stack], -1)
        return {
            task: self.project[task](relu(self.refine[task](gated, train))).astype(jnp.float32)
            for task in features
        }


class MultiTaskOutput(NamedTuple):
    """What a multi-task model gives for B images.

    predictions: task -> float32 [B, H, W, channels], raw logits at image resolution; for a task on
      whole images [B, classes].
    auxiliary: task -> further predictions of the same shape, which exist in training only.
    records: path of an MoE layer -> what it did.
    losses: what the model asks for besides its tasks' losses, weighted scalars; training only.
    compared: task -> two raw predictions that the model's `agreement` (`ops.divergence.Agreement`)
      makes a loss of; training only.
    """

    predictions: dict[str, Array]
    auxiliary: dict[str, tuple[Array, ...]]
    records: dict[str, Record]
    losses: Mapping[str, Array] = {}
    compared: Mapping[str, tuple[Array, Array]] = {}


def wanted(own: tuple[str, ...], tasks: Sequence[str] | None) -> tuple[str, ...]:
    """The requested ones of a model's `own` tasks, all by default.

    Raises UserError for one that the model lacks.
    """
    if tasks is not None and not tasks:
        raise UserError("No task was asked for.")
    for task in tasks or ():
        if task not in own:
            raise unknown("task", task, list(own))
    return own if tasks is None else tuple(tasks)


def check_tasks(tasks: Mapping[str, int]) -> None:
    """Raise UserError where there is no task, or one without output channels."""
    if not tasks:
        raise UserError("A multi-task model needs at least one task.")
    for task, channels in tasks.items():
        if channels < 1:
            raise UserError(f"Task {task} has {channels} channels; it needs at least 1.")


@dataclass(frozen=True)
class MultiTaskConfig(ViTConfig, ModelTraits):
    """Sizes of a vision transformer with one up-convolution head per task."""

    head_channels: AxisSize = 256
    """Channels of the heads' convolutions."""
    tam: tuple[Whole, ...] = ()
    """Levels of the training-only branch between tasks: 0 is twice the token grid, 1 four times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = upsamplings(self.patch)
        levels = set(self.tam)
        if len(levels) < len(self.tam) or not levels <= set(range(steps - 1)):
            raise UserError(
                f"tam is {self.tam}; with patch {self.patch} its levels are different numbers "
                f"from 0 to {steps - 2}."
                if steps > 1
                else f"tam is {self.tam}; with patch {self.patch} there is no level."
            )

    def halves(self, block: int, n: int) -> tuple[Half, Half]:
        """What attention and MLP of a block cost in one pass of n tokens."""
        dense = Half(mlp(self.width, self.mlp_hidden, n))
        return Half(attention(self.width, self.width, n)), dense

    def passes(self, block: int, tasks: int) -> tuple[int, int]:
        """How often an image passes through attention and MLP of a block for so many tasks."""
        return 1, 1

    def macs(self, size: tuple[int, int], tasks: Mapping[str, int]) -> Macs:
        """One image, all `tasks` predicted in one call, without the training-only branch.

        With one task this is M3ViT's figure (tables 1-3 count encoder and one head). With several,
        what does not depend on the task counts once, the rest once per task.
        """
        height, width = grid_of(size, self.patch)
        patches, tokens = height * width, self.seen((height, width))
        encoder, routers = stem(self, patches), 0
        for block in range(self.depth):
            first, second = self.halves(block, tokens)
            times = self.passes(block, len(tasks))
            encoder += times[0] * first.products + times[1] * second.products
            routers += times[0] * first.router + times[1] * second.router
        heads = sum(
            up_convolution_head(self, self.head_channels, patches, channels)
            for channels in tasks.values()
        )
        return Macs(encoder, routers, heads)

    def check(self, tasks: Mapping[str, int], image_size: tuple[int, int]) -> None:
        """Raise UserError where the sizes do not go together."""
        check_tasks(tasks)
        height, width = grid_of(image_size, self.patch)
        if 0 in self.tam and (height % 2 or width % 2):
            raise UserError(
                f"tam level 0 needs an even number of patches in height and width; images of "
                f"{image_size[0]}x{image_size[1]} have {height}x{width}."
            )


class MultiTaskTrunk(Trunk):
    """A trunk with `heads` by task and `tam` levels; subclasses say how tokens reach them."""

    def __init__(
        self,
        config: MultiTaskConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        make_mlp: MakeMLP | None = None,
        make_attention: MakeMLP | None = None,
        router_sees: Any = "mlp_input",
        rngs: nnx.Rngs,
    ):
        config.check(tasks, image_size)
        super().__init__(
            config,
            image_size,
            make_mlp=make_mlp,
            make_attention=make_attention,
            router_sees=router_sees,
            rngs=rngs,
        )
        steps, channels = upsamplings(config.patch), config.head_channels
        options: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        self.tasks, self.levels = tuple(tasks), config.tam
        self.heads = nnx.Dict(
            {
                task: UpConvHead(config.width, outputs, steps, channels=channels, **options)
                for task, outputs in tasks.items()
            }
        )
        self.tam = nnx.List([TAM(tasks, channels, channels, **options) for _ in config.tam])

    def wanted(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        """The requested tasks, all by default; raises UserError for one that the model lacks."""
        return wanted(self.tasks, tasks)

    def decode(
        self,
        tokens: Mapping[str, Array],
        image_BHWC: Array,
        train: bool,
        records: dict[str, Record],
    ) -> MultiTaskOutput:
        """Run each task's head on its tokens [B, 1 + P, D].

        In training, and where all tasks are there, the TAM levels predict them again.
        """
        image_size = (image_BHWC.shape[1], image_BHWC.shape[2])
        grid = grid_of(image_size, self.config.patch)
        heads = {task: self.heads[task](x_BTD, grid, train) for task, x_BTD in tokens.items()}
        predictions = {task: head.logits_BHWC for task, head in heads.items()}
        auxiliary: dict[str, tuple[Array, ...]] = {}
        # A level mixes the features of all tasks, so some of them alone have no such predictions.
        if train and tuple(tokens) == self.tasks:
            for level, tam in zip(self.levels, self.tam, strict=True):
                again = tam({task: head.features[level] for task, head in heads.items()}, train)
                for task, logits in again.items():
                    larger = resize(logits, image_size)
                    auxiliary[task] = (*auxiliary.get(task, ()), larger)
        return MultiTaskOutput(predictions, auxiliary, records)


class TaskPasses(MultiTaskTrunk):
    """A trunk with one pass per task, all of them in one batch; subclasses say how to `encode`."""

    def encode(
        self, image_BHWC: Array, ids: Sequence[int], key: Array | None, records: dict[str, Record]
    ) -> Array:
        """Tokens of B*J rows, row b*J + j for image b and task `ids[j]`, or of B where tasks share.

        Fills `records`, by the paths of the layers.
        """
        raise NotImplementedError

    def __call__(
        self,
        image_BHWC: Array,
        *,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """Predict `tasks` (all by default) for images, float32.

        A single task gives the program that only knows that task. `key` is for router noise and
        stochastic depth and acts in training only.
        """
        names = self.wanted(tasks)
        ids = [self.tasks.index(name) for name in names]
        records: dict[str, Record] = {}
        x_BTD = self.encode(image_BHWC, ids, key if train else None, records)
        tokens = rows_of_tasks(x_BTD, names, image_BHWC.shape[0])
        return self.decode(tokens, image_BHWC, train, records)


def rows_of_tasks(x_BTD: Array, names: Sequence[str], images: int) -> dict[str, Array]:
    """Each task's tokens: rows b*J + j of image b and task `names[j]`, or rows that tasks share."""
    if x_BTD.shape[0] == images:
        return {name: x_BTD for name in names}
    # Tasks within images: a batch that is split over devices stays where it is.
    x_BJTD = x_BTD.reshape(images, len(names), *x_BTD.shape[1:])
    return {name: x_BJTD[:, j] for j, name in enumerate(names)}
