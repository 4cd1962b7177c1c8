"""What the V-MoE parity tests share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax import Array

from moezoo.ops import balance
from moezoo.ops.capacity import by_position, by_probability, expert_capacity
from moezoo.ops.expert import ExpertLinear
from moezoo.ops.routing import Routing

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ROUNDING = {"ceil": math.ceil, "round": round}
PRIORITY = {0: by_position, 1: by_probability}


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), **CLOSE)


def scaled(params: Array, x: Array, linear: ExpertLinear) -> Array:
    """The fixtures' expert: y = x * (e + 1) + 0.1 * e, with e as the only parameter."""
    return x * (params + 1.0) + 0.1 * params


def vmoe_losses(routing: Routing) -> dict[str, Array]:
    spread_ = balance.cv_squared_population
    return {
        "importance": balance.importance_loss(routing, balance.prob_sums, spread_),
        "load": balance.load_loss(routing, balance.smooth_load_one_threshold, spread_),
        "gshard": balance.switch_loss(routing),
    }


def slots_of(z: dict[str, np.ndarray], choices: int, experts: int) -> int:
    if int(z["capacity"]) > 0:
        return int(z["capacity"])
    rounding = ROUNDING[str(z["capacity_ceil_or_round"])]
    multiple_of = int(z["capacity_multiple_of"]) or 1
    return expert_capacity(choices, experts, float(z["capacity_factor"]), rounding, multiple_of)


def buffers_of_reference(slots_GECD: np.ndarray) -> np.ndarray:
    """Our slots of every group in the reference's layout, [E, G * C, D]."""
    groups, experts, slots, d = slots_GECD.shape
    if groups % experts:
        stacked = slots_GECD.swapaxes(0, 1)
    else:  # the reference interleaves groups when they are a multiple of the experts
        shape = (experts, groups // experts, experts, slots, d)
        stacked = slots_GECD.reshape(shape).swapaxes(0, 2)
    return stacked.reshape(experts, groups * slots, d)
