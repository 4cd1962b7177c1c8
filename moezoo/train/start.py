"""Beginning a run from what another run, or a pretrained transformer, has learned.

Parameters of the same name, or experts out of one MLP.

Runs that begin with what another configuration learns, which is trained first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moezoo.backbones.decoder import DecoderConfig
from moezoo.domains.audio.data import fbank
from moezoo.domains.images import pretrained
from moezoo.domains.text.data.config import TextDataConfig
from moezoo.errors import UserError
from moezoo.nn.module import Tree, flatten, unflatten
from moezoo.nn.rope import RopeConfig
from moezoo.nn.upcycle import BASE, ROUTER, Carried, carry_over
from moezoo.train import config_file, manifest, restore
from moezoo.train.console import Console
from moezoo.train.resume import finished
from moezoo.train.schema import Config
from moezoo.weights import ast, conditional_names, files, hf, hf_files, vit_about, vit_source
from moezoo.weights import ast as ast_preprocessor
from moezoo.weights.fold import Inputs
from moezoo.weights.hf_config import FAMILIES

GROUPS = ("params", "stats")
HEARD = Inputs((fbank.MEAN,), (2 * fbank.STD,))  # what models of sounds read here
UPDATE, ADAPTER = "/update/", "/adapter/"
KINDS = {
    "images": "a pretrained vision transformer",
    "sounds": "an Audio Spectrogram Transformer",
    "text": "a language model",
}
WANTED = {
    "images": "a pretrained vision transformer",
    "sounds": "the folder of a Hugging Face AST",
    "text": "that of a Hugging Face decoder",
    "pairs": "that of a run with a vision transformer",
}
HEARING = ("heads", "stride_time", "stride_freq", "norm_epsilon")
ARCHITECTURE = (
    "vocabulary", "width", "depth", "heads", "groups", "hidden",
    "norm_epsilon", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tied_head",
)  # fmt: skip


def check(path: Path | str) -> None:
    """UserError where there is nothing to start from, before anything else is made."""
    path = Path(path)
    if not path.exists():
        kinds = " or ".join(files.FORMATS)
        raise UserError(
            f"start_from is {path}, but there is no such folder, file or configuration; name a "
            f"run's folder, an {kinds} file with a pretrained vision transformer, or the folder of "
            "a Hugging Face decoder, AST or vision transformer."
        )
    if not path.is_dir():
        vit_source.source(path)


def check_fits(path: Path | str, config: Config) -> None:
    """UserError where pretrained weights are another kind of model than the configured one, have
    other sizes, or hold what the model has no place for.

    For decoders equal shapes are not enough: positions, heads and norms must be the same, too.
    """
    reads, given = _reads(config.model), _kind(path)
    if given == "others":
        raise UserError(
            f"start_from is {path}, whose config.json has model_type "
            f"'{hf_files.model_type(path)}'; {config.name} can begin with {WANTED[reads]}, or a "
            "run's folder."
        )
    if given not in (None, reads):
        raise UserError(
            f"start_from is {path}, {KINDS[given]}, but {config.name} reads {reads}: name a run's "
            f"folder or {WANTED[reads]}."
        )
    if given != "images" and (config.start_heads is not None or config.start_without):
        raise UserError(
            f"start_heads and start_without are for a pretrained vision transformer; {path} is "
            "none: leave them out."
        )
    if given is None:
        _check_run(path, config)
    else:
        CHECKS[given](Path(path), config)


def _check_run(path: Path | str, config: Config) -> None:
    """Models of the same shapes that compute something else with the same parameters."""
    try:
        first = restore.read_config(path).model
    except UserError:  # a model that is not known here, or no run: its reading will say
        return
    ours, theirs = _meaning(config.model), _meaning(first)
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            raise UserError(
                f"model.{name} is {ours[name]}, but the run in {path} has {theirs[name]}: its "
                "parameters would compute something else; take its value, or another run."
            )


def _meaning(model: Any) -> dict[str, Any]:
    """What decides, beside shapes, what parameters compute, by the option's name."""
    if hasattr(model, "decoder"):
        return {f"decoder.{name}": value for name, value in _computes(model.decoder).items()}
    if hasattr(model, "ast"):
        return {f"ast.{name}": getattr(model.ast, name) for name in HEARING}
    plain = hasattr(model, "heads") and not hasattr(model, "head_ratio")
    return {"heads": model.heads} if plain else {}


def _check_sounds(path: Path, config: Config) -> None:
    model: Any = config.model
    ast.check_fits(path, model.ast)
    ast.check(path)
    data: Any = config.data
    ast_preprocessor.check_preprocessor(path, data.rate, data.mel)


def _check_text(path: Path, config: Config) -> None:
    model: Any = config.model
    ours, theirs = _computes(model.decoder), _computes(hf.read_config(path))
    for name, value in ours.items():
        if value != theirs[name]:
            raise UserError(
                f"model.decoder.{name} is {value}, but the model in {path} has {theirs[name]}: "
                "take its value, or another folder."
            )
    hf.check(path)


CHECKS = {"images": pretrained.check, "sounds": _check_sounds, "text": _check_text}


def _reads(model: Any) -> str:
    if getattr(model, "per_pair", False):
        return "pairs"
    return "text" if hasattr(model, "decoder") else "sounds" if hasattr(model, "ast") else "images"


