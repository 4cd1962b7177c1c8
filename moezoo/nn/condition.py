"""What, besides the token itself, a router may look at."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moezoo.ops.routing import Routing


class Condition(NamedTuple):
    """The task of every batch row.

    task_B: int32 [B], one task per row, whose T tokens lie together; or a Python int, which makes
    the program special to that task; or an int32 scalar.
    features_JF: float [J, F] learned features of every task, for routers that append them.
    routing: a decision taken elsewhere, for layers that share it (`GivenRouter`).
    attributes_RA: float [R, A] attributes of R groups of tokens that lie together and are equally
    long, for routers that decide by them alone (`AttributeRouter`).
    """

    task_B: Array | int
    features_JF: Array | None = None
    routing: Routing | None = None
    attributes_RA: Array | None = None


NO_TASK = Condition(0)


def task_of_tokens(condition: Condition, tokens: int) -> Array:
    """The task of each of `tokens` rows, int32 [N]."""
    task_B = jnp.atleast_1d(jnp.asarray(condition.task_B, jnp.int32))
    rows = task_B.shape[0]
    # Not jnp.repeat, which cannot be exported with a symbolic number of tokens.
    return jnp.broadcast_to(task_B[:, None], (rows, tokens // rows)).reshape(tokens)
