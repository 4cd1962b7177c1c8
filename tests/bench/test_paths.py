"""Every system's path for every task: what became of its experts, and that it is the model's."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from moezoo import registry
from moezoo.bench import paths
from moezoo.deploy import litert_file, onnx_file, recover
from moezoo.deploy.runtime import other_forms
from moezoo.errors import UserError
from moezoo.train.config_file import load
from moezoo.train.optim import UNDECAYED as LEARNED
from moezoo.train.setup import Loaded
from tests.models.test_gradients import TINY, shrunk
from tests.models.tiny import loaded

UNDECAYED = tuple(LEARNED)
# Options that change what a path can promise, and what its layers became.
CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("rooms/m3vit_tiny", {}, {"whole (token)"}),
    ("rooms/m3vit_tiny", {"routing": "single"}, {"whole (token)"}),
    ("rooms/m3vit_tiny", {"routing": "task_conditioned"}, {"whole (token)"}),
    ("rooms/mod_squad_tiny", {}, {"whole (token)"}),
    ("rooms/vit_dense_tiny", {}, set()),
    ("rooms/swin_dense_tiny", {}, set()),
    ("rooms/mtlora_tiny", {}, {"exact_fold (task)"}),
    ("rooms/mtlora_vit_tiny", {}, {"exact_fold (task)"}),
    ("rooms/dyt_tiny", {"inference": "gathered"}, set()),
    ("rooms/mosa_tiny", {}, {"exact_fold (constant)"}),
    ("rooms/vmoe_tiny", {}, {"whole (token)"}),
    ("rooms/vmoe_tiny", {"routing": "experts_choose", "capacity_factor": 1.0}, {"whole (row)"}),
    ("rooms/vmoe_tiny", {"routing": "soft"}, {"whole (soft)"}),
    ("rooms/mlore_tiny", {}, {"whole (row)"}),
    ("rooms/taskexpert_tiny", {}, {"whole (row)"}),
    ("rooms/taskexpert_tiny", {"gate": "token"}, {"whole (token)"}),
    ("rooms/taskexpert_tiny", {"gate": "static"}, {"whole (constant)"}),
    ("rooms/conditional_moe_tiny", {"level": "attribute"}, {"exact_fold (task)"}),
    ("rooms/conditional_moe_tiny", {"level": "task"}, {"exact_fold (task)"}),
    ("rooms/conditional_moe_tiny", {"level": "modality"}, {"exact_fold (task)"}),
    ("rooms/conditional_moe_tiny", {"level": "token"}, {"whole (token)"}),
    ("rooms/conditional_moe_tiny", {"level": "context"}, {"whole (token)"}),
    ("rooms/conditional_moe_tiny", {"level": "dense"}, set()),
    ("sounds/ast_tiny", {}, set()),
    ("sounds/soft_moa_tiny", {}, {"whole (soft)"}),
    ("sounds/soft_moa_tiny", {"update": "dense_moa"}, {"whole (token)"}),
    (
        "sounds/soft_moa_tiny",
        {"update": "dense_moa", "gates": "task", "sharing": "one"},
        {"exact_fold (task)"},
    ),
    ("text/skills_tiny", {}, set()),
    ("text/smora_tiny", {}, {"whole (token)"}),
    ("text/smora_tiny", {"update": "mixture"}, {"whole (token)"}),
    ("text/smora_tiny", {"update": "lora"}, set()),
    ("text/polytropon_tiny", {}, {"exact_fold (task)"}),
    ("text/polytropon_tiny", {"heads": 2, "trained": "skills"}, {"exact_fold (constant)"}),
    ("text/cpoly_tiny", {}, {"exact_fold (task)"}),
    ("text/mocle_tiny", {}, {"exact_fold (task)"}),
    ("text/meteora_tiny", {}, {"whole (token)"}),
    ("text/phatgoose_tiny", {}, {"whole (token)"}),
    ("text/alter_adapters_tiny", {}, {"exact_fold (task)"}),
    ("text/alter_tiny", {}, {"whole (token)"}),
    ("text/mixda_domains_tiny", {}, {"exact_fold (task)"}),
    ("text/mixda_tiny", {}, {"whole (token)"}),
    ("text/adapter_fusion_adapters_tiny", {}, {"exact_fold (task)"}),
    ("text/adapter_fusion_tiny", {}, {"whole (token)"}),
]
# Decoders are like each other but for their updates: in other runtimes these two say it all.
OTHERS = ("text/smora_tiny", "text/alter_tiny")


SEEING = sorted({n for n, _, _ in CASES if not n.startswith("text/")})
HEADS = ("rooms/m3vit_tiny", "rooms/mtlora_tiny", "rooms/taskexpert_tiny", "sounds/ast_tiny")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n if n in HEADS else pytest.param(n, marks=pytest.mark.claims) for n in SEEING],
)
def test_a_short_fine_tuning_trains_the_head_wherever_it_lies(name: str, tmp_path: Path) -> None:
    """And no other matrix: the domain says where a task's head is."""
    config = replace(shrunk(name, tmp_path), start_from=None)
    model, classes = loaded(config)
    exporter = config.data.domain.exports(config)
    task = next(iter(exporter.subject(model, classes).tasks))
    path, _ = paths.whole_path(model, classes, task)
    head = exporter.subject(model, classes).head(task)
    names = recover.tuned(path, "small", head)
    own = {n for n in path.weights if n == head or n.startswith(f"{head}/")} - path.stats
    assert own and own < set(names)
    others = set(names) - own
    assert others and all(path.weights[n].ndim < 2 or n.endswith(UNDECAYED) for n in others)
    assert set(names) < set(recover.tuned(path, "all", head))


