"""A domain from outside of the package: rows of numbers, one regression task, one system on them.

`python train.py tests/growth/numbers_run.py` trains it. What a new domain costs stands here: a data
section, the answers of a `Domain`, a task, those of an `Exporter`, and a model's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from moezoo import registry
from moezoo.data import pipeline
from moezoo.data.source import ArraySource, Batch, First, Info, Source, SourceExample
from moezoo.deploy import splits
from moezoo.deploy.exporter import Subject
from moezoo.deploy.input_spec import InputSpec
from moezoo.label import ROWS
from moezoo.models.shared.config import ModelTraits
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.nn.context import Context
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import Linear
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter
from moezoo.ops import grouped
from moezoo.ops.routing import softmax_then_top_k
from moezoo.tasks.base import Metric, Scores, State, Task, ratio
from moezoo.tasks.output import NUMBER
from moezoo.tasks.painting import WordKey, number_tag
from moezoo.tasks.registry import TaskKind
from moezoo.train.config import Config
from moezoo.train.domain import Classes, Domain
from moezoo.train.setup import Loaded
from tests.growth import row

registry.learn_reader("row", "tests.growth.row")


@dataclass(frozen=True)
class NumbersData:
    """Generated rows and the number that belongs to each."""

    name: str = "numbers"
    width: int = 6
    """Numbers of a row."""
    train: int = 64
    test: int = 32

    @property
    def domain(self) -> Numbers:
        return Numbers(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("numbers",)


def source(data: NumbersData, split: str) -> ArraySource:
    """Rows, and a sum whose sign the first number decides."""
    rng = np.random.default_rng(len(split))
    count = data.train if split == "train" else data.test
    row_NF = rng.normal(size=(count, data.width)).astype(np.float32)
    total_N = (row_NF.sum(1) * np.sign(row_NF[:, 0])).astype(np.float32)
    info = Info(data.name, split, (1, data.width), ("total",), {}, kinds={"total": ROWS})
    return ArraySource(info, {"row": row_NF, "total": total_N})


def stack(examples: Sequence[SourceExample], tasks: Sequence[str], info: Info) -> Batch:
    return {name: np.stack([e[name] for e in examples]) for name in ("row", *tasks)}


class SquaredError(Metric):
    """The root of the mean squared error."""

    def init(self) -> State:
        return {"rows": np.zeros((), np.int64), "squared": np.zeros((), np.float64)}

    def count(self, logits_BHWC: jax.Array, label: jax.Array, valid_B: Any = None) -> State:
        valid = jnp.ones(label.shape, bool) if valid_B is None else jnp.asarray(valid_B)
        squared = jnp.where(valid, (logits_BHWC[:, 0] - label) ** 2, 0.0)
        return {"rows": jnp.sum(valid, dtype=jnp.int32), "squared": jnp.sum(squared)}

    def compute(self, state: State) -> Scores:
        return {"rmse": float(np.sqrt(ratio(state["squared"], state["rows"])))}


def squared(logits_BC: jax.Array, label_B: jax.Array, valid_B: Any = None) -> jax.Array:
    return jnp.mean((logits_BC[:, 0] - label_B) ** 2)


def total(weight: float = 1.0) -> Task:
    """The one task: which number belongs to a row."""
    return Task(
        name="total",
        channels=1,
        loss=squared,
        metric=SquaredError(),
        headline="rmse",
        lower_is_better=True,
        weight=weight,
        postprocess=lambda logits_BC: logits_BC[:, 0],
        picture=WordKey(number_tag),
        label=ROWS,
        output=NUMBER,
    )


class Numbers(Domain):
    """Rows: `row` float32 [B, F] and the label of the task, float32 [B]."""

    name, unit = "numbers", "rows"
    tasks: ClassVar[Mapping[str, TaskKind]] = {"total": TaskKind(total)}
    pictures: ClassVar[Mapping[str, str]] = {}

    def __init__(self, data: NumbersData):
        self.data = data

    def check(self, config: Config) -> None: ...

    def open(self, config: Config, split: str) -> ArraySource:
        return source(self.data, split)

    def classes(self, config: Config, source: Any) -> Classes:
        return Classes()

    def size(self, config: Config) -> tuple[int, int]:
        return 1, self.data.width

    def example(self, config: Config) -> tuple[Batch, Classes]:
        return self._training(source(self.data, "train"), 1, 0).batch(0), Classes()

    def _training(self, source: Source, size: int, seed: int) -> pipeline.Training:
        return pipeline.Training(source, size, seed, None, (), lambda names, info: (), stack)

    def training(
        self, config: Config, source: Source, tasks: Sequence[str], start: int, rows: Sequence[int]
    ) -> Iterator[tuple[int, Batch]]:
        made = self._training(source, config.train.batch, config.seed)
        return made.batches(start, config.train.steps, rows)

    def evaluation(
        self, source: Source, count: int, size: int, names: Sequence[str], rows: Sequence[int]
    ) -> Iterator[Batch]:
        return pipeline.evaluation(First(source, count), size, names, rows, stack)

    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> MultiTaskOutput:
        return model(batch["row"], **options)

    def describe(self, config: Config) -> str:
        return f"of {self.data.width} numbers"

    def draw(self, finished: Any, folder: Path, count: int) -> None:
        """Nothing: rows of numbers have no pictures."""

    def exports(self, config: Config) -> RowExports:
        return RowExports(config, self.data)


@dataclass(frozen=True)
class RowExports:
    """How the task leaves: a line of numbers in, one number out."""

    config: Config
    data: NumbersData

    @property
    def input(self) -> InputSpec:
        return InputSpec("row", "rows", (self.data.width,), "numbers", files={"row.py": row})

    def check(self, task: str | None) -> None: ...

    def open(self, split: str) -> Source:
        return source(self.data, split)

    def identity(self) -> Mapping[str, Any]:
        return splits.identity(self.data)

    def stack(self, examples: Sequence[SourceExample], tasks: Sequence[str], info: Info) -> Batch:
        return stack(examples, tasks, info)

    def subject(self, run: Loaded, classes: Classes) -> Subject:
        return Subject(run.model, {task.name: task for task in run.tasks})

    def picture(self, example: np.ndarray) -> np.ndarray:
        return np.asarray(Image.new("RGB", (32, 32)))


@dataclass(frozen=True)
class NumbersModel(ModelTraits):
    """A system from outside: experts between two linear maps."""

    reads: ClassVar[str] = "numbers"
    per_pixel: ClassVar[bool] = False

    width: int = 8
    experts: int = 4
    top_k: int = 2

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs) -> Any:
        return Mixture(self, tasks, image_size[1], rngs)


class Mixture(nnx.Module):
    """A linear map, a layer of experts, a linear head per task."""

    def __init__(self, config: NumbersModel, tasks: Mapping[str, int], inputs: int, rngs: nnx.Rngs):
        self.tasks = tuple(tasks)
        options = {"dtype": jnp.float32, "rngs": rngs}
        self.first = Linear(inputs, config.width, **options)
        sizes = config.width, config.experts, config.top_k
        router = LinearRouter(*sizes, select=softmax_then_top_k, rngs=rngs)
        experts = MLPExperts(config.experts, config.width, 2 * config.width, rngs=rngs)
        self.moe = MoE(router, experts, grouped.auto)
        self.heads = nnx.Dict({t: Linear(config.width, c, **options) for t, c in tasks.items()})

    def __call__(
        self, row_BF: jax.Array, *, tasks: Any = None, key: Any = None, train: bool = False
    ) -> MultiTaskOutput:
        x_ND = self.first(row_BF)
        y_ND, record = self.moe(x_ND, Context(0), key)
        found = {t: self.heads[t](x_ND + y_ND) for t in tasks or self.tasks}
        return MultiTaskOutput(found, {}, {"moe": record})


numbers = partial(Config, tasks=("total",), data=NumbersData(), model=NumbersModel())
