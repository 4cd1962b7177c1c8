"""Config files, their checks, and JSON beside checkpoints."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.tasks import TASKS
from moezoo.domains.pairs import tasks as similar
from moezoo.domains.pairs.domain import PairsDataConfig
from moezoo.errors import UserError
from moezoo.registry import SYSTEMS
from moezoo.tasks.base import Task
from moezoo.tasks.registry import TaskKind
from moezoo.train import config as configs
from moezoo.train import config_file
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    from_json,
    to_json,
    validate,
)
from moezoo.train.domain import Classes
from moezoo.train.setup import make_tasks


def make(kind: str = "M3ViTConfig", **parts) -> Config:
    return Config("run", SYSTEMS.by_name(kind)(), ("semseg", "depth"), **parts)


@pytest.mark.parametrize("kind", list(SYSTEMS.names))
def test_json_round_trip(kind):
    config = make(
        kind,
        data=DataConfig(resolution=(32, 48)),
        optimiser=OptimConfig("sgd", 2e-3, clip=10.0),
        train=TrainConfig(steps=7),
        evaluate=EvaluateConfig(batch=4),
        seed=3,
    )
    assert from_json(to_json(config)) == config
    assert to_json(from_json(to_json(config))) == to_json(config)


def test_json_keeps_whole_numbers_given_for_real_ones():
    config = make(optimiser=OptimConfig(lr=1, clip=5))
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda c: c["train"].update(stepz=3), ["train.stepz", "train.steps"]),
        (lambda c: c.update(models={}), ["models", "model"]),
        (lambda c: c.pop("tasks"), ["lacks tasks"]),
        (lambda c: c["train"].update(steps="many"), ["train.steps", "'many'", "whole number"]),
        (lambda c: c["train"].update(steps=True), ["train.steps", "True"]),
        (lambda c: c["optimiser"].update(clip="x"), ["optimiser.clip", "'x'"]),
        (lambda c: c["data"].update(resolution=[1, 2, 3]), ["data.resolution", "[1, 2, 3]"]),
        (lambda c: c["optimiser"].update(kind="adamm"), ["optimiser.kind", "adamm"]),
        (lambda c: c["model"].update(kind="M3ViTConfi"), ["M3ViTConfi", "did you mean M3ViT"]),
        (lambda c: c["model"].pop("kind"), ["model", "kind"]),
        (lambda c: c["model"].update(expertz=3), ["model.expertz"]),
        (lambda c: c.update(train=3), ["train is 3"]),
    ],
)
def test_foreign_json_names_the_field(change, parts):
    values = json.loads(to_json(make()))
    change(values)
    with pytest.raises(UserError) as caught:
        from_json(json.dumps(values))
    for part in parts:
        assert part in str(caught.value)


def test_a_field_that_an_older_version_called_otherwise_is_read():
    """What decoders read is called levels; runs of before have it stored as taps."""
    config = make("MLoREConfig")
    values = json.loads(to_json(config))
    values["model"]["taps"] = values["model"].pop("levels")
    assert from_json(json.dumps(values)) == config


def test_a_field_that_an_older_version_did_not_know_takes_its_default():
    values = json.loads(to_json(make()))
    del values["train"]["mutual_information_weight"], values["start_from"]
    assert from_json(json.dumps(values)) == make()


def test_text_that_is_no_json_is_a_user_error():
    with pytest.raises(UserError, match="not JSON"):
        from_json("{")


@pytest.mark.parametrize(
    "parts, part",
    [
        ({"train": TrainConfig(steps=0)}, "train.steps is 0"),
        ({"train": TrainConfig(batch=-2)}, "train.batch is -2"),
        ({"train": TrainConfig(log_every=0)}, "train.log_every is 0"),
        ({"train": TrainConfig(importance_weight=-1.0)}, "train.importance_weight is -1"),
        ({"train": TrainConfig(load_weight=float("nan"))}, "train.load_weight is nan"),
        ({"train": TrainConfig(mutual_information_weight=-1.0)}, "mutual_information_weight is -1"),
        ({"train": TrainConfig(batch=20)}, "train.batch is 20.*8 devices.*take 16 or 24"),
        ({"train": TrainConfig(batch=4)}, "train.batch is 4.*take 8"),
        (
            {"train": TrainConfig(batch=16, gradient_accumulation=4)},
            "train.batch is 16.*8 devices.*4 slices; take 32",
        ),
        ({"evaluate": EvaluateConfig(batch=3)}, "evaluate.batch is 3"),
        ({"evaluate": EvaluateConfig(every=-1)}, "evaluate.every is -1"),
        ({"checkpoint": CheckpointConfig(keep=0)}, "checkpoint.keep is 0"),
        ({"checkpoint": CheckpointConfig(every=0)}, "checkpoint.every is 0"),
        ({"optimiser": OptimConfig(lr=-1.0)}, "optimiser.lr is -1"),
        ({"mesh": MeshConfig(expert=3)}, "a multiple of 3 devices, but there are 8"),
        ({"mesh": MeshConfig(data=2)}, "exactly 2 devices, but there are 8"),
        ({"data": DataConfig(resolution=(60, 61))}, "data.resolution is 60 x 61.*model.patch"),
        ({"data": DataConfig(resolution=(0, 64))}, "data.resolution"),
        ({"data": DataConfig(name="roms")}, "'roms': did you mean rooms"),
        ({"tasks": ("semseg", "dept")}, "task 'dept': did you mean depth"),
        ({"tasks": ()}, "tasks is empty"),
        ({"tasks": ("depth", "depth")}, "depth twice"),
        ({"seed": -1}, "seed is -1"),
        ({"name": ""}, "name is ''"),
        ({"name": "../x"}, "name is"),
        ({"name": "a//b"}, "name is"),
        ({"name": "/a"}, "name is"),
    ],
)
def test_parts_that_disagree(parts, part):
    config = make()
    validate(config, 8)
    with pytest.raises(UserError, match=part):
        validate(dataclasses.replace(config, **parts), 8)


def test_experts_that_do_not_split_over_the_mesh():
    model = SYSTEMS.by_name("M3ViTConfig")(experts=6)
    config = dataclasses.replace(make(), model=model, mesh=MeshConfig(expert=4))
    with pytest.raises(UserError, match="model.experts is 6.*mesh.expert=4"):
        validate(config, 8)


def test_top_k_over_experts():
    with pytest.raises(UserError, match="top_k is 17.*number of experts, 16"):
        configs.parse(make(), ["--model.top_k", "17"])
    values = json.loads(to_json(make()))
    values["model"]["top_k"] = 17
    with pytest.raises(UserError, match="top_k is 17"):
        from_json(json.dumps(values))


FILE = '''"""A tiny run."""

from moezoo.registry import SYSTEMS
from moezoo.train.config import Config

config = Config("tiny", SYSTEMS.by_name("M3ViTConfig")(), ("semseg",))
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder `configs` with four files, in the working directory."""
    for name in ("rooms/m3vit_tiny", "rooms/dense_tiny", "nyud/m3vit_small", "pascal/m3vit_small"):
        path = tmp_path / "configs" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_file, "FOLDERS", config_file.FOLDERS[:1])
    return tmp_path / "configs"


