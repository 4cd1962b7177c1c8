"""From a configuration to everything a run needs: mesh, data, tasks, model builder, optimiser."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from moezoo.errors import UserError
from moezoo.models.shared.config import traits
from moezoo.nn import module
from moezoo.tasks import registry
from moezoo.tasks.base import Task
from moezoo.train import config as configs
from moezoo.train import mesh as meshes
from moezoo.train import optim, placement, restore, state, step, together, zoo
from moezoo.train.config import Config
from moezoo.train.domain import Classes, Domain, check_kinds

NONE = Classes()


class Setup(NamedTuple):
    """What training and evaluation share; without a validation split, `valid` is None."""

    config: Config
    mesh: jax.sharding.Mesh
    tasks: tuple[Task, ...]
    domain: Domain
    classes: Classes
    train: Any
    test: Any
    valid: Any
    build: Callable[[], Any]
    optimiser: optax.GradientTransformation

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tasks, numbered as the model numbers them."""
        return tuple(task.name for task in self.tasks)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of what a token's task number counts in records."""
        return self.classes.groups or self.names

    @property
    def truths(self) -> tuple[str, ...]:
        """What their scores compare with, which an evaluation's batches hold."""
        return tuple(task.truth for task in self.tasks)


def make_tasks(config: Config, classes: Classes = NONE) -> tuple[Task, ...]:
    """The configured tasks in the order of their domain's table, with the data set's classes.

    Raises UserError for a task that the model is not made for.
    """
    check_kinds(config)
    table = config.data.domain.tasks
    tasks = tuple(
        registry.make(table, classes.given(name, config), config.train.weights.get(name))
        for name in registry.in_order(config.tasks, table)
    )
    for task in tasks:
        reason = traits(config.model).unfit(task)
        if reason:
            raise UserError(
                f"{type(config.model).__name__} {reason}: leave it out of --tasks, or take another "
                "model."
            )
    return tasks


def make_builder(config: Config, tasks: tuple[Task, ...]) -> Callable[[], Any]:
    """A function that builds the configured model, initial values decided by the seed."""
    channels = {task.name: task.channels for task in tasks}
    size = config.data.domain.size(config)
    return lambda: config.model.build(channels, size, nnx.Rngs(config.seed))


def prepare(config: Config) -> Setup:
    """Check the configuration against this machine, open (or render) the data, make the mesh.

    Raises UserError where parts of the configuration disagree or the data cannot be had.
    """
    configs.validate(config, jax.device_count())
    mesh = meshes.make_mesh(config.mesh)
    domain = config.data.domain
    splits = ("train", "test", "valid") if domain.validated else ("train", "test")
    # Process 0 makes what is missing while the others wait: on a disk that they share, once.
    opened = together.first_alone(lambda: {split: domain.open(config, split) for split in splits})
    for split, source in opened.items():
        if len(source) == 0:
            raise UserError(
                f"The data set {config.data.name} has no examples in its {split} split."
            )
    train, test, valid = opened["train"], opened["test"], opened.get("valid")
    classes = domain.classes(config, train)
    tasks = make_tasks(config, classes)
    configs.check_losses(config, len(classes.groups or tasks))
    domain.check_labels(tasks, test)
    build = make_builder(config, tasks)
    optimiser = make_optimiser(config)
    return Setup(config, mesh, tasks, domain, classes, train, test, valid, build, optimiser)


def amounts(setup: Setup) -> str:
    """How much there is to train and to test on, in the domain's own words."""
    amount = setup.domain.amount
    return f"{amount(setup.train, 'training')} and {amount(setup.test, 'test')}"


def described(setup: Setup, params: Any) -> str:
    """What is about to be trained, on what, in one line."""
    shape = " x ".join(f"{axis} {n}" for axis, n in setup.mesh.shape.items() if n > 1) or "1 device"
    return (
        f"{setup.config.name}: {module.count(params):,} parameters, "
        f"tasks {', '.join(setup.names)}, {amounts(setup)}, {jax.default_backend()} ({shape})"
    )


