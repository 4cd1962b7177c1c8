"""Beginning a run from what another run, or a pretrained model, has learned.

Parameters of the same name, or experts out of one MLP. Which pretrained models there are is the
domains' knowledge (`domain.Pretrained`). A configuration that is named instead stands for the
weights that come with the package; one that has none is trained first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moezoo import registry, storage
from moezoo.errors import UserError
from moezoo.models.shared.config import traits
from moezoo.nn import module
from moezoo.nn.module import Tree, flatten, unflatten
from moezoo.nn.upcycle import ROUTER, Beginning, Carried, Shapes, carry_over, copied
from moezoo.train import config_file, manifest, restore, saved, takeover, upcycling, zoo
from moezoo.train.console import Console
from moezoo.train.domain import Domain
from moezoo.train.resume import finished
from moezoo.train.schema import Config
from moezoo.train.setup import make_builder, make_tasks
from moezoo.weights import hf_files, hub, library_start
from moezoo.weights.library import MANIFEST, Library

GROUPS = ("params", "stats")
UPDATE, ADAPTER = "/update/", "/adapter/"
PROGRAM = "model.stablehlo"  # the file by which an export is told from other folders of weights
Train = Callable[..., Any]  # of a configuration, a console and `file`


def check(path: Path | str, config: Config) -> None:
    """UserError where there is nothing to start from, before anything else is made."""
    wanted = f"a run's folder or {config.data.domain.pretrained.wanted}"
    if not str(path).strip() or str(path) == ".":
        raise UserError(f"start_from is empty: name {wanted}, or leave it out.")
    path = zoo.located(path)
    if not path.exists():
        raise UserError(
            f"start_from is {path}, but there is no such folder, file or configuration; name "
            f"{wanted}."
        )
    if (path / MANIFEST).is_file():
        raise UserError(
            f"start_from is {path}, a library of LoRAs, which has no base in it: start from its "
            "base, and give the library to a model that takes one (MeteoRA, --model.library)."
        )
    if (path / PROGRAM).is_file():
        raise UserError(
            f"start_from is {path}, which is an export: name the folder of the run that it was "
            "exported from."
        )


def owner(path: Path | str) -> Domain | None:
    """The domain whose pretrained model lies at `path`; None for a run, and for nobody's."""
    every = (kind().domain for kind in registry.DOMAINS.all())
    domains = sorted(every, key=lambda domain: domain.pretrained.last_resort)
    place = zoo.located(path)
    return next((domain for domain in domains if domain.pretrained.knows(place)), None)


def check_fits(path: Path | str, config: Config) -> None:
    """UserError where pretrained weights are another kind of model than the configured one, have
    other sizes, or hold what the model has no place for.
    """
    path = zoo.located(path)
    own, given = config.data.domain, owner(path)
    wanted = own.pretrained.wanted
    if given is None:
        _check_options(path, config)
        if hf_files.holds_model(path):
            kind = hf_files.model_type(path)
            said = "does not say model_type" if kind is None else f"has model_type '{kind}'"
            raise UserError(
                f"start_from is {path}, whose config.json {said}; {config.name} can begin with "
                f"{wanted}, or a run's folder."
            )
        return _check_run(path, config)
    if given.name != own.name:
        given.pretrained.look(path)  # whatever is wrong with the file itself comes first
        raise UserError(
            f"start_from is {path}, {given.pretrained.what}, but {config.name} reads {own.name}: "
            f"name a run's folder or {wanted}."
        )
    if not given.pretrained.has_options:
        _check_options(path, config)
    given.pretrained.check(path, config)
    if traits(config.model).held() is not None:
        named = f"{given.pretrained.what} in {path}"
        takeover.check_held(config, upcycling.shapes_of(parts_of(config)), {}, named)
    if upcycling.changed(config.upcycle):
        learned = given.pretrained.shapes(path)
        upcycling.check(config, parts_of(config), learned, f"{given.pretrained.what} in {path}")