@pytest.mark.parametrize(
    "name",
    [
        "configs/rooms/m3vit_tiny.py",
        "./configs/rooms/m3vit_tiny.py",
        "configs/rooms/m3vit_tiny",
        "rooms/m3vit_tiny",
        "rooms/m3vit_tiny.py",
        "configs.rooms.m3vit_tiny",
        "rooms.m3vit_tiny",
        "m3vit_tiny",
    ],
)
def test_config_file_is_found_by_path_name_or_module(folder, name):
    config = configs.load(name, ["--train.steps", "3", "--model.experts", "8"])
    assert (config.name, config.train.steps, config.model.experts) == ("tiny", 3, 8)


def test_own_configs_go_before_those_of_the_package(folder, tmp_path):
    package = tmp_path / "package"
    for name in ("rooms/m3vit_tiny", "rooms/six_tasks"):
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FILE)
    folders = (folder, package)
    own = config_file.find("rooms/m3vit_tiny", folders)
    assert own == folder / "rooms" / "m3vit_tiny.py"
    assert config_file.find("six_tasks", folders) == package / "rooms" / "six_tasks.py"


def test_absolute_path_needs_no_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "configs" / "nyud")
    assert configs.load(str(folder / "rooms" / "m3vit_tiny.py")).name == "tiny"


