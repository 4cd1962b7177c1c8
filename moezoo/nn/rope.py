"""Rotary position embeddings and their scalings to longer texts.

Su et al., "RoFormer" (arXiv:2104.09864), eq. 34: pairs of features turn by an angle proportional to
the position, so that a product of a query and a key depends on their distance only. The pairs are
feature i and feature i + D/2 of a head, the layout of published Llama and Qwen weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo.errors import UserError
from moezoo.fields import Count, Positive, Range, check


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotation and how they are scaled; the defaults are Llama 2's."""

    theta: Annotated[float, Range(above=1)] = 10_000.0
    """Base of the geometric series of wavelengths."""
    share: Annotated[float, Range(above=0, most=1)] = 1.0
    """Share of a head's features that turn, the first ones (GLM-4 has 0.5)."""
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    """How frequencies change for texts longer than the model was first trained on."""
    factor: Positive = 1.0
    """How many times longer they may be."""
    original_length: Count = 2048
    """Tokens of the texts it was first trained on."""
    low_frequency: Positive = 1.0
    """llama3: wavelengths above original_length over this are scaled by the whole factor."""
    high_frequency: Positive = 4.0
    """llama3: wavelengths below original_length over this are kept."""
    beta_fast: Positive = 32.0
    """yarn: pairs that turn more often than this in original_length are kept."""
    beta_slow: Positive = 1.0
    """yarn: pairs that turn less often than this are scaled by the whole factor."""
    truncate: bool = True
    """yarn: whether the bounds between them are rounded outwards to whole pairs."""
    magnitude: Positive | None = None
    """yarn: what rotated queries and keys are multiplied by; None = 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        check(self, "rope")
        if self.scaling == "llama3" and self.low_frequency >= self.high_frequency:
            raise UserError(
                f"rope: low_frequency is {self.low_frequency}; it must be below high_frequency, "
                f"which is {self.high_frequency}."
            )


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, float32 [B, T, D/2]."""

    cos_BTR: Array
    sin_BTR: Array


def rotation(config: RopeConfig, head_width: int, positions_BT: Array) -> Rotation:
    """The rotation of tokens at int32 positions, of an even number of features of a head.

    Under "dynamic" scaling the last of all positions in the call decides, as in transformers: a
    text longer than `original_length` changes what its earlier tokens would have got.
    """
    frequency_R = SCALINGS[config.scaling](config, head_width, positions_BT)
    # Float32 whatever the model's type: bfloat16 tells no positions above 256 apart.
    angle_BTR = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequency_R, jnp.float32)
    size = magnitude(config)
    return Rotation(jnp.cos(angle_BTR) * size, jnp.sin(angle_BTR) * size)


def rotate(x_BTHD: Array, by: Rotation) -> Array:
    """Every head turned by its token's angles, computed in float32, in the type of the input.

    Of a head wider than the rotation only the first features turn.
    """
    width = 2 * by.cos_BTR.shape[-1]
    first, second = jnp.split(x_BTHD[..., :width].astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos_BTR[:, :, None], by.sin_BTR[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    turned = turned.astype(x_BTHD.dtype)
    if width == x_BTHD.shape[-1]:
        return turned
    return jnp.concatenate([turned, x_BTHD[..., width:]], axis=-1)


def rotate_neighbours(x_BTHD: Array, by: Rotation) -> Array:
    """As `rotate` for weights whose pairs are features 2i and 2i + 1 (DeepSeek), in `rotate`'s
    order: products of two such heads are those of the order that they came in."""
    return rotate(jnp.concatenate([x_BTHD[..., 0::2], x_BTHD[..., 1::2]], axis=-1), by)


def magnitude(config: RopeConfig) -> float:
    """What queries and keys are multiplied by: 1 but for YaRN (arXiv:2309.00071, eq. 22)."""
    if config.scaling != "yarn":
        return 1.0
    if config.magnitude is not None:
        return config.magnitude
    return 0.1 * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0


def _plain(config: RopeConfig, width: int, positions_BT: Array) -> np.ndarray:
    return config.theta ** -(np.arange(0, width, 2) / width)  # float64 until the angles


def _linear(config: RopeConfig, width: int, positions_BT: Array) -> np.ndarray:
    """All positions divided by the factor (Chen et al., arXiv:2306.15595)."""
    return _plain(config, width, positions_BT) / config.factor


def _dynamic(config: RopeConfig, width: int, positions_BT: Array) -> Array:
    """A larger base, so that the longest wavelength fits the text at hand ("dynamic NTK")."""
    length = jnp.maximum(positions_BT.max() + 1, config.original_length)
    growth = config.factor * length / config.original_length - (config.factor - 1)
    theta = config.theta * growth ** (width / (width - 2))
    return theta ** -jnp.asarray(np.arange(0, width, 2) / width, jnp.float32)


def _llama3(config: RopeConfig, width: int, positions_BT: Array) -> np.ndarray:
    """Long wavelengths scaled, short ones kept, a linear blend between (Llama 3.1)."""
    frequency_R = _plain(config, width, positions_BT)
    turns_R = config.original_length * frequency_R / (2 * math.pi)
    share_R = (turns_R - config.low_frequency) / (config.high_frequency - config.low_frequency)
    return _blend(frequency_R, config.factor, np.clip(share_R, 0, 1))


def _yarn(config: RopeConfig, width: int, positions_BT: Array) -> np.ndarray:
    """As llama3, with the blend linear in the pair's number (arXiv:2309.00071, section 3.2)."""

    def pair(turns: float) -> float:
        wavelength = config.original_length / (turns * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    # width - 1, not the last pair, as transformers has it.
    low, high = max(low, 0), min(high, width - 1)
    # As transformers: a blend without a width would divide by 0.
    high = high if high > low else low + 0.001
    share_R = 1 - np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
    return _blend(_plain(config, width, positions_BT), config.factor, share_R)


def _blend(frequency_R: np.ndarray, factor: float, kept_R: np.ndarray) -> np.ndarray:
    return kept_R * frequency_R + (1 - kept_R) * frequency_R / factor


Scaling = Callable[[RopeConfig, int, Array], Array | np.ndarray]
SCALINGS: dict[str, Scaling] = {
    "none": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
