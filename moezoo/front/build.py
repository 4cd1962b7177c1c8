"""Where a model comes from: made by name, loaded from a folder, or trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moezoo import fields
from moezoo.deploy import stream
from moezoo.deploy.inference import names_of
from moezoo.deploy.pinned import ExpertPlace
from moezoo.deploy.runtime.load import Predictor
from moezoo.errors import UserError
from moezoo.front import catalogue
from moezoo.front.card import exported, open_export, scores_of
from moezoo.front.model import StreamedModel, ZooModel
from moezoo.models.shared.config import traits
from moezoo.nn import module
from moezoo.tasks.base import Task
from moezoo.train import restore, start, zoo
from moezoo.train.config import Config, UpcycleConfig
from moezoo.train.config_file import FOLDERS, find
from moezoo.train.config_file import load as load_config
from moezoo.train.console import Console
from moezoo.train.domain import Classes, check_kinds
from moezoo.train.overrides import replaced
from moezoo.train.setup import Loaded, load_run, make_builder, make_tasks
from moezoo.weights import hub

PARTS = (restore.FOLDER, restore.ARRAYS)  # of a run's folder, and of one of its checkpoints
Tasks = Mapping[str, int] | Sequence[str]


def create(
    name: str,
    *,
    tasks: Tasks | None = None,
    image_size: tuple[int, int] | None = None,
    pretrained: str | Path | None = None,
    seed: int = 0,
    **changes: Any,
) -> ZooModel:
    """A model of the zoo by name, see `list_models`.

    tasks: what it predicts: names, or names with their numbers of output channels (classes);
    default: the tasks of its configuration.   image_size: height and width in pixels.
    pretrained: None for fresh weights decided by `seed`; the name of data whose weights come with
    the package, such as "rooms"; or the path of a run, a saved model or a pretrained model of
    others (`configs/README.md`; also `hf:owner/name`), of which everything that fits is taken.
    changes: sections of the configuration with what is to differ, such as `model={"experts": 8}`.

    Raises UserError with the nearest names for anything unknown, and where parts do not fit.
    """
    tasks = names_of(tasks) if isinstance(tasks, str) else tasks
    _check_given(tasks, image_size, pretrained)
    if "start_from" in changes:
        raise UserError("start_from is given: name what a model begins with as `pretrained`.")
    name = str(name)
    full = catalogue.full_name(name, None if tasks is None else list(tasks))
    config = replaced(catalogue.configuration(full), {"seed": seed, **changes})
    if image_size is not None:
        size = tuple(image_size)
        config = replace(config, data=config.data.domain.resized(size))
    config = config if tasks is None else replace(config, tasks=tuple(tasks))
    path = None if pretrained is None else _weights(full, pretrained)
    config = replace(config, start_from=None, start_heads=config.start_heads if path else None)
    config = config if path else replace(config, start_without=(), upcycle=UpcycleConfig())
    check_kinds(config)
    traits(config.model).check_size(config.data.domain.size(config))
    classes = _classes(config, tasks)
    made = make_tasks(config, classes)
    _check_channels(made, tasks)
    start.check_bank(config, path)
    parts = module.create(make_builder(config, made))
    state, origin = {"params": parts.params, "stats": parts.stats}, f"fresh, seed {seed}"
    if path is not None:
        start.check(path, config)
        start.check_fits(path, config)
        state, origin = start.started(path, config, state, parts.definition)
        state = start.completed(config, state, classes.groups or tuple(t.name for t in made))
    model = module.merge(parts.definition, state["params"], state["stats"])
    about = zoo.About(0, origin, classes)
    return ZooModel(full, Loaded(config, made, model, 0), about)


def _check_given(tasks: Any, image_size: Any, pretrained: Any) -> None:
    """UserError for arguments of another type."""
    if tasks is not None:
        given = tuple(tasks) if isinstance(tasks, Mapping | list | tuple | set) else tasks
        fields.check_value(tuple[str, ...], given, "tasks")
    if image_size is not None and not (
        isinstance(image_size, tuple | list) and len(image_size) == 2
    ):
        raise UserError(f"image_size is {image_size!r:.60}; give height and width: (224, 224).")
    if pretrained is not None and not isinstance(pretrained, str | Path):
        raise UserError(
            f"pretrained is {pretrained!r:.60}; give the name of data whose weights come with the "
            'package, such as "rooms", or a path.'
        )


def _weights(name: str, pretrained: str | Path) -> Path:
    """The folder or file of weights; UserError where there is none."""
    short = name.rpartition("/")[2]
    if hub.is_hub(pretrained):
        return hub.folder(pretrained)
    here = zoo.ZOO / str(pretrained) / short
    if zoo.holds(here):
        return here
    path = zoo.located(pretrained)
    if path.exists():
        return path
    group = [one for one in zoo.names() if one.rpartition("/")[2] == short]
    there = (
        f"weights that come with {short}: {', '.join(group)}"
        if group
        else (f"no weights come with {short}, only with {', '.join(zoo.names())}")
    )
    raise UserError(f"pretrained is '{pretrained}', which is no folder or file here; {there}.")


def _classes(config: Config, tasks: Tasks | None) -> Classes:
    """What labels mean: the data set's, but for tasks that are given with other numbers."""
    known = config.data.domain.example(config)[1]
    if not isinstance(tasks, Mapping):
        return known
    counts = {**known.counts, **tasks}
    same = {task for task in counts if known.counts.get(task) == counts[task]}
    return Classes(
        counts,
        {task: names for task, names in known.names.items() if task in same},
        known.groups,
        {task: colours for task, colours in known.colours.items() if task in same},
    )