@pytest.mark.parametrize(
    "name, part",
    [
        ("rooms/m3vit_tny", "did you mean rooms/m3vit_tiny"),
        ("m3vit_tny.py", "did you mean rooms/m3vit_tiny"),
        ("configs/room/m3vit_tiny.py", "did you mean rooms/m3vit_tiny"),
        ("m3vit_small", "nyud/m3vit_small or pascal/m3vit_small"),
    ],
)
def test_unknown_config_names_the_nearest(folder, name, part):
    with pytest.raises(UserError, match=part):
        configs.load(name)


def test_folder_without_configs_says_so(tmp_path):
    with pytest.raises(UserError, match="there are none in"):
        configs.load("rooms/m3vit_tiny", folder=tmp_path)


@pytest.mark.parametrize(
    "text, part",
    [
        ("config = 3", "does not define `config = Config"),
        ("import nowhere", "ModuleNotFoundError"),
        ("config = (", "SyntaxError"),
    ],
)
def test_broken_config_file_is_a_user_error(folder, text, part):
    (folder / "rooms" / "m3vit_tiny.py").write_text(text)
    with pytest.raises(UserError, match=part):
        configs.load("rooms/m3vit_tiny")


def test_help_carries_the_files_docstring(folder, capsys):
    with pytest.raises(SystemExit) as end:
        configs.load("rooms/m3vit_tiny", ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "A tiny run." in text and "--mesh.expert INT" in text and "--model.experts INT" in text
    assert "--resume FOLDER" in text


def test_a_subset_of_the_default_tasks_keeps_their_weights() -> None:
    config = configs.load(
        "rooms/m3vit_tiny", ["--tasks", "depth", "normals", "--train.weights.depth", "3"]
    )
    configs.validate(config, 1)
    assert {t.name: t.weight for t in make_tasks(config)} == {"normals": 10.0, "depth": 3.0}
    with pytest.raises(UserError, match="train.weights.depth is -1"):
        configs.load("rooms/m3vit_tiny", ["--train.weights.depth", "-1"])


def test_a_task_of_ones_own_has_a_weight_without_a_field(monkeypatch) -> None:
    """It needed a field of its own in TaskWeights, and was an AttributeError without."""

    def own(weight: float = 1.0) -> Task:
        return dataclasses.replace(TASKS["depth"].task(weight), name="own")

    monkeypatch.setitem(TASKS, "own", TaskKind(own))
    config = dataclasses.replace(make(), tasks=("semseg", "own"))
    configs.validate(config, 1)
    assert [task.weight for task in make_tasks(config, Classes({"semseg": 3}))] == [1.0, 1.0]
    weighted = configs.parse(config, ["--train.weights.own", "4", "--train.weights.semseg", "2"])
    assert weighted.train.weights == {"own": 4.0, "semseg": 2.0}
    assert [task.weight for task in make_tasks(weighted, Classes({"semseg": 3}))] == [2.0, 4.0]
    assert from_json(to_json(weighted)) == weighted
    assert configs.parse(weighted, ["--train.weights.own", "None"]).train.weights == {"semseg": 2.0}


def test_weights_are_read_as_older_versions_wrote_them() -> None:
    values = json.loads(to_json(make()))
    values["train"]["weights"] = {"semseg": None, "depth": 4.0, "lm": None}
    config = from_json(json.dumps(values))
    assert [task.weight for task in make_tasks(config, Classes({"semseg": 3}))] == [1.0, 4.0]
    values["train"]["weights"] = {"dept": 4.0}
    with pytest.raises(UserError, match="name in train.weights 'dept': did you mean depth"):
        from_json(json.dumps(values))


def test_every_task_of_pairs_has_a_share() -> None:
    shares = PairsDataConfig().shares.of((*similar.TASKS, "own"))
    assert set(shares) == {*similar.TASKS, "own"} - {"counts"}  # which is only scored by default


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("optimiser.eps", -1),
        ("optimiser.power", float("nan")),
        ("optimiser.lr", 1e-60),
        ("optimiser.b2", 0.99999999999),
        ("hosts.count", -1),
        ("hosts.index", -1),
        ("hosts.timeout", 0),
        ("seed", 2**64),
        ("seed", 2**32),
        ("data.seed", -1),
        ("model.depth", 10**6),
        ("model.mlp_ratio", float("inf")),
        ("model.expert_ratio", 1e30),
        ("model.noise_std", float("nan")),
        ("protocol.edge_positive_weight", float("nan")),
        ("protocol.edge_positive_weight", 1.5),
        ("evaluate.pictures", 10**6),
        ("train.batch", 10**9),
        ("train.weights.depth", float("inf")),
        ("mesh.data", -2),
        ("mesh.slices", 0),
        ("data.train", 10**9),
        ("name", "x" * 300),
        ("name", "a\nb"),
        ("directory", "x" * 300),
        ("start_from", "x" * 300),
        ("data.data_dir", "x/" * 3000),
    ],
)
def test_no_option_takes_what_makes_no_sense(option: str, value) -> None:
    values = json.loads(to_json(make()))
    *sections, last = option.split(".")
    holder = values
    for section in sections:
        holder = holder[section]
    holder[last] = value
    # A model is refused when it is made, and does not know where it stands.
    name = last if sections == ["model"] else option
    with pytest.raises(UserError, match=f"^{name} is ") as caught:
        validate(from_json(json.dumps(values)), 1)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("words", ["--optimiser.eps -1", "--hosts.count=-1", "--seed 1" + 20 * "0"])
