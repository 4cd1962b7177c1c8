"""Predictions that are not made yet: features and the matrix that would turn them into logits.

The logits of a large vocabulary are the largest array of a language model; whoever needs only
losses of them makes them a part at a time.
"""

from __future__ import annotations

from typing import NamedTuple

from jax import Array


class Hidden(NamedTuple):
    """x_BTD @ kernel_DV are logits [B, T, V]."""

    x_BTD: Array
    kernel_DV: Array
