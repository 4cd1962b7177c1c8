"""Who shares a decision about a conditional encoder's maps: the six levels, by name.

A level makes a block's routers (`LEVELS`), and says under which rows of the table of conditions the
tokens of a sequence are (`ROWS`), which balance losses it has and which choices teach it nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.backbones.conditional import ConditionalMake, DenseMake, MakeMaps, xavier
from moezoo.errors import UserError
from moezoo.models.conditional_moe.conditions import ConditionSide, ConditionTable, Mixed
from moezoo.models.conditional_moe.tokens import TEXT, Modality, text_begins
from moezoo.models.shared import balancing
from moezoo.nn.condition_routers import AttributeRouter, as_it_is
from moezoo.nn.conditional import ContextLevel, Level, RowLevel, Summary, TokenLevel
from moezoo.nn.context import Context
from moezoo.nn.exploration import ExploringRouter, policy
from moezoo.nn.layers import gelu
from moezoo.ops import balance, exchange
from moezoo.ops.selection import check_learns, renormalised_among
from moezoo.ops.weight_mixtures import Segments

# Blocks with experts, by their index; "odd" counts from 1, as the published code's name does.
LOCATIONS = {
    "odd": lambda block: block % 2 == 0,
    "four": lambda block: block % 4 == 0,
    "all": lambda block: True,
    "none": lambda block: False,
}
ACTIVATIONS = {"none": as_it_is, "gelu": gelu}


class LevelOptions(Protocol):
    """What is read of a `ConditionalMoEConfig`, which is made of this file's parts."""

    level: Any
    width: int
    depth: int
    experts: int
    top_k: int
    location: Any
    mlp_gates: Any
    gate_activation: Any
    noise: Any
    noise_std: float
    dispatch: str


def makes(config: Any, table: ConditionTable, dtype: Any) -> list[tuple[MakeMaps, MakeMaps | None]]:
    """For each block, what its maps are made of, and what its MLP's second layer is, if apart."""
    dense, made = DenseMake(dtype), LEVELS[config.level]
    if made is None:
        return [(dense, None)] * config.depth
    conditional = ConditionalMake(partial(made, config, table), config.experts, dtype)
    second = conditional if config.mlp_gates == "separate" else None
    here = LOCATIONS[config.location]
    return [(conditional, second) if here(i) else (dense, None) for i in range(config.depth)]


def _row_level(length: Any, config: LevelOptions, table: ConditionTable, rngs: nnx.Rngs) -> Level:
    router = AttributeRouter(
        length(table),
        config.width,
        config.experts,
        config.top_k,
        activation=ACTIVATIONS[config.gate_activation],
        select=renormalised_among(config.top_k),
        explore=policy(config.noise, config.noise_std),
        init=xavier(1),
        rngs=rngs,
    )
    return RowLevel(router)


def _token_level(config: LevelOptions, table: ConditionTable, rngs: nnx.Rngs) -> Level:
    router = _token_router(config, config.width, rngs)
    return TokenLevel(router, exchange.by_name(config.dispatch))


def _context_level(config: LevelOptions, table: ConditionTable, rngs: nnx.Rngs) -> Level:
    router = _token_router(config, 2 * config.width, rngs)
    return ContextLevel(router, exchange.by_name(config.dispatch), Summary(config.width, rngs=rngs))


def _token_router(config: LevelOptions, width: int, rngs: nnx.Rngs) -> ExploringRouter:
    return ExploringRouter(
        width,
        config.experts,
        config.top_k,
        select=renormalised_among(config.top_k),
        explore=policy(config.noise, config.noise_std),
        init=xavier(1),
        rngs=rngs,
    )


LEVELS: dict[str, Any] = {
    "dense": None,
    "token": _token_level,
    "context": _context_level,
    "modality": partial(_row_level, lambda table: 2),
    "task": partial(_row_level, lambda table: len(table.tasks)),
    "attribute": partial(_row_level, lambda table: table.length),
}


def balance_losses(level: str) -> dict[str, balance.Together]:
    """Balance of the tokens of all tasks together; there is nothing to balance among rows."""
    if level not in ("token", "context"):
        return {}
    losses = {"importance": balance.importance_loss, "switch": balance.switch_loss}
    return {name: balance.Together(loss) for name, loss in losses.items()}


def idle_losses(level: str, location: str) -> dict[str, str]:
    """The balance losses that a level does not have, and why (`balancing`)."""
    own = balance_losses(level)
    if not own or location == "none":
        return balancing.none_of_them(
            f"tokens choose no experts with level {level}, location {location}"
        )
    return balancing.all_but(own, f"level {level}")