def test_nor_does_the_command_line(words: str) -> None:
    with pytest.raises(UserError, match="is -?1.*; it must be (at|above)"):
        configs.parse(make(), words.split())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("name=3", "name is 3; expected text"),
        ("train='x'", "train is 'x'; expected a TrainConfig"),
        ("train=3", "train is 3; expected a TrainConfig"),
        ("train=TrainConfig(steps='200')", "train.steps is '200'; expected a whole number"),
        ("optimiser=OptimConfig(lr='1e-3')", "optimiser.lr is '1e-3'; expected a number"),
        ("model=None", "model is None; expected a ModelConfig"),
        ("model=type(config.model)", "model is .*; expected a ModelConfig"),
        ("tasks='depth'", "tasks is 'depth'; expected words"),
        ("tasks=['depth']", r"tasks is \['depth'\]; expected words"),
        ("data=config.train", "data is TrainConfig.*; expected a DataSection"),
        ("seed=True", "seed is True; expected a whole number"),
        ("hosts=HostsConfig(count=-1)", "hosts.count is -1; it must be at least 1"),
    ],
)
def test_a_file_with_a_value_of_another_type(tmp_path, change: str, says: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"""
import dataclasses
from moezoo.train.config import *
from moezoo.train.config_file import load
config = load("rooms/m3vit_tiny")
config = dataclasses.replace(config, {change})
""")
    with pytest.raises(UserError, match=f"own.py: {says}"):
        configs.load(str(path))