def _kind(path: Path | str) -> str | None:
    """What the pretrained model at `path` reads; "others" for none of ours, None for a run."""
    path = Path(path)
    if not path.is_dir() or vit_about.is_folder_of_vit(path):
        return "images"
    if not hf_files.holds_model(path):
        return None
    if ast.is_ast(path):
        return "sounds"
    known = hf_files.model_type(path)
    return "text" if known is None or known in FAMILIES else "others"


def _computes(config: DecoderConfig) -> dict[str, Any]:
    """Everything that decides what a decoder's weights compute."""
    rope = config.rope
    if rope.scaling == "none":  # then its other fields mean nothing
        rope = RopeConfig(theta=rope.theta)
    derived = {"head_width": config.width_of_head, "rope": rope}
    return {name: getattr(config, name) for name in ARCHITECTURE} | derived


def learned(path: Path | str, config: Config, params: Tree) -> dict[str, dict[str, Any]]:
    """What `begin` takes: from a run's folder, or from a file for this configuration's model.

    `params` are the model's. Raises UserError where there is nothing, and where the file's sizes
    are not the model's.
    """
    given = _kind(path)
    if given == "sounds":
        return {"params": ast.load(path, HEARD), "stats": {}}
    if given != "images":
        found = read(path)
        if _reads(config.model) == "pairs":
            found["params"] = conditional_names.from_vit(found["params"])
        return found
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(params).items()}
    return {"params": pretrained.arrays(Path(path), config, shapes), "stats": {}}


def read(path: Path | str) -> dict[str, dict[str, Any]]:
    """`{"params": {path: array}, "stats": ...}` of a run's newest sound checkpoint, of any model.

    Raises UserError where there is none.
    """
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


def begin(learned: dict[str, dict[str, Any]], state: Tree) -> tuple[Tree, Carried]:
    """The state with what `learned` has for its parameters and statistics, and what was taken.

    Arrays lie where the state's lay. Raises UserError where no parameter fits.
    """
    everything = {**learned["stats"], **learned["params"]}
    carried = {group: carry_over(everything, state[group]) for group in GROUPS}
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
    )

    def place(new: Any, old: jax.Array) -> jax.Array:
        return new if new is old else jax.device_put(new, old.sharding)

    begun = {group: jax.tree.map(place, carried[group].params, state[group]) for group in GROUPS}
    return state | begun, taken


def _is_frozen(path: str) -> bool:
    """Whether a statistic is an array of a frozen base, no running mean or balancing bias."""
    return path.rpartition("/")[2] not in ("mean", "var") and not path.endswith("router/bias")


def summary(run: str, carried: Carried, config: Config | None = None) -> str:
    """What was taken, in one sentence; of a pretrained vision transformer also what was not."""
    total = len(flatten(carried.params))
    kinds = {UPDATE: "low-rank updates", ADAPTER: "adapters", ROUTER: "routers"}
    parts, rest = [], list(carried.fresh)
    for mark, kind in kinds.items():
        own = [path for path in rest if mark in path]
        rest = [path for path in rest if mark not in path]
        parts += [f"{len(own)} of {kind}"] if own else []
    parts += [", ".join(rest[:4]) + (", ..." if rest[4:] else "")] if rest else []
    return (
        f"Starting from {run}: {total - len(carried.fresh)} of {total} arrays taken over; "
        f"fresh are {' and '.join(parts) or 'none'}; {_unused(carried.unused)}."
        + ("" if config is None or _kind(run) != "images" else pretrained.left_behind(run, config))
    )


def _unused(names: tuple[str, ...]) -> str:
    told = f" ({', '.join(names[:4])}{', ...' if names[4:] else ''})" if names else ""
    return f"{len(names)} of its arrays have no place here{told}"


def is_decoder(path: Path | str) -> bool:
    """Whether a folder holds a Hugging Face decoder rather than a run."""
    return _kind(path) == "text"


def begin_decoder(folder: Path | str, state: Tree) -> Tree:
    """The state with every array of a decoder that a Hugging Face folder holds in its place.

    Each goes straight to where the state's own lay, which is given up first, so that nothing is
    there twice. Raises UserError where the folder's arrays have other sizes than this one.
    """
    lie = {
        path.replace(BASE, "/"): (group, path, leaf)
        for group in GROUPS
        for path, leaf in flatten(state[group]).items()
        if UPDATE not in path
    }
    places = {path: leaf.sharding for path, (_, _, leaf) in lie.items()}
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, (_, _, leaf) in lie.items()
    }
    for _, _, leaf in lie.values():
        leaf.delete()
    loaded = hf.load_into(folder, wanted, places.__getitem__)
    groups = {group: flatten(state[group]) for group in GROUPS}
    for path, (group, name, _) in lie.items():
        groups[group][name] = loaded[path]
    return state | {group: unflatten(arrays) for group, arrays in groups.items()}


Train = Callable[..., Any]  # of a configuration, a console and `file`


def with_start(config: Config, console: Console, train: Train) -> Config:
    """The configuration with a run's folder where `start_from` named a configuration.

    That one is trained first, under its own name in the same directory and with data in the same
    place, unless it was before.
    """
    name = config.start_from
    if name is None or Path(name).exists() or not config_file.exists(name):
        return config
    first = config_file.load(name)
    data, here = first.data, getattr(config.data, "data_dir", None)
    if not isinstance(data, TextDataConfig):  # which keeps nothing
        data = replace(data, data_dir=here)
    first = replace(first, directory=config.directory, mesh=config.mesh, data=data)
    folder = Path(first.directory) / first.name
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
