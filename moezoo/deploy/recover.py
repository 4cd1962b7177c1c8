"""What a path without some of its experts gets back: better stand-ins, routers, or weights.

Three rungs, the cheapest first. *Progressive*: layers lose their experts one after the other, and
what chooses and replaces those of a layer is measured again behind the layers that have lost theirs
already. *Router*: the routers alone (D E numbers a layer) learn to give the full model's logits on
calibration examples, whose labels nobody reads. *Finetune*: weights learn from the calibration
examples' labels while experts leave in stages, as in Chen et al., arXiv:2206.00277: after the first
half of the steps only those of the plan are left. Nothing here draws random numbers.

Only the first keeps what is promised of an example without violation: the others change weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moezoo.deploy import scores
from moezoo.deploy.calibrate import Calibration, calibrate
from moezoo.deploy.novices import NoviceKind
from moezoo.deploy.path import PathWeights, TaskPath
from moezoo.deploy.plan import Plan
from moezoo.deploy.task_path import Remove
from moezoo.deploy.trial import Trial
from moezoo.errors import UserError, unknown
from moezoo.tasks.base import Task
from moezoo.train.console import Bar, Console
from moezoo.train.optim import matrices

RecoveryKind = Literal["none", "progressive", "router", "finetune"]
Trains = Literal["small", "all"]
KINDS: tuple[str, ...] = get_args(RecoveryKind)
STAGES = 3  # in which experts leave while weights are trained
LOOKS = 4  # times that the loss over all calibration examples is taken; the best weights stay

CalibrationBatches = Callable[[], Iterable[Mapping[str, Any]]]
# (logits, batch as a path reads it, bool [B]) to the loss of the rows that are valid
PathLoss = Callable[[Array, Mapping[str, Any], Array], Array]


@dataclass(frozen=True)
class Recovery:
    """What is done after experts were removed.

    steps, lr: of Adam, whose rate falls to 0 as a cosine.   trains: of `finetune`: the task's head
    and all that is no matrix (norms, biases), or all weights. Raises UserError for what is none.
    """

    kind: str = "none"
    steps: int = 300
    lr: float = 1e-3
    trains: str = "small"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("recovery", str(self.kind), list(KINDS))
        if self.trains not in get_args(Trains):
            raise unknown("choice of --recover-trains", str(self.trains), list(get_args(Trains)))
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise UserError(f"--recover-steps is {self.steps!r:.60}; it must be at least 1.")
        if not 0 < self.lr <= 1:
            raise UserError(f"--recover-lr is {self.lr!r:.60}; it must lie between 0 and 1.")

    @property
    def learns(self) -> bool:
        """Whether weights of the full model change."""
        return self.kind in USES["steps"]


USES = {
    "steps": ("router", "finetune"),
    "lr": ("router", "finetune"),
    "trains": ("finetune",),
}


def recovery_of(kind: str, kinds: Sequence[str], **options: Any) -> Recovery:
    """A recovery with options of which None are the usual ones.

    kinds: the recoveries that are to be done, of which one at least must use each option that is
    given. Raises UserError otherwise.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if kind in KINDS and not {*kinds} & {*USES[name]}:
            raise UserError(
                f"--recover-{name} is given, but --recover is {kind}, which does not use it: add "
                f"--recover {' or '.join(USES[name])}, or leave it out."
            )
    return Recovery(kind, **given)


class Recovered(NamedTuple):
    """A path, the statistics that its stand-ins rest on, and what was done, for a certificate."""

    path: TaskPath
    found: Calibration
    stated: dict[str, Any]


class TrainedPath(NamedTuple):
    """Weights after training, and the loss over all calibration examples before and after."""

    weights: dict[str, Any]
    before: float
    after: float


def routers_of(path: TaskPath) -> list[str]:
    """Names of the parameters of the routers of layers that lack experts."""
    layers = tuple(f"{name}/router/" for name, layer in path.layers.items() if layer.experts)
    return [n for n in path.weights if n.startswith(layers) and n not in path.stats]


def tuned(path: TaskPath, trains: str, head: str) -> list[str]:
    """Names of the parameters that fine-tuning moves. head: where the task's head lies."""
    params = {n: w for n, w in path.weights.items() if n not in path.stats}
    if trains == "all":
        return list(params)
    nested = matrices({n: {n.rpartition("/")[2]: w} for n, w in params.items()})
    flat = {n: next(iter(nested[n].values())) for n in params}
    return [n for n in params if not flat[n] or n == head or n.startswith(f"{head}/")]


def distance(whole: TaskPath) -> PathLoss:
    """The mean squared distance from the full model's logits, as a share of their mean square."""

    def loss(logits: Array, batch: Mapping[str, Any], valid_B: Array) -> Array:
        wanted = jax.lax.stop_gradient(whole.run(batch["whole"], batch["given"]).logits)
        axes = tuple(range(1, logits.ndim))
        apart_B, size_B = (jnp.mean(a**2, axis=axes) for a in (logits - wanted, wanted))
        weight_B = valid_B.astype(jnp.float32)
        return jnp.sum(weight_B * apart_B) / (jnp.sum(weight_B * size_B) + 1e-12)

    return loss


