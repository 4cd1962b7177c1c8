"""From a configuration to everything a run needs: mesh, data, tasks, model builder, optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from moezoo.domains.images import training as domains
from moezoo.domains.images.tasks.edges import odsf
from moezoo.domains.pairs import tasks as similar
from moezoo.domains.pairs.data.config import PairsDataConfig
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.tasks import registry as task_registry
from moezoo.tasks.base import Task
from moezoo.train import config as configs
from moezoo.train import mesh as meshes
from moezoo.train import optim, restore, state, step, together
from moezoo.train.config import Config
from moezoo.train.domain import Classes, Domain


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


Names = Mapping[str, Sequence[str]]


def make_tasks(
    config: Config,
    classes: Mapping[str, int],
    names: Names | None = None,
    colours: Mapping[str, np.ndarray] | None = None,
) -> tuple[Task, ...]:
    """The configured tasks in the registry's order, with the data set's numbers of classes.

    `names` and `colours` of the classes appear in pictures. Raises UserError for a task that the
    model is not made for.
    """

    domains.check_kinds(config)

    def settings(name: str) -> dict[str, Any]:
        if name == domains.LM:
            return _settings_of_text(config, classes, names or {})
        given: dict[str, Any] = {"classes": classes[name]} if name in classes else {}
        if name in ("scene", "text_scene", *task_registry.SOUND):
            given["names"] = (names or {}).get(name, ())
        if name in ("semseg", "parts"):
            given["class_balance"] = config.train.class_balance
            given |= {"names": (names or {}).get(name, ()), "colours": (colours or {}).get(name)}
        if name == "saliency":
            given["channels"] = config.protocol.saliency_channels
        if name == "edge":
            given["positive_weight"] = config.protocol.edge_positive_weight
            own = odsf.OF_DATA.get(config.data.name, "rooms")
            given["protocol"] = config.protocol.edge or own
        weight = config.train.weights.get(name)
        return given if weight is None else given | {"weight": weight}

    kinds = similar.TASKS if _has_pairs(config) else task_registry.TASKS
    tasks = tuple(
        task_registry.build(name, kinds, **settings(name))
        for name in task_registry.in_order(config.tasks)
    )
    for task in tasks:
        _check_kind(config, task)
    return tasks


def _has_pairs(config: Config) -> bool:
    return isinstance(domains.of(config), domains.Pairs)


def _settings_of_text(config: Config, classes: Mapping[str, int], names: Names) -> dict[str, Any]:
    # Continuous text has no answers to match.
    headline = "loss" if config.data.name == "corpus" else "exact_match"
    weight = config.train.weights.get(domains.LM)
    own = {"vocabulary": classes[domains.LM], "tasks": tuple(names[domains.LM])}
    return own | {"headline": headline} | ({} if weight is None else {"weight": weight})


def _check_kind(config: Config, task: Task) -> None:
    """UserError where a classifier meets a task on pixels, or the other way round."""
    if task.name == domains.LM or task.per_pixel == getattr(config.model, "per_pixel", True):
        return
    model = type(config.model).__name__
    if task.per_pixel:
        raise UserError(
            f"{model} classifies whole images, but task {task.name} is predicted for every pixel: "
            "take --tasks scene, or another model."
        )
    raise UserError(
        f"{model} predicts every pixel, but task {task.name} is one class for the whole image: "
        "leave it out of --tasks, or take another model, for example that of rooms/vmoe_tiny."
    )


def make_builder(config: Config, tasks: tuple[Task, ...]) -> Callable[[], Any]:
    """A function that builds the configured model, initial values decided by the seed."""
    channels = {task.name: task.channels for task in tasks}
    size = domains.of(config).size(config)
    return lambda: config.model.build(channels, size, nnx.Rngs(config.seed))


def prepare(config: Config) -> Setup:
    """Check the configuration against this machine, open (or render) the data, make the mesh.

    Raises UserError where parts of the configuration disagree or the data cannot be had.
    """
    configs.validate(config, jax.device_count())
    mesh = meshes.make_mesh(config.mesh)
    domain = domains.of(config)
    splits = ("train", "test", "valid") if domain.validated else ("train", "test")
    # Process 0 makes what is missing while the others wait: on a disk that they share, once.
    opened = together.first_alone(lambda: {split: domain.open(config, split) for split in splits})
    train, test, valid = opened["train"], opened["test"], opened.get("valid")
    classes = domain.classes(train)
    tasks = make_tasks(config, classes.counts, classes.names, classes.colours)
    configs.check_losses(config, len(classes.groups or tasks))
    domain.check_labels(tasks, test)
    build = make_builder(config, tasks)
    optimiser = make_optimiser(config)
    return Setup(config, mesh, tasks, domain, classes, train, test, valid, build, optimiser)


def described(setup: Setup, params: Any) -> str:
    """What is about to be trained, on what, in one line."""
    shape = " x ".join(f"{axis} {n}" for axis, n in setup.mesh.shape.items() if n > 1) or "1 device"
    return (
        f"{setup.config.name}: {module.count(params):,} parameters, "
        f"tasks {', '.join(setup.names)}, {len(setup.train)} training and "
        f"{len(setup.test)} test examples, {jax.default_backend()} ({shape})"
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
    weights = {name: getattr(config.train, f"{name}_weight") for name in step.BALANCE}
    adapt = optim.as_is
    if config.train.task_gradients == "normalised":
        assert isinstance(config.data, PairsDataConfig)  # `validate` refuses others
        adapt = optim.normalised(tasks, config.data.shares.of(config.tasks))
    return step.make_step(
        definition,
        step.make_loss(definition, tasks, weights, domains.of(config).read, groups),
        optimiser,
        shardings,
        config.seed,
        config.train.gradient_accumulation,
        adapt,
    )


class Loaded(NamedTuple):
    """A trained model and what it was trained on."""

    config: Config
    tasks: tuple[Task, ...]
    model: Any
    step: int


def load_run(
    path: Path,
    classes: Mapping[str, int] | None = None,
    names: Names | None = None,
    colours: Mapping[str, np.ndarray] | None = None,
) -> Loaded:
    """The model of a run's newest valid checkpoint, whole on this process's first device.

    `classes` are the data set's numbers of classes, `names` and `colours` theirs; without numbers
    the data set is opened.
    Raises UserError where the folder holds no run, or a checkpoint of another model.
    """
    config = restore.read_config(path)
    if classes is None:
        domain = domains.of(config)
        found = domain.classes(domain.open(config, "test"))
        classes, names, colours = found.counts, found.names, found.colours
    tasks = make_tasks(config, classes, names, colours)
    parts = module.abstract(make_builder(config, tasks))
    loaded = restore.load_params(path, {"params": parts.params, "stats": parts.stats})
    model = module.merge(parts.definition, loaded["params"], loaded["stats"])
    return Loaded(config, tasks, model, loaded["step"])