@pytest.mark.parametrize(
    ("base", "section", "field", "says"),
    [
        ("M3ViTConfig", "model", "own: Any = max", "model.own is <built-in function max>, which"),
        ("M3ViTConfig", "model", "own: Path = Path('a')", r"model.own is .*Path\('a'\), which"),
        (
            "M3ViTConfig",
            "model",
            "own: frozenset = frozenset()",
            r"model.own is frozenset\(\), which",
        ),
        ("M3ViTConfig", "model", "own: int = field(default=3, init=False)", "model.own is a field"),
        ("M3ViTConfig", "model", "kind: str = 'a'", "model.kind cannot be a field"),
        (
            "M3ViTConfig",
            "model",
            "own: Mapping[int, int] = field(default_factory={1: 2}.copy)",
            "A",
        ),
        ("TrainConfig", "train", "", "train is a Own, which a run's config.json brings back as a"),
    ],
)
def test_a_class_of_ones_own_that_a_run_could_not_bring_back(
    tmp_path, base: str, section: str, field: str, says: str
) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"""
from __future__ import annotations
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.train.config import Config, TrainConfig
from moezoo.train.domain import Classes
@dataclass(frozen=True)
class Own({base}):
    {field or "pass"}
config = replace(Config(name="own", model=M3ViTConfig(), tasks=("depth",)), {section}=Own())
""")
    for words in ([], ["--help"]):
        with pytest.raises(UserError, match=f"own.py: {says}"):
            configs.load(str(path), words)


@pytest.mark.parametrize("code", ["0", "1", "'text'", ""])
def test_a_file_that_ends_the_program_is_no_success(tmp_path, code: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"import sys\nsys.exit({code})\n")
    with pytest.raises(UserError, match="own.py ends the program with exit code"):
        configs.load(str(path))


@pytest.mark.parametrize("code", ["BaseException('x')", "GeneratorExit('x')", "ValueError('x')"])
def test_a_file_that_fails_in_any_way_is_one_sentence(tmp_path, code: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"raise {code}\n")
    with pytest.raises(UserError, match=f"own.py fails: {code[:9]}.*: x"):
        configs.load(str(path))


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ("name = 'cards'; unit = 'cards'; tasks = {}", r"Cards.tasks is \{\}: give the class"),
        ("unit = 'cards'; tasks = {'a': TaskKind(max)}", "Cards.name is not set: give the class"),
        ("name = 'cards'; unit = 3; tasks = {'a': TaskKind(max)}", "Cards.unit is 3: give"),
        ("name = unit = 'cards'", "Cards.tasks is None: give the class"),
        ("name = unit = 'cards'; tasks = {'a': max}", "Cards.tasks has .* for the task a: give"),
        ("name = unit = 'cards'; tasks = {'a b': TaskKind(max)}", "Cards.tasks has a task called"),
    ],
)
def test_a_domain_that_does_not_say_what_runs_need(tmp_path, answers: str, says: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"""
from dataclasses import dataclass
from moezoo.tasks.registry import TaskKind
from tests.growth import numbers
class Cards(numbers.Numbers):
    name = unit = tasks = None
    {answers}
@dataclass(frozen=True)
class CardData(numbers.NumbersData):
    @property
    def domain(self):
        return Cards(self)
config = numbers.numbers("own", data=CardData())
""")
    with pytest.raises(UserError, match=f"own.py: {says}"):
        configs.load(str(path))


def test_a_data_section_whose_domain_is_none(tmp_path) -> None:
    path = tmp_path / "own.py"
    path.write_text("""
from dataclasses import dataclass
from tests.growth import numbers
@dataclass(frozen=True)
class Cards(numbers.NumbersData):
    domain = None
config = numbers.numbers("own", data=Cards(), protocol=numbers.NumbersData().domain.protocol())
""")
    with pytest.raises(UserError, match="own.py: Cards.domain is None: make it a property"):
        configs.load(str(path))


def test_options_of_a_start_need_one() -> None:
    for changes in ({"start_heads": 2}, {"start_without": ("head",)}):
        with pytest.raises(UserError, match="is about start_from, which is not given"):
            configs.validate(dataclasses.replace(make(), **changes), 1)


def test_the_help_names_ranges(capsys) -> None:
    with pytest.raises(SystemExit):
        configs.load("rooms/m3vit_tiny", ["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("from 1 to 512)", "above 0)", "from 0 to below 1)", "--train.weights.depth"):
        assert part in shown


def test_a_file_that_is_not_there_is_called_so() -> None:
    with pytest.raises(UserError, match="no file mine/my.py"):
        config_file.load("mine/my.py")