def _check_channels(made: Sequence[Task], tasks: Tasks | None) -> None:
    if not isinstance(tasks, Mapping):
        return
    for task in made:
        if task.channels != tasks[task.name]:
            raise UserError(
                f"Task {task.name} has {task.channels} output channels, not {tasks[task.name]}: "
                "its form decides them; only tasks with classes can have another number."
            )


def load(path: str | Path) -> ZooModel | Predictor:
    """What lies in a folder: a run, a saved model, an export, or a Hugging Face decoder.

    path: the folder; or the name of a model whose weights come with the package
    (`list_models(pretrained=True)`), or `hf:owner/name@revision` on the Hugging Face Hub. An export
    gives a `Predictor`, called with a batch like a model. Raises UserError where nothing is there
    that can be read.
    """
    if not isinstance(path, str | PathLike):  # a place in a store is the latter
        raise UserError(f"What is to be loaded is {path!r:.60}; give a folder or a name.")
    fields.check_value(fields.FilePath, str(path), "What is to be loaded")
    folder = hub.folder(path) if hub.is_hub(path) else zoo.located(path)
    if not folder.exists():
        raise UserError(_nothing(str(path)))
    if exported(folder):
        return open_export(folder)
    if zoo.holds(folder):
        return ZooModel(str(path), load_run(folder), zoo.read_about(folder))
    if folder.is_file() and zoo.holds(folder.parent):
        raise UserError(f"{folder} is a file of a saved model: name its folder, {folder.parent}.")
    owner = start.owner(folder)
    if owner is not None:
        owner.pretrained.look(folder)  # a file that is no such model is said to be none
        loaded, classes = owner.pretrained.loaded(folder)
        return ZooModel(folder.name, loaded, zoo.About(0, f"the weights in {folder}", classes))
    if not any((folder / name).is_dir() for name in PARTS):
        raise UserError(
            f"{folder} is not an exported folder, a run, a saved model or a Hugging Face decoder: "
            "name one of these."
        )
    config = restore.read_config(folder)
    classes = config.data.domain.example(config)[1]  # the data themselves may be elsewhere
    loaded = load_run(folder, classes)
    origin = f"{config.name}, step {loaded.step}"
    about = zoo.About(loaded.step, origin, classes, scores_of(folder, loaded.step))
    return ZooModel(config.name, loaded, about)


def streamed(
    model: str | Path | ZooModel,
    weights_file: str | Path | None = None,
    place: ExpertPlace = "file",
) -> StreamedModel:
    """A model whose experts are read from a file one by one, two of them in memory at a time.

    model: a saved model's folder or a name, whose file is read where it lies; or a run, or a model
    in memory, whose arrays are first written to `weights_file` as they are (a temporary file by
    default, which goes with the model). place: `pinned_host` keeps experts that were read once in
    memory of the host that an accelerator reads by itself, where there is such. Raises UserError
    for what cannot be streamed: decoders, exports, and models without stacked experts.
    """
    if weights_file is not None and Path(weights_file).exists():
        raise UserError(f"{weights_file} exists already: name a new file of weights.")
    if not isinstance(model, ZooModel):
        folder = zoo.located(model)
        if zoo.holds(folder) and weights_file is None:
            run = stream.opened(folder)
            return StreamedModel(str(model), run, zoo.read_about(folder), None, place)
        found = load(model)
        if not isinstance(found, ZooModel):
            raise UserError(
                f"{model} is an export, whose program has all of its weights: name the run or the "
                "saved model that it was cut out of."
            )
        model = found
    owned = TemporaryDirectory(prefix="moezoo-") if weights_file is None else None
    file = Path(owned.name, zoo.WEIGHTS) if owned else Path(str(weights_file))
    moved = stream.moved(model._loaded, file)
    return StreamedModel(model.name, moved, model.about, owned, place)


def _nothing(name: str) -> str:
    """What is said of a name that is no folder, and none of the package's weights."""
    if said := zoo.without_weights(name):
        return said
    near = get_close_matches(name, zoo.names(), n=2)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else (f"name a folder, or one of {', '.join(zoo.names())}.")
    )
    return f"There is nothing at '{name}', and no weights of that name come with moezoo: {hint}"


def train(config: Config | str | Path, **changes: Any) -> ZooModel:
    """Train a configuration to its end, and load what it has learned.

    config: a `Config`, or the name or path of a configuration file.   changes: sections with what
    is to differ, and fields beside them: `train(name, train={"steps": 200}, seed=1)`. Everything
    that `python train.py` leaves is in `<directory>/<name>/`; an interrupted run goes on. Raises
    UserError for what cannot work.
    """
    from moezoo.train import loop
    from moezoo.train.report import write_report

    own = isinstance(config, Config)
    file = None if own else find(str(config), FOLDERS)
    console = Console()
    chosen = replaced(config if own else load_config(str(config)), changes)
    if "start_from" in changes:
        start.check_named(chosen)
    finished = loop.train(chosen, console, file=file)
    write_report(finished, console)
    model = load(finished.directory)
    assert isinstance(model, ZooModel)
    return model
