"""What a task is (loss, metric, post-processing, picture), and how metrics are summed.

A metric's state is a dictionary of sums, so states of batches, devices and hosts merge by
addition. One batch is counted on the device in int32/float32; totals over a data set are kept on
the host in int64/float64 (`merge`), where no counter overflows and no sum loses digits:

    count = metric.count if metric.on_host else jax.jit(metric.count)
    total = metric.init()
    for batch in batches:
        total = merge(total, count(logits_BHWC, label, valid_B))
    scores = metric.compute(total)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.errors import UserError
from moezoo.label import LabelKind, declared
from moezoo.ops.divergence import Divergence, bernoulli, categorical, gaussian
from moezoo.tasks.output import TaskOutput, of_label, painting
from moezoo.tasks.painting import Painting

# What raw predictions stand for, by the form of the label.
BY_FORM: dict[str | None, Divergence] = {
    "class": categorical,
    "image": categorical,
    "binary": bernoulli,
    "value": gaussian,
    "vector": gaussian,
}
MARKS = {"uint16": 2**16 - 1, "uint32": 2**32 - 1}
State = dict[str, Any]
Loss = Callable[..., jax.Array]
Scores = dict[str, float]
Constant = Callable[[Iterable[np.ndarray], int], np.ndarray]
F = TypeVar("F")


def leaves_out_marked(what: F) -> F:
    """Marks a loss or metric that leaves out exactly the pixels marked with `mark_of`'s value."""
    what.leaves_out_marked = True  # type: ignore[attr-defined]
    return what


class Metric(ABC):
    """Sums to which a batch adds, and the scores that follow from the sums."""

    on_host: ClassVar[bool] = False

    @abstractmethod
    def init(self) -> State:
        """The empty state: NumPy zeros, int64 for counters and float64 for sums."""

    @abstractmethod
    def count(self, logits_BHWC: jax.Array, label: jax.Array, valid_B: Any = None) -> State:
        """What one batch adds to the state (int32, float32); rows with valid_B False add nothing.

        logits_BHWC are raw network outputs at the label's resolution, [B, C] if the label is one
        number per image; the label comes straight from the batch. Can be jitted unless `on_host`.
        """

    @abstractmethod
    def compute(self, state: State) -> Scores:
        """Scores by name; a score without any data behind it is NaN."""

    def per_class(self, state: State) -> np.ndarray | None:
        """The score of every class, float64 [classes], larger is better; None if there is none."""
        return None

    def update(self, state: State, logits_BHWC: Any, label: Any, valid_B: Any = None) -> State:
        """The state including one more batch; inside jit the sums are 32 bits wide."""
        return jax.tree.map(lambda a, b: a + b, state, self.count(logits_BHWC, label, valid_B))


def merge(total: State, part: State) -> State:
    """Add a batch's (or another host's) state to a total, on the host in int64/float64."""
    return {key: np.asarray(value) + np.asarray(part[key]) for key, value in total.items()}