def parts_of(config: Config) -> module.ModuleParts:
    """The configured model, shapes for arrays; no data are opened."""
    _, classes = config.data.domain.example(config)
    return module.abstract(make_builder(config, make_tasks(config, classes)))


def _check_options(path: Path | str, config: Config) -> None:
    if config.start_heads is not None or config.start_without:
        raise UserError(
            f"start_heads and start_without are for pretrained networks of others, and {path} is "
            "none that has them: leave them out."
        )


def _check_run(path: Path | str, config: Config) -> None:
    learned = partial(takeover.shapes_of_run, Path(path))
    if zoo.holds(path):
        return check_first(restore.read_config(path), f"the model in {path}", config, learned)
    restore.find(path, say=lambda sentence: None)
    try:
        first = restore.read_config(path)
    except UserError:  # a model that is not known here, or no run: its reading will say
        return
    check_first(first, f"the run in {path}", config, learned)


def check_first(
    first: Config, what: str, config: Config, learned: Callable[[], Shapes] | None = None
) -> None:
    """UserError where a run of the configuration `first` is nothing that `config` can begin with.

    what: that run, for the messages.   learned: gives the shapes of its arrays, by default those of
    a run still to come. Parameters of other domains, and such of the same shapes that compute
    something else, are refused: shapes alone would let some of them pass. So are runs without what
    `config` holds still.
    """
    own, other = config.data.domain, first.data.domain.name
    known = own.name, *own.pretrained.runs_on
    if other not in known:
        raise UserError(
            f"{config.name} is a run on {own.name}, but {what} is one on {other}: start from a "
            f"run on {' or '.join(known)}, or {own.pretrained.wanted}."
        )
    ours, theirs = (
        {f"model.{name}": value for name, value in traits(one.model).computes().items()}
        for one in (config, first)
    )
    takeover.check_values(ours, theirs, what)
    if traits(config.model).computes_in():
        wanted = upcycling.shapes_of(parts_of(config))
        found = upcycling.shapes_of(parts_of(first)) if learned is None else learned()
        takeover.check_same(config, wanted, first, found, what)
        takeover.check_held(config, wanted, found, what)
    if upcycling.changed(config.upcycle):
        shapes = upcycling.shapes_of(parts_of(first))
        if other != own.name:  # zeros that take no memory
            zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
            shapes = {path: array.shape for path, array in own.pretrained.of_run(zeros).items()}
        upcycling.check(config, parts_of(config), shapes, what)


def started(
    path: Path | str,
    config: Config,
    state: Tree,
    definition: Any = None,
    batches: upcycling.FirstBatches | None = None,
) -> tuple[Tree, str]:
    """The state that begins with what lies at `path`, and what was taken, in one sentence.

    definition: of the model, and batches: of its training data, both for `config.upcycle` only.
    Raises UserError where there is nothing, and where nothing of it fits.
    """
    given, beginning = owner(path), upcycling.beginning(config)
    if given is None:
        found = read(path)
        found["params"] = config.data.domain.pretrained.of_run(found["params"])
        begun, carried = begin(found, state, beginning)
        begun, more = upcycling.finished(config, definition, begun, carried.layers, batches)
        return begun, summary(str(path), carried, bank_of(config)) + more
    place = zoo.located(path)
    leaves = flatten(state["params"]) | flatten(state["stats"])
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    arrays = given.pretrained.arrays(place, config, shapes)
    if arrays is None:
        placed = given.pretrained.place(place, state)
        return placed, f"Starting from {given.pretrained.what} in {path}."
    if not arrays:
        raise UserError(f"start_without leaves nothing of {path} to begin with: name less in it.")
    begun, carried = begin({"params": arrays, "stats": {}}, state, beginning)
    begun, more = upcycling.finished(config, definition, begun, carried.layers, batches)
    left = given.pretrained.left_behind(place, config)
    return begun, summary(str(path), carried) + left + more