def labelled(task: Task) -> PathLoss:
    """The task's own loss."""

    def loss(logits: Array, batch: Mapping[str, Any], valid_B: Array) -> Array:
        return task.loss(logits, batch["label"], valid_B)

    return loss


class PathTrainer:
    """Trains some weights of a path, which may hold arrays besides that change from call to call.

    names: of the weights that move; all others keep their bits. One compiled step for all calls.
    """

    def __init__(
        self, path: TaskPath, whole: TaskPath, names: Sequence[str], task: Task, how: Recovery
    ):
        if not names:
            raise UserError(f"--recover {how.kind} has nothing to train in the {path.task} path.")
        self.path, self.whole, self.names, self.how = path, whole, list(names), how
        self.task = task
        own = distance(whole) if how.kind == "router" else labelled(task)
        rate = optax.cosine_decay_schedule(how.lr, how.steps)
        self.optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

        def loss(moved: PathWeights, rest: PathWeights, batch: Mapping[str, Any]) -> Array:
            logits = path.run({**rest, **moved}, batch["given"]).logits
            return own(logits, batch, batch["valid"])

        def step(moved: Any, state: Any, rest: PathWeights, batch: Any) -> tuple[Any, Any]:
            gradient = jax.grad(loss)(moved, rest, batch)
            change, state = self.optimiser.update(gradient, state, moved)
            return optax.apply_updates(moved, change), state

        self._loss, self._step = jax.jit(loss), jax.jit(step)

    def __call__(
        self, stages: Sequence[PathWeights], batches: CalibrationBatches, bar: Bar
    ) -> TrainedPath:
        """Weights after `how.steps` steps over the batches, again and again in their order.

        stages: all weights of the path, the last for the second half of the steps and for the
        losses, the others for equal parts of the first half; what moves begins as in the last. What
        comes back is the best of a few looks, the start included. bar: of as many steps.
        """
        bar.doing("compiling")
        last = dict(stages[-1])
        moved = {name: last[name] for name in self.names}
        rests = [{n: w for n, w in s.items() if n not in moved} for s in stages]
        best, before = moved, self.total(rests[-1], moved, batches)
        lowest, state, looks = before, self.optimiser.init(moved), self._looks()
        for number, batch in enumerate(islice(_forever(batches), self.how.steps), start=1):
            rest = rests[self._stage(number - 1, len(rests))]
            moved, state = self._step(moved, state, rest, self._read(batch))
            if number in looks:
                seen = self.total(rests[-1], moved, batches)
                if seen < lowest:
                    best, lowest = moved, seen
            bar.update(number, {"loss": lowest})
        return TrainedPath({**last, **best}, before, lowest)

    def total(self, rest: PathWeights, moved: PathWeights, batches: CalibrationBatches) -> float:
        """The loss over all batches, each weighed by its valid rows."""
        losses, rows = [], []
        for batch in batches():
            losses.append(float(self._loss(moved, rest, self._read(batch))))
            rows.append(float(np.sum(batch["valid"])))
        return float(np.average(losses, weights=rows))

    def _read(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        read = {"given": batch[self.path.input.name], "valid": jnp.asarray(batch["valid"])}
        if self.how.kind == "router":
            return read | {"whole": self.whole.weights}
        return read | {"label": batch[self.task.name]}

    def _stage(self, step: int, stages: int) -> int:
        half = self.how.steps / 2
        return stages - 1 if step >= half else int((stages - 1) * step / half)

    def _looks(self) -> set[int]:
        # Not before the last stage has begun: until then more experts help than the path has.
        half = self.how.steps // 2
        return {self.how.steps - i * (self.how.steps - half) // LOOKS for i in range(LOOKS)}


def _forever(batches: CalibrationBatches) -> Iterator[Mapping[str, Any]]:
    while True:
        yield from batches()


def staged(layers: scores.Layers, score: str, kept: scores.Kept) -> list[scores.Kept]:
    """Choices of experts on the way from all that can be asked for to `kept`, the last one.

    Of those that leave, the ones of the highest score leave last.
    """
    ways: list[scores.Kept] = []
    for stage in range(1, STAGES + 1):
        now = dict[str, tuple[int, ...]]()
        for name, layer in layers.items():
            most, fewest = len(layer.within), len(kept[name])
            count = round(most * (fewest / most) ** (stage / STAGES))
            first = scores.uniform({name: layer}, score, max(count, 1))[name]
            others = [e for e in first if e not in kept[name]][: max(count - fewest, 0)]
            now[name] = tuple(sorted({*kept[name], *others}))
        ways.append(now)
    return [*ways[:-1], dict(kept)]


def progressively(
    whole: TaskPath,
    plan: Plan,
    found: Calibration,
    kind: NoviceKind,
    remove: Remove,
    batches: CalibrationBatches,
    layers: Callable[[Calibration], scores.Layers],
    bar: Bar,
) -> tuple[TaskPath, Calibration]:
    """The path whose layers lost their experts one after the other, and what was measured.

    A layer keeps as many experts as the plan says, chosen and replaced by statistics behind the
    layers before it that have lost theirs. layers: candidates by statistics. bar: of layers.
    """
    everything = {name: layer.kept for name, layer in whole.layers.items()}
    kept, now, seen = dict(plan.kept), dict(everything), found
    path, behind = whole, False
    for number, (name, layer) in enumerate(whole.layers.items(), start=1):
        bar.update(number)
        if behind:
            again = calibrate(path, batches(), found.fingerprint, moments=kind.moments)
            seen = replace(
                seen,
                layers=seen.layers | again.layers,
                moments=seen.moments | again.moments,
            )
            if plan.score in scores.SELECTIONS:
                one = {name: layers(seen)[name]}
                kept[name] = scores.uniform(one, plan.score, len(plan.kept[name]))[name]
        if set(kept[name]) == set(layer.kept):
            continue
        now[name], behind = kept[name], True
        path = remove(whole, replace(plan, kept=dict(now)), seen, kind)
    return path, seen


@dataclass(frozen=True)
class Lost:
    """What recovery works on: a path that lost experts, and what decided which.

    whole, plan, found, kind, remove: as the path was made of them.   batches: of calibration
    examples, the same each time.   layers: candidates by statistics.   head: where the task's head
    lies.
    """

    whole: TaskPath
    plan: Plan
    found: Calibration
    kind: NoviceKind
    remove: Remove
    batches: CalibrationBatches
    layers: Callable[[Calibration], scores.Layers]
    task: Task
    head: str


def recovered(lost: Lost, path: TaskPath, how: Recovery, console: Console) -> Recovered:
    """The path after recovery; itself where nothing was lost."""
    if path.exact:
        return Recovered(path, lost.found, {})
    return RECOVERIES[how.kind](lost, path, how, console)


def _none(lost: Lost, path: TaskPath, how: Recovery, console: Console) -> Recovered:
    return Recovered(path, lost.found, {})


def _progressive(lost: Lost, path: TaskPath, how: Recovery, console: Console) -> Recovered:
    given = lost.whole, lost.plan, lost.found, lost.kind, lost.remove, lost.batches, lost.layers
    title = f"measure again {path.task}"
    with console.progress(title, len(lost.whole.layers), unit="layers") as bar:
        again, found = progressively(*given, bar)
    measured = [name for name in found.layers if found.layers[name] is not lost.found.layers[name]]
    return Recovered(again, found, {"kind": how.kind, "layers_measured_again": sorted(measured)})


def _router(lost: Lost, path: TaskPath, how: Recovery, console: Console) -> Recovered:
    names = routers_of(path)
    trainer = PathTrainer(path, lost.whole, names, lost.task, how)
    with console.progress(f"teach the routers of {path.task}", how.steps) as bar:
        trained = trainer([path.weights], lost.batches, bar)
    made = replace(path, weights=trained.weights)
    return Recovered(made, lost.found, stated(how, names, path, trained))


def _finetune(lost: Lost, path: TaskPath, how: Recovery, console: Console) -> Recovered:
    names, trial = tuned(lost.whole, how.trains, lost.head), trial_of(lost)
    trainer = PathTrainer(trial.path, lost.whole, names, lost.task, how)
    with console.progress(f"fine-tune {path.task}", how.steps) as bar:
        trained = trainer(stages_of(lost, trial), lost.batches, bar)
    # With the stand-ins that it was trained with: measured again they would be others.
    weights = {name: trained.weights[name] for name in lost.whole.weights}
    moved = replace(lost.whole, weights=weights)
    made = lost.remove(moved, lost.plan, lost.found, lost.kind)
    return Recovered(made, lost.found, stated(how, names, lost.whole, trained))


def trial_of(lost: Lost) -> Trial:
    """The path on trial, on which experts can leave in stages."""
    widths = {name: usage.output_ED.shape[1] for name, usage in lost.found.layers.items()}
    cut = lost.plan.novices == "cut"
    return Trial(lost.whole, widths, 0 if cut else lost.kind.rank, cut=cut)


def stages_of(lost: Lost, trial: Trial) -> list[dict[str, Any]]:
    """All weights of the trial at every stage."""
    ways = staged(lost.layers(lost.found), lost.plan.score, dict(lost.plan.kept))
    return [{**trial.fixed, **trial.arrays(k, lost.found, lost.kind)} for k in ways]


RECOVERIES: dict[str, Callable[[Lost, TaskPath, Recovery, Console], Recovered]] = {
    "none": _none,
    "progressive": _progressive,
    "router": _router,
    "finetune": _finetune,
}


def stated(
    how: Recovery, names: Sequence[str], path: TaskPath, trained: TrainedPath
) -> dict[str, Any]:
    """What a certificate says of training."""
    scalars = sum(int(np.prod(path.weights[name].shape)) for name in names)
    return {
        **asdict(how),
        "trained_arrays": len(names),
        "trained_scalars": scalars,
        "calibration_loss_before": trained.before,
        "calibration_loss_after": trained.after,
    }
