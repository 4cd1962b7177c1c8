"""Random configurations: on the command line, as JSON and as Python files.

Each is accepted and means what it says, or is refused in one sentence, before anything is made.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from moezoo import fields
from moezoo.train import config as configs
from moezoo.train import overrides
from moezoo.train.config import Config
from tests.robustness import fuzz

BASES = (
    "rooms/m3vit_tiny",
    "rooms/mod_squad_tiny",
    "rooms/mlore_tiny",
    "rooms/taskexpert_tiny",
    "rooms/vmoe_tiny",
    "rooms/conditional_moe_tiny",
    "text/smora_tiny",
    "sounds/soft_moa_tiny",
    "nyud/m3vit_small",
)
WORDS = (
    "nan", "inf", "-inf", "1e-3", "1e300", "1e-300", "-1", "0", "1", "2", "3", "7", "8", "1.5",
    "0.999999999999", "1000000000", "2147483648", "18446744073709551616", "9" * 5000, "None",
    "True", "False", "x", "", " ", "é" * 300, "x" * 300, "../x", "/", ".", "a/b", "[/red]", "a\\b",
    "a|b", "$x$", "\udce9", "depth", "semseg", "lm", "scene", "event", "cosine", "auto",
)  # fmt: skip
NUMBERS = ("1", "2", "4", "8", "16", "64", "0", "-1", "3", "65537", "0.5", "1e-3", "0.999", "2.0")
NAMES = ("rooms", "runs", "depth", "semseg", "auto", "flip", "q", "layers/*", "capacity", "x", "lm")
VALUES = (
    "None", "True", "0", "-1", "3", "2**64", "10**5000", "1e-3", "1e300", "float('nan')",
    "float('inf')", "'x'", "'1e-3'", "'200'", "'x' * 300", "'\\ud800'", "'a\\0b'", "()", "[]",
    "('x',)", "[1, 2]", "(3, 'x')", "{}", "{'depth': -1}", "{'dept': 1.0}", "{3: None}", "object()",
    "int", "lambda: 3", "Config", "config", "TrainConfig", "TrainConfig(steps='200')", "b'x'", "1j",
    "OptimConfig(lr='1e-3')", "OptimConfig(eps=-1.0)", "open", "...", "type", "range(3)",
    "Path('x')", "np.float32(0.5)", "np.int64(3)", "np.zeros(3)", "float", "MeshConfig(data=0)",
)  # fmt: skip
LINES = (
    "sys.exit(0)", "raise SystemExit", "sys.exit('text')", "1 / 0", "import nowhere", "del config",
    "config = None", "config = Config", "__doc__ = 3", "raise KeyError('a\\nb')", "from x import y",
    "raise UserError('No.')", "config = 'config'", "open('/nowhere/x')", "def f(: pass",
    "exec('x' * 100_000)", "f = lambda: f()\nf()", "assert False", "__doc__ = '[/red] %s {0}'",
    "class Own(Config): pass\nconfig = Own('a', config.model, ('depth',))", "return", "yield 3",
    "raise RecursionError", "config = dataclasses.replace(config, x=3)", "__all__ = []",
)  # fmt: skip
HEAD = """import dataclasses
import sys
from pathlib import Path
import numpy as np
from moezoo.errors import UserError
from moezoo.train.config import *
from moezoo.train.config_file import load
config = load({base!r})
"""


@cache
def base(name: str) -> Config:
    return configs.load(name)


def judge(config: Config, devices: int = 1) -> None:
    """Accepted is right where it is one whole configuration that reads back equal."""
    configs.validate(config, devices)
    text = configs.to_json(config)
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert configs.from_json(text) == config
    fields.check(config)


def of_command_line(chance: random.Random) -> fuzz.Case:
    name = chance.choice(BASES)
    options = overrides._options(base(name), base(name))
    words = []
    for option in chance.sample(sorted(options), chance.choice((1, 1, 2, 4))):
        fitting = _fitting(options[option]) if chance.random() < 0.7 else WORDS
        option = option if chance.random() < 0.95 else option[:-1]
        many = get_origin(options.get(option)) is tuple or chance.random() < 0.1
        how_many = chance.choice((0, 1, 2, 3)) if many else 1
        words += [f"--{option}", *chance.choices(fitting, k=how_many)]
    devices = chance.choice((1, 8))
    return f"{name} {words}", lambda: judge(configs.load(name, words), devices)


def _fitting(hint: Any) -> tuple[str, ...]:
    """Words of the right type, in range or near its ends."""
    if get_origin(hint) is Literal:
        return tuple(str(part) for part in get_args(hint))
    if hint in (int, float):
        return NUMBERS if hint is float else NUMBERS[:10]
    inner = [word for part in get_args(hint) for word in _fitting(part)]
    return tuple(inner) or {bool: ("True", "False"), str: NAMES}.get(hint, ("None",))


def of_json(chance: random.Random) -> fuzz.Case:
    name = chance.choice(BASES)
    done, value = fuzz.mutate_json(chance, json.loads(configs.to_json(base(name))))
    text = json.dumps(value)
    if chance.random() < 0.1:
        done, damaged = fuzz.mutate_bytes(chance, text.encode())
        text = damaged.decode(errors="replace")
    if chance.random() < 0.02:
        done, text = "nested", "[" * 100_000 + "]" * 100_000
    return f"{name}: {done}", lambda: judge(configs.from_json(text))


def of_file(chance: random.Random, folder: Path) -> fuzz.Case:
    name = chance.choice(BASES)
    text, config = HEAD.format(base=name), base(name)
    section = chance.choice(["", "", *(n for n in fields.hints(Config) if _is_section(config, n))])
    inner: Any = getattr(config, section) if section else config
    names = list(fields.hints(type(inner)))
    changed = chance.sample(names, min(len(names), chance.choice((1, 1, 2))))
    changes = ", ".join(f"{field}={chance.choice(VALUES)}" for field in changed)
    place = f"config.{section}" if section else "config"
    change = f"dataclasses.replace({place}, {changes})"
    if section:
        change = f"dataclasses.replace(config, {section}={change})"
    line = f"config = {change}" if chance.random() < 0.75 else chance.choice(LINES)
    whole = f"{text}{line}\n".encode(errors="surrogateescape")
    if chance.random() < 0.1:
        line, whole = fuzz.mutate_bytes(chance, whole)
    path = folder / f"{chance.randrange(10**9)}.py"
    path.write_bytes(whole)
    return f"{name}: {line}", lambda: judge(configs.load(str(path)))


def _is_section(config: Config, name: str) -> bool:
    return hasattr(getattr(config, name), "__dataclass_fields__")


@fuzz.counts(ci=4, full=250)
def test_command_lines(count: int) -> None:
    fuzz.run("command lines", of_command_line, count)


@fuzz.counts(ci=12, full=250)
def test_stored_configurations(count: int) -> None:
    fuzz.run("stored configurations", of_json, count)


@fuzz.counts(ci=4, full=200)
def test_configuration_files(count: int, tmp_path: Path) -> None:
    fuzz.run("configuration files", lambda chance: of_file(chance, tmp_path), count)