def read(path: Path | str) -> dict[str, dict[str, Any]]:
    """`{"params": {path: array}, "stats": ...}` of a run's newest undamaged checkpoint, or of a
    saved model, of any kind. Raises UserError where there is none.
    """
    path = zoo.located(path)
    if zoo.holds(path):
        arrays = saved.read_arrays(path)
        return {group: flatten(arrays[group]) for group in GROUPS}
    folder = restore.find(path)
    held = manifest.read(folder)
    assert held is not None  # `find` has read it
    shapes = {
        name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(kind))
        for name, (shape, kind) in held.arrays.items()
        if name.partition("/")[0] in GROUPS
    }
    loaded = restore.load(folder, unflatten(shapes))
    return {group: flatten(loaded.get(group, {})) for group in GROUPS}


def begin(
    learned: dict[str, dict[str, Any]], state: Tree, beginning: Beginning = copied
) -> tuple[Tree, Carried]:
    """The state with what `learned` has for its parameters and statistics, and what was taken.

    Arrays lie where the state's lay. beginning: of experts in the place of an MLP. Raises
    UserError where no parameter fits.
    """
    everything = {**learned["stats"], **learned["params"]}
    carried = {group: carry_over(everything, state[group], beginning) for group in GROUPS}
    unused = set(everything).intersection(*(set(c.unused) for c in carried.values()))
    if set(learned["params"]) <= unused:
        raise UserError(
            "The run to start from has no parameter that fits this model: the sizes of the trunk "
            "(width, depth, heads, patch, stem) must be the same."
        )
    taken = Carried(
        {group: carried[group].params for group in GROUPS},
        carried["params"].fresh + tuple(filter(_is_frozen, carried["stats"].fresh)),
        tuple(sorted(unused)),
        carried["params"].layers,
    )

    def place(new: Any, old: jax.Array) -> jax.Array:
        return new if new is old else jax.device_put(new, old.sharding)

    begun = {group: jax.tree.map(place, carried[group].params, state[group]) for group in GROUPS}
    return state | begun, taken


def check_bank(config: Config, path: Path | str | None) -> None:
    """UserError where the library that the model takes LoRAs from is not there, or does not fit."""
    bank = traits(config.model).bank()
    if bank is None:
        return
    if path is None:
        raise UserError("model.library needs its base to begin with: name it by --start-from.")
    library, domain = Library(bank.folder), config.data.domain
    groups = domain.example(config)[1].groups
    if groups:  # first: it says which members there must be
        library_start.ordered(library, groups, domain.narrowed)
    library_start.check_form(library, bank.loras, bank.rank, bank.scale)


def completed(config: Config, state: Tree, groups: Sequence[str]) -> Tree:
    """The begun state with the LoRAs of the library that the model takes them from, if any.

    groups: the names that tokens are numbered by, which say where each task's LoRA stands.
    """
    bank = traits(config.model).bank()
    if bank is None:
        return state
    leaves = {group: flatten(state[group]) for group in GROUPS}
    given = library_start.bank_arrays(
        Library(bank.folder), groups, leaves["stats"] | leaves["params"]
    )

    def place(path: str, old: jax.Array) -> jax.Array:
        if path not in given:
            return old
        return jax.device_put(np.asarray(given[path], old.dtype), old.sharding)

    return state | {
        group: unflatten({path: place(path, old) for path, old in own.items()})
        for group, own in leaves.items()
    }


def _is_frozen(path: str) -> bool:
    """Whether a statistic is an array of a frozen base, no running mean or balancing bias."""
    return path.rpartition("/")[2] not in ("mean", "var") and not path.endswith("router/bias")


def bank_of(config: Config) -> str | None:
    """The library that gives LoRAs to the model's banks, by its folder; None where none does."""
    bank = traits(config.model).bank()
    return None if bank is None else bank.folder


