"""What answers for experts that were removed: their mean outputs, or maps of low rank.

A novice sees the token and knows nothing else. The constant that errs least is the expert's mean
output, weighted with the square of the weights that it is multiplied with; the map of rank r that
errs least comes from a reduced-rank regression on the calibration data (Izenman, 1975): of the
least squares solution, the r directions of outputs that it explains most of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from moezoo.deploy.usage import RELIABLE, Moments, Usage, weighted_mean_outputs
from moezoo.errors import UserError

RIDGE = 1e-4  # of the mean variance of inputs, added to each: sums of few tokens are singular


class Novices(Protocol):
    """The stand-ins of a layer's R removed experts, in ascending order of their ids."""

    def __call__(self, x: Array, gates_NR: Array) -> Array:
        """What they add for N tokens x [..., D]: their answers times gates, float32 [N, D]."""
        ...


class MeanNovices(nnx.Module):
    """Each removed expert's mean output; means [R, D]."""

    def __init__(self, means_RD: Any):
        self.means = nnx.Param(jnp.asarray(means_RD, jnp.float32))

    def __call__(self, x: Array, gates_NR: Array) -> Array:
        return _product(gates_NR, self.means.get_value())


class AffineNovices(nnx.Module):
    """A map of rank r and a constant for each removed expert.

    means [R, D], down [D, R, r], up [R, r, D].

    Novice e answers means_e + (x down_e) up_e.
    """

    def __init__(self, means_RD: Any, down_DRr: Any, up_RrD: Any):
        self.means = nnx.Param(jnp.asarray(means_RD, jnp.float32))
        self.down = nnx.Param(jnp.asarray(down_DRr, jnp.float32))
        self.up = nnx.Param(jnp.asarray(up_RrD, jnp.float32))

    def __call__(self, x: Array, gates_NR: Array) -> Array:
        down, up = self.down.get_value(), self.up.get_value()
        (d, removed, rank), n = down.shape, gates_NR.shape[0]
        # All novices at once: two dense products, whatever was asked for.
        inner = _product(x.reshape(-1, d).astype(jnp.float32), down.reshape(d, removed * rank))
        gated = inner.reshape(n, removed, rank) * gates_NR[..., None]
        linear_ND = _product(gated.reshape(n, removed * rank), up.reshape(removed * rank, d))
        return _product(gates_NR, self.means.get_value()) + linear_ND


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


class Observations(NamedTuple):
    """What is known of a layer: sums over choices, and over inputs where novices need them."""

    usage: Usage
    moments: Moments | None


@dataclass(frozen=True)
class NoviceKind:
    """How novices are made of a calibration's sums.

    make: (observations, removed experts' ids) -> novices.   size: scalars of one novice of tokens
    of D features.   moments: whether it needs `Moments`.   rank: of maps, 0 of constants.
    """

    name: str
    make: Callable[[Observations, Sequence[int]], Novices]
    size: Callable[[int], int]
    moments: bool = False
    rank: int = 0


def mean_novices(seen: Observations, removed: Sequence[int]) -> MeanNovices:
    """The constants of least squared error."""
    return MeanNovices(weighted_mean_outputs(seen.usage)[list(removed)])


def affine_novices(seen: Observations, removed: Sequence[int], rank: int) -> AffineNovices:
    """The maps of rank `rank` of least squared error; constants where there were few tokens.

    An expert that fewer than 30 tokens chose keeps its mean: a map of so few says nothing.
    """
    if seen.moments is None:
        raise ValueError("affine novices need the calibration's moments")
    means_ED = weighted_mean_outputs(seen.usage)
    fits = [_regression(seen, int(e), rank, means_ED[e]) for e in removed]
    return AffineNovices(
        np.stack([f.mean_D for f in fits]),
        np.stack([f.down_Dr for f in fits], axis=1),
        np.stack([f.up_rD for f in fits]),
    )


class _Fit(NamedTuple):
    mean_D: np.ndarray
    down_Dr: np.ndarray
    up_rD: np.ndarray


def _regression(seen: Observations, e: int, rank: int, mean_D: np.ndarray) -> _Fit:
    """Reduced-rank regression of one expert's outputs on its inputs, float64."""
    usage, moments = seen.usage, seen.moments
    assert moments is not None
    d = len(mean_D)
    weight = float(usage.gate2_E[e])
    if usage.count_E[e] < RELIABLE or weight <= 0:
        return _Fit(mean_D, np.zeros((d, rank)), np.zeros((rank, d)))
    x_D = moments.input_ED[e] / weight
    y_D = usage.gated_output_ED[e] / weight
    xx_DD = moments.inputs_EDD[e] / weight - np.outer(x_D, x_D)
    xy_DD = moments.both_EDD[e] / weight - np.outer(x_D, y_D)
    xx_DD = xx_DD + RIDGE * max(np.trace(xx_DD) / d, 1e-30) * np.eye(d)
    whole_DD = np.linalg.solve(xx_DD, xy_DD)
    # The directions of outputs in which the whole map explains most.
    explained_DD = xy_DD.T @ whole_DD
    _, vectors = np.linalg.eigh((explained_DD + explained_DD.T) / 2)
    up_rD = vectors[:, ::-1][:, :rank].T
    down_Dr = whole_DD @ up_rD.T
    return _Fit(y_D - (x_D @ down_Dr) @ up_rD, down_Dr, up_rD)


AFFINE = re.compile(r"affine:([1-9][0-9]{0,3})")
MEAN = NoviceKind("mean", mean_novices, lambda width: width)


def by_name(name: str) -> NoviceKind:
    """The kind called `mean` or `affine:r`; raises UserError for any other name."""
    if name == MEAN.name:
        return MEAN
    found = AFFINE.fullmatch(name)
    if found is None:
        raise UserError(
            f"--novice is '{name[:40]}'; it must be mean, or affine:r with a rank r from 1 on, "
            "such as affine:4."
        )
    rank = int(found[1])

    def make(seen: Observations, removed: Sequence[int]) -> AffineNovices:
        if rank > seen.usage.output_ED.shape[1]:
            raise UserError(
                f"--novice is {name}, but tokens have {seen.usage.output_ED.shape[1]} features: "
                "take a smaller rank."
            )
        return affine_novices(seen, removed, rank)

    return NoviceKind(name, make, lambda width: width * (1 + 2 * rank), True, rank)