# What these options change is tested with their systems; here they are claims.
DEAR = ("update", "gate"), ("single", "task_conditioned")
VARIANTS = [
    pytest.param(*case, marks=pytest.mark.claims)
    if any(option in DEAR[0] or value in DEAR[1] for option, value in case[1].items())
    else case
    for case in CASES
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "kinds"), VARIANTS, ids=str)
def test_a_path_is_the_model_for_its_task(
    name: str, options: dict[str, Any], kinds: set[str], tmp_path: Path
) -> None:
    config = replace(shrunk(name, tmp_path, **options), start_from=None)
    model, classes = loaded(config)
    # Compiling takes most of the time: a second task where another kind of attribute asks.
    tasks = list(registry.exporters(config))[: 2 if options == {"level": "attribute"} else 1]
    facts = [found for task in tasks if (found := cut(name, model, classes, task, kinds))]
    assert facts
    if not options and (not name.startswith("text/") or name in OTHERS):
        check_others(model, classes, facts[0].task, tmp_path)


@pytest.mark.claims
@pytest.mark.parametrize("name", [n for n, o, _ in CASES if not o and not n.startswith("text/")])
def test_every_other_task_has_its_path(name: str, tmp_path: Path) -> None:
    config = replace(shrunk(name, tmp_path), start_from=None)
    model, classes = loaded(config)
    kinds = next(kinds for n, options, kinds in CASES if n == name and not options)
    tasks = list(registry.exporters(config))[1 : len(model.tasks)]
    assert [cut(name, model, classes, task, kinds) for task in tasks]


def cut(
    name: str, model: Loaded, classes: Any, task: str, kinds: set[str]
) -> paths.PathFacts | None:
    """What a path is, which must be the model for its task; None where there can be none."""
    try:
        facts = paths.path_facts(model, classes, task)
    except UserError as error:
        assert name.startswith("rooms/conditional") and "cannot be exported" in str(error)
        return None
    assert set(facts.kinds) == kinds
    assert facts.apart <= 1e-5
    assert 0 < facts.parameters <= facts.full and facts.flops > 0
    assert len(paths.row(facts, {"jax": 1.0, "onnx": None})) == len(paths.HEADER) - 1
    return facts


def check_others(model: Loaded, classes: Any, name: str, folder: Path) -> None:
    """ONNX Runtime gives what the path gives, one at a time too, and LiteRT if it is here."""
    path, exporter = paths.whole_path(model, classes, name)
    task, given = exporter.subject(model, classes).tasks[name], paths.drawn(path.input, 3)
    said = onnx_file.write(folder, path, task, given)
    assert said["largest_difference"] <= other_forms.OFF and said["nodes"] > 10
    if find_spec("litert_converter"):
        assert litert_file.write(folder, path, task, given)["largest_difference"] <= other_forms.OFF


@pytest.mark.slow
def test_every_system_is_among_them() -> None:
    """By the class of its configuration."""
    cases = {type(load(name).model).__name__ for name, *_ in CASES}
    assert cases == set(registry.SYSTEMS.names)
    assert {name for name in TINY} <= {name for name, *_ in CASES}


@pytest.mark.parametrize("tasks", [0, -1])
def test_a_number_of_tasks_below_one_is_refused(tasks: int) -> None:
    with pytest.raises(UserError, match=f"--tasks is {tasks}"):
        paths.PathsArguments(tasks=tasks)