def make_optimiser(config: Config) -> optax.GradientTransformation:
    """The configured optimiser; with normalised gradients its moments know the tasks' shares."""
    if config.train.task_gradients == "as_is":
        return optim.build(config.optimiser, config.train.steps)
    adam = optim.scale_by_shared_adam
    return optim.build(config.optimiser, config.train.steps, adam)


def extra_state(config: Config, tasks: int) -> Callable[[], step.Tree]:
    """What the state holds besides the model and its optimiser: sigmas of learned task weights."""
    return partial(state.sigmas, tasks) if config.train.task_weighting == "learned" else dict


def make_update(
    config: Config,
    definition: Any,
    tasks: tuple[Task, ...],
    optimiser: optax.GradientTransformation,
    shardings: step.Tree,
    groups: int | None = None,
) -> step.Update:
    """The configured training step, `(state, batch) -> (state, metrics)`.

    groups: how many tasks tokens are numbered by, where those are not `tasks`.
    """
    adapt = optim.as_is
    if config.train.task_gradients == "normalised":
        shares = config.data.domain.shares(config)
        assert shares is not None  # `validate` refuses others
        adapt = optim.normalised(tasks, shares)
    return step.make_step(
        definition,
        make_loss(config, definition, tasks, groups),
        optimiser,
        shardings,
        config.seed,
        config.train.gradient_accumulation,
        adapt,
        step.where_sound if config.train.nonfinite_steps else step.always,
        lay_gradients(config, shardings),
    )


def make_loss(
    config: Config, definition: Any, tasks: tuple[Task, ...], groups: int | None = None
) -> Callable:
    """The loss of the configured training step, as `step.make_loss` has it."""
    weights = {name: getattr(config.train, f"{name}_weight") for name in step.BALANCE}
    made = step.make_loss(definition, tasks, weights, config.data.domain.read, groups)
    return step.REMATERIALISED[config.train.rematerialise](made)


def make_rules(config: Config) -> placement.Rules:
    """Where every array of the run's state lies."""
    return placement.TABLES[config.optimiser.split]


def lay_gradients(config: Config, shardings: step.Tree) -> Callable[[step.Tree], step.Tree]:
    """Where the step's gradients lie; the mesh is that of `shardings`."""
    if config.optimiser.split == "with_parameters":
        return step.where_they_are
    return placement.like_moments(shardings["step"].mesh, make_rules(config))


def classes_of(path: Path, config: Config) -> Classes:
    """What the labels mean that a run, or a saved model, was trained on."""
    path, domain = zoo.located(path), config.data.domain
    if zoo.holds(path):
        classes, count = zoo.read_about(path).classes, domain.groups(config)
        if None not in (classes.groups, count) and len(classes.groups or ()) != count:
            raise UserError(
                f"{path / zoo.ABOUT} is damaged (it has {len(classes.groups or ())} groups, the "
                f"model {count}): {zoo.AGAIN}."
            )
        return classes
    return domain.classes(config, domain.open(config, "test"))


class Loaded(NamedTuple):
    """A trained model and what it was trained on."""

    config: Config
    tasks: tuple[Task, ...]
    model: Any
    step: int


def load_run(path: Path, classes: Classes | None = None) -> Loaded:
    """The model of a run's newest valid checkpoint, whole on this process's first device.

    classes: the data set's; without them it is opened, and a saved model says them itself. Raises
    UserError where the folder holds no run, or a checkpoint of another model.
    """
    config = restore.read_config(path)
    tasks = make_tasks(config, classes_of(path, config) if classes is None else classes)
    parts = module.abstract(make_builder(config, tasks))
    loaded = restore.load_params(path, {"params": parts.params, "stats": parts.stats})
    model = module.merge(parts.definition, loaded["params"], loaded["stats"])
    return Loaded(config, tasks, model, loaded["step"])
