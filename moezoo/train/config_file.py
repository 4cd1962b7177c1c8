"""Finding and reading config files: Python files that define `config`."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moezoo import fields, registry, storage
from moezoo.errors import UserError, unknown
from moezoo.files import failure
from moezoo.models.shared.config import traits
from moezoo.train import config_json, domain, zoo
from moezoo.train.overrides import parse
from moezoo.train.schema import Config

HEADS = ("--model.heads",)
RESUME = (
    "train.py --resume FOLDER [--option VALUE ...] goes on with a run as it was configured; "
    "its --help shows that."
)
OTHERS = (
    "The options below are those of {name}; another configuration has others: {prog} CONFIG --help."
)
# Those here, then those that come with the package: in a clone `moezoo/configs` is a link.
FOLDERS = (Path("configs"), zoo.CONFIGS)


def load(
    name: str,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    prog: str = "train.py",
) -> Config:
    """The configuration of a config file, with overrides such as `["--train.steps", "200"]`.

    `name` is a path (`configs/rooms/m3vit_tiny.py`), a name inside `folder` (`rooms/m3vit_tiny`,
    `m3vit_tiny` where that is unique) or a module's (`configs.rooms.m3vit_tiny`). Without
    `folder` it is sought in `configs` here, then among those that come with the package. With
    `--help` among the overrides all of them are listed, as options of `prog`, and the program ends.

    Raises UserError with the nearest names for an unknown file or override, and for a value of
    another type.
    """
    module = read(find(name, (folder,) if folder else FOLDERS))
    summary = module.__doc__.strip() if isinstance(module.__doc__, str) else ""
    summary = f"{summary}\n\n{OTHERS.format(name=name, prog=prog)}\n\n{RESUME}".strip()
    config = parse(module.config, overrides, prog=f"{prog} {name}", description=summary)
    return _with_heads(config, overrides)


def _with_heads(config: Config, overrides: Sequence[str]) -> Config:
    """Heads that the user types are those of the weights, too, whose file may not tell them."""
    typed = any(word.partition("=")[0] in HEADS for word in overrides)
    if config.start_from is None or config.start_heads is not None or not typed:
        return config
    path = storage.local(storage.place(config.start_from))
    pretrained = config.data.domain.pretrained
    if not (pretrained.has_options and path.exists() and pretrained.knows(path)):
        return config  # a run, or a configuration: its own heads are known
    heads = traits(config.model).heads
    return replace(config, start_heads=heads) if isinstance(heads, int) else config


def names() -> list[str]:
    """All config files by name: those here, then those that come with the package."""
    return list(_files(FOLDERS))


def exists(name: str) -> bool:
    """Whether there is a config file of this name."""
    try:
        find(name, FOLDERS)
    except UserError:
        return False
    return True


def find(name: str, folders: Sequence[Path]) -> Path:
    """The config file that a path, name or module name means; UserError with the nearest."""
    fields.check_value(fields.FilePath, name, "The name of the configuration")
    if name.endswith(".py") and Path(name).is_file():
        return Path(name)
    files = _files(folders)
    if not files:
        places = " and ".join(str(folder) for folder in folders)
        raise UserError(f"No config '{name}': there are none in {places}; give a file's path.")
    plain = name.removesuffix(".py").replace("\\", "/").removeprefix("./")
    if "/" not in plain:
        plain = plain.replace(".", "/")
    plain = plain.removeprefix("configs/")
    matches = [key for key in files if plain in (key, key.rpartition("/")[2])]
    if plain in files or len(matches) == 1:
        return files[plain if plain in files else matches[0]]
    if matches:
        raise UserError(f"Config '{name}' may mean {' or '.join(matches)}; name the group too.")
    if name.endswith(".py"):
        near = unknown("config", name, sorted(files))
        raise UserError(f"There is no file {name}. {near}")
    raise unknown("config", name, sorted(files))


def _files(folders: Sequence[Path]) -> dict[str, Path]:
    """Config files by name, `rooms/m3vit_tiny`; an earlier folder's goes before a later one's."""
    files: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if not path.name.startswith("_"):
                files.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return files


def read(path: Path) -> Any:
    """The module of a config file, checked to define `config`; run once as long as it is the same.

    Modules beside the file can be imported in it. A model of its own becomes known to the zoo.
    """
    try:
        mark = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise failure("read", path, error) from error
    name = f"moezoo_config_{path.stem}_{mark}"
    if name not in sys.modules:
        folder = str(path.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)
        sys.modules[name] = _run(name, path)
    return sys.modules[name]


def _run(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where classes of the file look for the types of their fields
    try:
        spec.loader.exec_module(module)
        _learn(getattr(module, "config", None))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except SystemExit as error:
        raise UserError(
            f"{path} ends the program with exit code {fields.shown(error.code)}; it must define "
            "`config = Config(...)`."
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a file of somebody's own may raise
        words = " ".join(str(error).split())[:500]
        raise UserError(f"{path} fails: {type(error).__name__}: {words}") from error
    finally:
        del sys.modules[name]
    return module


def _learn(config: Any) -> None:
    """Make known the classes that a file's configuration is made of.

    Raises UserError for what is no configuration, or one that a run's folder could not keep.
    """
    if not isinstance(config, Config):
        raise UserError("The file does not define `config = Config(...)`.")
    fields.check(config)
    domain.check_domain(config.data)
    fields.check(config, root=config)
    section = type(config.data)
    try:
        section()  # which of the known ones a stored section is, is asked of empty ones
    except Exception as error:
        raise UserError(
            f"{section.__name__}() fails ({fields.short(str(error))}): a data section must work "
            "without arguments, so give every field a default and check values in the `check` of "
            "its domain."
        ) from error
    registry.SYSTEMS.learn(type(config.model))
    registry.DOMAINS.learn(type(config.data))
    config_json.check_kept(config)
