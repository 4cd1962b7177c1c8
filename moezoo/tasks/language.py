"""Language modelling on packed rows: next-token loss, and scores by task.

Rows are int32 [B,T] each: `targets`, the next token or -1 if there is no loss; `segments`, 0 for
padding and 1, 2, ... for the documents of a row; `task`, the task of the token's document. What is
needed from the logits, the loss of each target and whether it is the likeliest token, is computed
from logits (`of_logits`) or from their factors (`of_hidden`), a chunk of tokens at a time, so that
the logits of a large vocabulary never exist all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.label import ROWS
from moezoo.nn.heads import Hidden
from moezoo.tasks.base import Metric, Scores, State, Task, only_rows, ratio
from moezoo.tasks.losses import masked_mean
from moezoo.tasks.painting import WordKey

TokenRows = Mapping[str, jax.Array]
CHUNK = 512  # tokens whose logits exist at a time


class TokenScores(NamedTuple):
    """For every target: -log of its probability, float32 [B,T], and whether it is the argmax.

    Where targets are -1, both are meaningless.
    """

    loss_BT: jax.Array
    right_BT: jax.Array


def token_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax of each target, float32 [B,T]; meaningless where targets are -1.

    The largest logit is subtracted first: the difference of two large numbers would lose the digits
    of a small loss. The target is selected by comparison, so that the derivative is not a scatter.
    """
    logits = logits_BTV.astype(jnp.float32)
    shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    chosen = targets_BT[..., None] == jnp.arange(logits.shape[-1])
    return jnp.log(jnp.exp(shifted).sum(-1)) - jnp.sum(jnp.where(chosen, shifted, 0.0), -1)


def of_logits(logits_BTV: jax.Array, targets_BT: jax.Array) -> TokenScores:
    """The scores of logits [B,T,V] of any floating type, computed in float32."""
    return TokenScores(
        token_loss(logits_BTV, targets_BT),
        jnp.argmax(logits_BTV, axis=-1) == targets_BT,
    )