def summary(run: str, carried: Carried, library: str | None = None) -> str:
    """What was taken, in one sentence.

    library: the folder that gives the factors of all low-rank updates afterwards.
    """
    total = len(flatten(carried.params))
    kinds = {UPDATE: "low-rank updates", ADAPTER: "adapters", ROUTER: "routers"}
    factors = (library_start.DOWN, library_start.UP) if library is not None else ()
    given = [path for path in carried.fresh if path.endswith(factors)]
    parts, rest = [], [path for path in carried.fresh if path not in given]
    for mark, kind in kinds.items():
        own = [path for path in rest if mark in path]
        rest = [path for path in rest if mark not in path]
        parts += [f"{len(own)} of {kind}"] if own else []
    parts += [", ".join(rest[:4]) + (", ..." if rest[4:] else "")] if rest else []
    more = f"{len(given)} come from the library {library}; " if given else ""
    return (
        f"Starting from {run}: {total - len(carried.fresh)} of {total} arrays taken over; {more}"
        f"fresh are {' and '.join(parts) or 'none'}; {_unused(carried.unused)}."
    )


def _unused(names: tuple[str, ...]) -> str:
    told = f" ({', '.join(names[:4])}{', ...' if names[4:] else ''})" if names else ""
    return f"{len(names)} of its arrays have no place here{told}"


def held_name(name: str) -> str | None:
    """The whole name of one of the package's configurations whose weights come with it; else None.

    A file `configs/NAME.py` of somebody's own goes before the package's of that name.
    """
    if Path(name).exists() or not config_file.exists(name):
        return None
    file, ours = config_file.find(name, config_file.FOLDERS).resolve(), zoo.CONFIGS.resolve()
    whole = file.with_suffix("").relative_to(ours).as_posix() if ours in file.parents else ""
    return whole if whole in zoo.names() else None


def check_named(config: Config) -> None:
    """UserError where somebody asks to start from a configuration that nobody has weights of.

    A configuration's own `start_from` is part of its recipe, and is trained first instead.
    """
    name = config.start_from
    if name is None or hub.is_hub(name) or Path(name).exists() or not config_file.exists(name):
        return
    first = config_file.load(name)
    folder = storage.place(config.directory) / first.name
    if held_name(name) is None and not finished(folder, first.train.steps):
        raise UserError(
            f"start_from is {name}, a configuration without weights: none come with the package "
            f"({', '.join(zoo.names())} have some), and {folder} is no finished run of it; train "
            f"it first (moezoo train {name})."
        )


def with_start(config: Config, console: Console, train: Train) -> Config:
    """The configuration with a folder where `start_from` named something else.

    A model on the Hub (`weights.hub`) is downloaded. A configuration whose weights come with the
    package stands for them, by its whole name (`zoo.located`), so that the run's folder means them
    on other machines too. Another one is trained first, under its own name in the same directory
    and with data in the same place, unless it was before.
    """
    name = config.start_from
    if name is not None and hub.is_hub(name):
        return replace(config, start_from=str(hub.folder(name)))
    if name is None or Path(name).exists() or not config_file.exists(name):
        return config
    if (held := held_name(name)) is not None:
        console.say(f"{config.name} starts from the weights of {held} that come with the package.")
        return replace(config, start_from=held)
    first = config_file.load(name)
    _check_options(name, config)
    check_first(first, f"the configuration {name}", config)
    data = config.data.domain.beside(first.data)
    first = replace(first, directory=config.directory, mesh=config.mesh, data=data)
    folder = storage.place(first.directory) / first.name
    if not finished(folder, first.train.steps):
        console.say(f"{config.name} starts from {name}, which is trained first, to {folder}.")
        try:
            train(first, console, file=config_file.find(name, config_file.FOLDERS))
        except UserError as error:
            raise UserError(
                f"{config.name} starts from {name}, which cannot be trained: {error} A run that is "
                "there already can be named with --start-from FOLDER."
            ) from error
    return replace(config, start_from=str(folder))