def check_choice(config: Any) -> None:
    """UserError for a choice without alternatives, and for noise that would do nothing."""
    if config.level == "dense" or config.location == "none":
        return
    k, experts = config.top_k, config.experts
    check_learns(renormalised_among(k), k, experts, f"top_k is {k} and experts {experts}")
    if config.noise in ("none", "jitter") and config.noise_std != 1.0:
        raise UserError(
            f"noise_std is {config.noise_std} and noise {config.noise}, which has no deviation to "
            "set: leave noise_std out, or take noise vmoe or rsample."
        )
    if config.noise == "rsample" and k == experts:
        raise UserError(
            f"noise is rsample, which draws who is chosen, and top_k is {k} of {experts} experts, "
            "so that all are: take a smaller top_k, or noise vmoe."
        )


def context_of(
    level: str,
    table: ConditionTable,
    condition: str | Mixed,
    parts: Sequence[Modality],
    mask_BT: Array | None = None,
) -> Context:
    """What the levels of a sequence of these parts are told.

    Raises UserError where a condition is for other inputs, or those of a mixed batch do not go
    together.
    """
    names = (condition,) if isinstance(condition, str) else condition.names
    entries = [table.entry(name) for name in names]
    for entry in entries:
        _check_parts(entry, parts)
    if len({entry.causal for entry in entries}) != 1:
        raise UserError(
            f"{' and '.join(names)} cannot share a batch: not all of them are read causally."
        )
    if len({len(entry.rows_RA) for entry in entries}) != 1:
        raise UserError(
            f"{' and '.join(names)} cannot share a batch: they have different numbers of rows."
        )
    each = [ROWS[level](table, entry, parts) for entry in entries]
    rows_RA, where = _placed(each, parts, condition)
    tasks_J = jnp.asarray([table.tasks.index(entry.task) for entry in entries], jnp.int32)
    if level in ("modality", "task", "attribute"):
        task = jnp.repeat(tasks_J, len(each[0][0]))
    else:
        task = tasks_J[0] if isinstance(condition, str) else tasks_J[condition.which_B]
    prefix = text_begins(parts) if entries[0].causal else None
    # Records are named by the paths of the modules that decided.
    return Context(
        task,
        attributes_RA=jnp.asarray(rows_RA),
        where=where,
        mask_BT=mask_BT,
        prefix=prefix,
        path="encoder",
    )


FeatureRows = tuple[np.ndarray, tuple[int, ...]]  # features [R, A], and the row of each segment


def _of_attributes(
    table: ConditionTable, entry: ConditionSide, parts: Sequence[Modality]
) -> FeatureRows:
    return entry.rows_RA, tuple(range(len(entry.rows_RA)))


def _of_task(table: ConditionTable, entry: ConditionSide, parts: Sequence[Modality]) -> FeatureRows:
    one = np.eye(len(table.tasks), dtype=np.float32)[[table.tasks.index(entry.task)]]
    return one, (0,)


def _of_modality(
    table: ConditionTable, entry: ConditionSide, parts: Sequence[Modality]
) -> FeatureRows:
    kinds = [part.kind for part in parts]
    return np.eye(2, dtype=np.float32)[kinds], tuple(range(len(kinds)))


ROWS: dict[str, Any] = {"modality": _of_modality, "task": _of_task, "attribute": _of_attributes}
# At these levels nobody reads rows; a condition has one at least.
ROWS |= {name: _of_task for name in ("dense", "token", "context")}


def _placed(
    each: list[FeatureRows], parts: Sequence[Modality], condition: str | Mixed
) -> tuple[np.ndarray, Segments]:
    """The rows of all conditions, and which of them each token is under."""
    rows_RA, own = np.concatenate([rows for rows, _ in each]), each[0][1]
    splits = (text_begins(parts),) if len(own) == 2 else ()
    if isinstance(condition, str):
        return rows_RA, Segments(splits, own)
    first_C1 = np.arange(len(each))[:, None] * len(each[0][0])
    table_CS = jnp.asarray(first_C1 + np.asarray(own), jnp.int32)
    return rows_RA, Segments(splits, rows_BS=table_CS[condition.which_B])


def _check_parts(entry: ConditionSide, parts: Sequence[Modality]) -> None:
    kinds = [part.kind for part in parts]
    if len(entry.rows_RA) == 2 and len(kinds) == 1:
        alone = "a text" if kinds[0] == TEXT else "an image"
        raise UserError(
            f"{entry.name} is the condition of an image with a text; the inputs are {alone} alone."
        )
