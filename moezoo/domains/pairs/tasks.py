"""Tasks whose prediction is the most similar candidate: a choice, words, the partner in a batch.

The tasks of Uni-Perceiver (arXiv:2112.01522) and Uni-Perceiver-MoE (arXiv:2206.04674), whose recipe
gives classes and captions the weight 1, hidden words and retrieval 0.5. A task's label is a
dictionary, its part of a batch; logits are similarities over a temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.label import ROWS
from moezoo.tasks import classification, language, painting
from moezoo.tasks.base import Metric, Scores, State, Task, only_rows, ratio
from moezoo.tasks.losses import cross_entropy
from moezoo.tasks.painting import WordKey
from moezoo.tasks.registry import TaskFacts, TaskKind, TaskTable

PairPart = Mapping[str, jax.Array]
Fits = Callable[[PairPart], jax.Array]
SMOOTHING = 0.1  # of the labels of retrieval, as published


def same_text(part: PairPart) -> jax.Array:
    """Whether example b has the same text as example c, bool [B, C]; part: `text` int32 [B, T]."""
    text_BT = part["text"]
    return (text_BT[:, None] == text_BT[None]).all(-1)


def has_all(part: PairPart) -> jax.Array:
    """Whether image b has everything that text c asks for, bool [B, C].

    part: `there` and `asked`, bool [B, M] each, over M things.
    """
    missing_BC = (~part["there"]).astype(jnp.float32) @ part["asked"].astype(jnp.float32).T
    return missing_BC == 0


def matching_loss(
    logits_BC: jax.Array,
    label: PairPart,
    valid_B: jax.Array | None = None,
    *,
    fits: Fits,
    smoothing: float = SMOOTHING,
) -> jax.Array:
    """Mean of the cross-entropies of images over texts and of texts over images; float32 scalar.

    logits_BC: example b's image with example c's text. All that fit share the probability evenly.
    """
    real_B = jnp.ones(logits_BC.shape[0], bool) if valid_B is None else valid_B
    fits_BC = fits(label) & real_B[:, None] & real_B
    ways = ((logits_BC, fits_BC), (logits_BC.T, fits_BC.T))
    return sum((_one_way(a, b, real_B, smoothing) for a, b in ways), jnp.float32(0)) / 2


def _one_way(
    logits_BC: jax.Array, fits_BC: jax.Array, real_B: jax.Array, smoothing: float
) -> jax.Array:
    wanted = fits_BC / jnp.maximum(fits_BC.sum(1, keepdims=True), 1)
    even = real_B / jnp.maximum(real_B.sum(), 1)
    logits = jnp.where(real_B, logits_BC.astype(jnp.float32), -jnp.inf)
    log_B = jnp.where(real_B, jax.nn.log_softmax(logits, -1), 0.0)
    loss_B = -jnp.sum(((1 - smoothing) * wanted + smoothing * even) * log_B, -1)
    return jnp.sum(jnp.where(real_B, loss_B, 0.0)) / jnp.maximum(real_B.sum(), 1)


@dataclass(frozen=True)
class Recall(Metric):
    """How often the most similar partner in the batch fits, both ways, and how often any does."""

    fits: Fits

    def init(self) -> State:
        """Rows, right ones both ways, and the sum of the shares of candidates that fit a text."""
        return {name: np.zeros((), np.int64) for name in ("rows", "image_to_text", "right")} | {
            "fitting": np.zeros((), np.float64)
        }

    def count(self, logits_BHWC: jax.Array, label: Any, valid_B: jax.Array | None = None) -> State:
        """Sums of one batch from logits [B, B], images by texts."""
        real_B = jnp.ones(logits_BHWC.shape[0], bool) if valid_B is None else valid_B
        fits_BC = self.fits(label) & real_B[:, None] & real_B

        def right(logits_BC: jax.Array, fits_BC: jax.Array) -> jax.Array:
            best_B = jnp.argmax(jnp.where(real_B, logits_BC, -jnp.inf), -1)
            there_BC = best_B[:, None] == jnp.arange(len(real_B))
            return jnp.sum(there_BC & fits_BC, dtype=jnp.int32)

        share_C = fits_BC.sum(0) / jnp.maximum(real_B.sum(), 1)
        return {
            "rows": jnp.sum(real_B, dtype=jnp.int32),
            "image_to_text": right(logits_BHWC, fits_BC),
            "right": right(logits_BHWC.T, fits_BC.T),
            "fitting": jnp.sum(jnp.where(real_B, share_C, 0.0), dtype=jnp.float32),
        }

    def compute(self, state: State) -> Scores:
        """Recall at 1 among the candidates of an evaluation batch.

        recall: the mean of both ways; chance: the recall of choosing an image at random.
        """
        rows = state["rows"]
        ways = {
            "image_to_text": float(ratio(state["image_to_text"], rows)),
            "text_to_image": float(ratio(state["right"], rows)),
        }
        mean = sum(ways.values()) / 2
        return {"recall": mean} | ways | {"chance": float(ratio(state["fitting"], rows))}


@dataclass(frozen=True)
class WordScores(Metric):
    """Cross-entropy of the asked words, and how often the most similar word is the right one."""

    def init(self) -> State:
        """Asked words, right ones, the sum of losses."""
        counts = {name: np.zeros((), np.int64) for name in ("words", "right")}
        return counts | {"loss": np.zeros((), np.float64)}

    def count(self, logits_BHWC: jax.Array, label: Any, valid_B: jax.Array | None = None) -> State:
        """Sums of one batch from logits [B, T, V]; label: `targets` int32 [B, T], -1 not asked."""
        targets_BT = label["targets"]
        scores = language.of_logits(logits_BHWC, targets_BT)
        asked_BT = only_rows(targets_BT >= 0, valid_B)
        return {
            "words": jnp.sum(asked_BT, dtype=jnp.int32),
            "right": jnp.sum(asked_BT & scores.right_BT, dtype=jnp.int32),
            "loss": jnp.sum(jnp.where(asked_BT, scores.loss_BT, 0.0), dtype=jnp.float32),
        }

    def compute(self, state: State) -> Scores:
        """The mean loss in nats, and accuracy."""
        return {
            "accuracy": float(ratio(state["right"], state["words"])),
            "loss": float(ratio(state["loss"], state["words"])),
        }


@dataclass(frozen=True)
class Chosen(classification.Accuracy):
    """Accuracy of a choice among fixed candidates; label: `label` int32 [B]."""

    def count(self, logits_BHWC: jax.Array, label: Any, valid_B: jax.Array | None = None) -> State:
        """Counters of one batch from logits [B, candidates]."""
        return super().count(logits_BHWC, label["label"], valid_B)


def choice_loss(
    logits_BC: jax.Array, label: PairPart, valid_B: jax.Array | None = None
) -> jax.Array:
    """Cross-entropy over the candidates."""
    return cross_entropy(logits_BC, label["label"], valid_B)


def words_loss(
    logits_BTV: jax.Array, label: PairPart, valid_B: jax.Array | None = None
) -> jax.Array:
    """Cross-entropy of the words that are asked for."""
    asked_BT = only_rows(label["targets"] >= 0, valid_B)
    return language.cross_entropy(logits_BTV, jnp.where(asked_BT, label["targets"], -1))


def _task(name: str, channels: int, weight: float, **parts: Any) -> Task:
    return Task(
        name=name,
        channels=channels,
        lower_is_better=False,
        weight=weight,
        postprocess=classification.likeliest,
        label=ROWS,
        **parts,
    )


def choice(name: str, classes: int, names: Sequence[str] = (), weight: float = 1.0) -> Task:
    """Which of `classes` candidates, whose names are `names`."""
    picture = WordKey(partial(painting.name_tag, names=tuple(names), count=classes))
    parts = {"loss": choice_loss, "metric": Chosen(classes), "headline": "accuracy"}
    return _task(name, classes, weight, picture=picture, **parts)


def words(name: str, classes: int, weight: float = 1.0) -> Task:
    """Which of `classes` words, at every place that is asked for."""
    parts = {"loss": words_loss, "metric": WordScores(), "headline": "accuracy"}
    return _task(name, classes, weight, picture=WordKey(language.nothing), **parts)


def matching(name: str, fits: Fits, headline: str = "recall", weight: float = 1.0) -> Task:
    """Which image and text of a batch belong together."""
    parts = {"loss": partial(matching_loss, fits=fits), "metric": Recall(fits)}
    return _task(name, 1, weight, picture=WordKey(language.nothing), headline=headline, **parts)


def counted(given: TaskFacts) -> dict[str, Any]:
    """The number of words."""
    return given.classes()


# In the order of the old common table, by which stored runs number their tasks.
TASKS = TaskTable(
    {
        "scene": TaskKind(partial(choice, "scene"), classification.settings),
        "caption": TaskKind(partial(words, "caption"), counted),
        "retrieval": TaskKind(partial(matching, "retrieval", same_text, weight=0.5)),
        "mlm": TaskKind(partial(words, "mlm", weight=0.5), counted),
        "text_scene": TaskKind(partial(choice, "text_scene"), classification.settings),
        "counts": TaskKind(partial(matching, "counts", has_all, "text_to_image", weight=0.5)),
    }
)