def by_chunks(
    score: Callable[[jax.Array, jax.Array], Any],
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
) -> Any:
    """`score(logits, targets)`, a tree of [B,T], with the logits of `chunk` of the T at a time.

    The logits are hidden @ kernel in float32; the backward pass recomputes those of each chunk. T
    need not be a multiple of `chunk`.
    """
    batch, length, _ = hidden_BTD.shape
    parts = -(-length // chunk)
    missing = parts * chunk - length

    def chunks(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, parts, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def part(piece: tuple[jax.Array, jax.Array]) -> Any:
        hidden_BCD, targets_BC = piece
        return score(logits_of(hidden_BCD, kernel_DV), targets_BC)

    scores = jax.lax.map(part, (chunks(hidden_BTD), chunks(targets_BT)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length], scores)


def of_hidden(
    hidden_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, chunk: int
) -> TokenScores:
    """The scores of the logits hidden @ kernel, `by_chunks`."""
    return by_chunks(of_logits, hidden_BTD, kernel_DV, targets_BT, chunk)


def logits_of(hidden_BTD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    """Logits [B,T,V], float32 whatever the types of the factors."""
    return jnp.einsum("btd,dv->btv", hidden_BTD, kernel_DV, preferred_element_type=jnp.float32)


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Mean -log probability of the targets that are not -1, float32; 0 if there are none."""
    return masked_mean(token_loss(logits_BTV, targets_BT), targets_BT >= 0)


def chunked_cross_entropy(
    hidden_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
    """`cross_entropy` of the logits hidden @ kernel, never all of them at once (`by_chunks`)."""
    loss_BT = by_chunks(token_loss, hidden_BTD, kernel_DV, targets_BT, chunk)
    return masked_mean(loss_BT, targets_BT >= 0)


@dataclass(frozen=True)
class ByTask(Metric):
    """Cross-entropy, token accuracy and exact match of each task and overall.

    A document matches exactly if each of its targets is the likeliest token: greedy decoding
    from its prompt then gives the answer and stops (if the loss covers answers only; in a document
    with several answers, each follows the true ones before it).
    """

    tasks: tuple[str, ...]

    def init(self) -> State:
        """Sums by task: losses, targets and correct ones, documents and exact ones."""
        counts = {name: np.zeros(len(self.tasks), np.int64) for name in _COUNTS}
        return counts | {"loss": np.zeros(len(self.tasks), np.float64)}

    def count(
        self, logits_BHWC: jax.Array, label: TokenRows, valid_B: jax.Array | None = None
    ) -> State:
        """Sums of one batch from logits [B,T,V]; label has `targets`, `segments`, `task` [B,T]."""
        return self.count_scores(of_logits(logits_BHWC, label["targets"]), label, valid_B)

    def count_scores(
        self, scores: TokenScores, label: TokenRows, valid_B: jax.Array | None = None
    ) -> State:
        """The same from the scores of `of_hidden` or `of_logits`."""
        segments_BT, task_BT = label["segments"], label["task"]
        target_BT = only_rows((label["targets"] >= 0) & (segments_BT > 0), valid_B)
        is_BTJ = task_BT[..., None] == jnp.arange(len(self.tasks))

        def by_task(values_BT: jax.Array, dtype: Any = jnp.int32) -> jax.Array:
            return jnp.sum(jnp.where(is_BTJ, values_BT[..., None], 0), axis=(0, 1), dtype=dtype)

        first_BT, exact_BT = exact_match(scores.right_BT, target_BT, segments_BT)
        return {
            "loss": by_task(jnp.where(target_BT, scores.loss_BT, 0.0), jnp.float32),
            "targets": by_task(target_BT),
            "right": by_task(target_BT & scores.right_BT),
            "documents": by_task(first_BT),
            "exact": by_task(first_BT & exact_BT),
        }

    def compute(self, state: State) -> Scores:
        """`loss`, `accuracy`, `exact_match` over the tasks that occur, and `<task>/...` of each.

        The overall ones are means over tasks, with equal weight for every task.
        """
        columns = {
            "loss": ratio(state["loss"], state["targets"]),
            "accuracy": ratio(state["right"], state["targets"]),
            "exact_match": ratio(state["exact"], state["documents"]),
        }
        occurs = np.asarray(state["targets"]) > 0
        means = {
            name: float(values[occurs].mean()) if occurs.any() else float("nan")
            for name, values in columns.items()
        }
        return means | {
            f"{task}/{name}": float(values[j])
            for j, task in enumerate(self.tasks)
            for name, values in columns.items()
        }


@dataclass(frozen=True)
class OfHidden(ByTask):
    """`ByTask` for predictions that are `Hidden`: logits are made `chunk` tokens at a time."""

    chunk: int = CHUNK

    def count(self, logits_BHWC: Any, label: TokenRows, valid_B: jax.Array | None = None) -> State:
        """Sums of one batch from a `Hidden`; label has `targets`, `segments`, `task` [B,T]."""
        x_BTD, kernel_DV = logits_BHWC
        scores = of_hidden(x_BTD, kernel_DV, label["targets"], self.chunk)
        return self.count_scores(scores, label, valid_B)


def task(
    vocabulary: int,
    tasks: tuple[str, ...],
    headline: str = "exact_match",
    weight: float = 1.0,
    chunk: int = CHUNK,
) -> Task:
    """Next-token prediction of `vocabulary` ids in rows of the named `tasks`; reads a `Hidden`.

    The headline is "exact_match", or "loss" if texts have no answers. Nothing is drawn.
    """

    def loss(hidden: Hidden, label: TokenRows, valid_B: jax.Array | None = None) -> jax.Array:
        targets = label["targets"]
        if valid_B is not None:
            targets = jnp.where(valid_B[:, None], targets, -1)
        return chunked_cross_entropy(*hidden, targets, chunk)

    return Task(
        name="lm",
        channels=vocabulary,
        loss=loss,
        metric=OfHidden(tasks, chunk),
        headline=headline,
        lower_is_better=headline == "loss",
        weight=weight,
        postprocess=likeliest,
        picture=WordKey(nothing),
        label=ROWS,
    )


def likeliest(hidden: Hidden) -> jax.Array:
    """The most likely next token at every place, int32 [B,T]; all logits at once."""
    return jnp.argmax(logits_of(*hidden), axis=-1).astype(jnp.int32)


def nothing(value: np.ndarray) -> np.ndarray:
    """The picture of a task that has none."""
    raise NotImplementedError("text is written, not painted")


_COUNTS = ("targets", "right", "documents", "exact")


def exact_match(
    right_BT: jax.Array, target_BT: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The first target of each document, bool [B,T], and whether all its targets are right.

    Documents without a target have no first one and are not counted.
    """
    length = segments_BT.shape[1]
    place_T = jnp.arange(length)

    def of_row(right_T: jax.Array, target_T: jax.Array, segments_T: jax.Array):
        wrong = jax.ops.segment_sum((target_T & ~right_T).astype(jnp.int32), segments_T, length + 1)
        places_T = jnp.where(target_T, place_T, length)
        first = jax.ops.segment_min(places_T, segments_T, length + 1)
        return target_T & (place_T == first[segments_T]), wrong[segments_T] == 0

    return jax.vmap(of_row)(right_BT, target_BT, segments_BT)