@dataclass(frozen=True)
class Task:
    """A task: a prediction for every pixel, or one for the image if not `per_pixel`.

    `label` is the kind of its label. It decides what padding, mirroring and scaling images do to
    the label, so it must be given (UserError), and be the kind that the data set declares.

    `loss(logits_BHWC, label, valid_B=None)` is a float32 scalar, `postprocess` gives what users
    want (a class map, metres, unit vectors, a probability), and `picture` paints one
    post-processed prediction as uint8 [H,W,3], its `label` one label. Logits of whole images are
    [B, C].
    `scored_on` names the array of an evaluation batch that the metric compares with, if a benchmark
    scores against a truth other than the label that is learned.
    `output` says what a post-processed prediction means to its user; None: derived from the label's
    form. `constant(labels, channels)` gives the best constant logits, float32 [channels], if that
    comparison makes sense.
    """

    name: str
    channels: int
    loss: Loss
    metric: Metric
    headline: str
    lower_is_better: bool
    weight: float
    postprocess: Callable[[Any], jax.Array]
    picture: Painting
    label: LabelKind | None = None
    scored_on: str | None = None
    output: TaskOutput | None = None
    constant: Constant | None = None

    def __post_init__(self) -> None:
        kind = declared(self.label, f"Task {self.name}", "give Task(label=...)")
        if kind.classes and kind.unknown != mark_of(kind.type):
            self._check_mark(kind)
        self._check_fields()
        self._check_headline()

    def _check_fields(self) -> None:
        """UserError for what would fail, or be taken for something else, in the middle of a run."""
        whole = isinstance(self.channels, int) and not isinstance(self.channels, bool)
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        wanted = {
            "channels": (whole and self.channels >= 1, "a whole number from 1"),
            "weight": (number and 0 <= self.weight < float("inf"), "a number from 0"),
            "lower_is_better": (isinstance(self.lower_is_better, bool), "True or False"),
            "loss": (callable(self.loss), "a function"),
            "postprocess": (callable(self.postprocess), "a function"),
            "metric": (isinstance(self.metric, Metric), "a Metric"),
            "picture": (callable(self.picture), "a Painting"),
        }
        for name, (fits, kind) in wanted.items():
            if not fits:
                raise UserError(
                    f"{name} of task {self.name} is {getattr(self, name)!r:.60}: give {kind}."
                )

    def _check_headline(self) -> None:
        """UserError for a headline that the metric does not compute, before anything is trained."""
        try:
            found = list(self.metric.compute(self.metric.init()))
        except Exception as error:
            raise UserError(
                f"The metric of task {self.name} fails where nothing was counted "
                f"({type(error).__name__}: {error}): scores without data behind them must be NaN."
            ) from error
        if self.headline not in found:
            raise UserError(
                f"The headline of task {self.name} is {self.headline}, but its metric computes "
                f"{', '.join(found)}: name one of these."
            )

    def _check_mark(self, kind: LabelKind) -> None:
        """Raise UserError for losses and metrics that look for a mark other than the label's."""
        loss = self.loss.func if isinstance(self.loss, partial) else self.loss
        for one in (loss, type(self.metric)):
            if getattr(one, "leaves_out_marked", False):
                name, left_out = getattr(one, "__name__", one), mark_of(kind.type)
                raise UserError(
                    f"Task {self.name} marks unlabelled pixels with {kind.unknown:g}, but {name} "
                    f"leaves out {left_out}: declare that one, or give another loss and metric."
                )

    @property
    def per_pixel(self) -> bool:
        """Whether there is a prediction for every pixel."""
        return declared(self.label, f"Task {self.name}", "give Task(label=...)").per_pixel

    @property
    def prediction(self) -> TaskOutput:
        """What its prediction means to its user; UserError if no export has a form for it."""
        found = self.output or of_label(self.label, self.picture.key(()))
        if found is None:
            form = None if self.label is None else self.label.form
            what = "nothing" if form is None else f"labels of the form '{form}'"
            raise UserError(
                f"Task {self.name} declares {what}, which no export has a form for: classes, "
                "probabilities, values and unit vectors in the camera's frame have one."
            )
        return found

    @property
    def divergence(self) -> Divergence:
        """How far two of its raw predictions are apart as distributions.

        UserError if they stand for none.
        """
        form = None if self.label is None else self.label.form
        # Two logits of a binary label are a softmax's.
        kinds = BY_FORM | ({"binary": categorical} if self.channels > 1 else {})
        if form not in kinds:
            raise UserError(
                f"Predictions of task {self.name} stand for no distribution, so that two of them "
                "cannot be made to agree: leave that loss out, or take another task."
            )
        return kinds[form]

    def painting(self) -> dict[str, Any]:
        """How an export paints its prediction: the manifest's `picture` entry."""
        return painting(self.prediction, self.picture, self.channels, self.name)

    @property
    def truth(self) -> str:
        """The array of a batch that the metric reads."""
        return self.scored_on or self.name


def mark_of(kind: Any) -> int:
    """The mark that losses and metrics here leave out in class maps of this type, that of pixels
    without a label: 255, and the largest number in wider maps, which have more classes."""
    return MARKS.get(np.dtype(kind).name, 255)


def only_rows(mask_BHW: jax.Array, valid_B: jax.Array | None) -> jax.Array:
    """The mask [B,H,W,...] without the rows that are padding of the last batch."""
    if valid_B is None:
        return mask_BHW
    shape = (mask_BHW.shape[0],) + (1,) * (mask_BHW.ndim - 1)
    return mask_BHW & jnp.reshape(jnp.asarray(valid_B, bool), shape)


def ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """Quotient in float64, NaN if the denominator is 0."""
    numerator = np.asarray(numerator, np.float64)
    denominator = np.asarray(denominator, np.float64)
    safe = np.where(denominator == 0, 1.0, denominator)
    return np.where(denominator == 0, np.nan, numerator / safe)
