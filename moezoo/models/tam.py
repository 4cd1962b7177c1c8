"""The training-only branch in which M3ViT's tasks learn from each other.

arXiv:2210.14793, supplement A.1; the published code is followed for its arithmetic. Nothing of it
is left at inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.conv import Conv, ConvNorm, UpConvNorm


def shares(attention: Array, tasks: int) -> list[Array]:
    """The weight of each task's features: the first half shares A, the others 1 - A."""
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
        gate = 1 + jax.nn.sigmoid(self.up[1](x, train))
        gated = jnp.concatenate([f * gate for f in stack], -1)
        return {
            task: self.project[task](relu(self.refine[task](gated, train))).astype(jnp.float32)
            for task in features
        }
