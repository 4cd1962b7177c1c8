"""Names mean one thing each, and every public definition has a user or is known to be stock."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.fixtures import ROOT
from tests.test_floors import MODULES

# Public definitions that nothing in the package, its tools or its configurations uses, by reason.
# All are tested. An entry leaves this table when something uses it.
STOCK = {
    "a published variant, compared with its reference code, for systems to come": {
        "ops.capacity": (
            "by_position_across_ranks",
            "by_probability_across_ranks",
            "by_lot",
            "renormalised_after_dropping",
        ),
        "ops.balance": (
            "load_loss_mixed_spaces",
            "switch_loss_of_choices",
            "z_loss",
            "usage_entropy_loss",
            "mutual_information_loss_smoothed",
            "few_experts_loss",
        ),
        "deploy.reordering": (
            "ZCU104",
            "all_experts_mib",
            "layer_seconds",
            "token_by_token_seconds",
        ),
        "ops.groups": ("by_member",),
        "ops.interpolate": ("zoom_position_embedding",),
        "ops.lowrank": (
            "one_down",
            "truncated",
            "pruned_sums",
            "elected_means",
        ),
        "ops.prototypes": (
            "LIKENESSES",
            "PROTOTYPE_NORMS",
            "tied_prototype",
            "twice_weighted",
        ),
        "ops.routing": ("drop_small_weights",),
        "ops.skills": (
            "mixed_factors",
            "head_overlap",
            "buffet_penalty",
        ),
        "nn.batch_routers": ("EnsembleRouter",),
        "nn.exploration": ("SampledRouter",),
        "nn.lowrank": ("unweighted_router",),
    },
    "how the reference code trains or scores, to compare a run with its logs": {
        "tasks.losses": ("weighted_total",),
        "tasks.delta": ("PASCAL_RESNET18", "NYUD_RESNET50"),
        "domains.images.tasks.edge": ("TrainingProxy",),
        "domains.images.tasks.normals": ("loss_taskprompter", "exact_scores"),
        "domains.images.tasks.depth": ("within_80_metres", "not_marked"),
        "domains.images.data.padding": ("reference_marks",),
    },
    "for weights of the reference code, loaded by a script of one's own": {
        "weights.vmoe_names": ("to_reference",),
        "weights.m3vit_names": ("to_reference",),
        "weights.mod_squad_names": ("to_reference",),
        "weights.uniperceiver_names": ("to_uni_perceiver",),
        "weights.augreg_names": ("to_augreg",),
        "weights.swin_names": ("to_timm_swin",),
        "weights.peft": ("attach",),
    },
    "for a domain, a task or an analysis of one's own": {
        "registry": ("learn_reader",),
        "tasks.output": ("NUMBER",),
        "tasks.painting": ("number_tag",),
        "nn.exploration": ("POLICIES",),
        "domains.text.data.instruct": ("phrases_of",),
        "planning.collectives": ("least_bytes",),
        "deploy.usage": ("mean_outputs",),
        "data.pipeline": ("host_rows",),
    },
}


def _meaning(node: ast.stmt) -> tuple[str, str] | None:
    """The name of a type that a statement defines, and what makes two of them the same."""
    if isinstance(node, ast.ClassDef):
        return node.name, f"class at {node.lineno}"
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
        again = isinstance(node.value, ast.Attribute) and node.value.attr == name
        if name[0].isupper() and not name.isupper() and not again:
            return name, ast.unparse(node.value)
    return None


def test_the_name_of_a_type_means_one_thing() -> None:
    """A class's is its own; an alias may stand in several files with the same right side."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if meant := _meaning(node):
                name, what = meant
                key = what if not what.startswith("class at") else f"{module}, {what}"
                found[name][key].append(module)
    twice = {name: dict(where) for name, where in found.items() if len(where) > 1}
    assert not twice, twice


def _sources() -> dict[Path, ast.Module]:
    files = [*MODULES.values(), ROOT / "train.py"]
    files += [*(ROOT / "tools").glob("*.py"), *(ROOT / "configs").rglob("*.py")]
    return {path: ast.parse(path.read_text()) for path in files}


def _defined(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def test_public_definitions_have_a_user_or_are_known_as_stock() -> None:
    sources = _sources()
    used = set()
    for tree in sources.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
    stock = {
        (f"moezoo.{module}", name)
        for modules in STOCK.values()
        for module, names in modules.items()
        for name in names
    }
    idle = {
        (module, name)
        for module, path in MODULES.items()
        for name in _defined(sources[path])
        if name not in used
    }
    assert idle == stock, {"without a user": idle - stock, "used or gone": stock - idle}


def test_stock_is_tested() -> None:
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__))
    missing = [
        name
        for modules in STOCK.values()
        for names in modules.values()
        for name in names
        if name not in tests
    ]
    assert not missing, missing


# Modules whose name is also a common word, a field or another library's.
ELSEWHERE = {"ast", "evaluate", "config", "train", "json"}
FILES = {"py", "png", "json", "md", "npz", "onnx", "stablehlo", "tflite"}


def _within(module: str) -> set[str]:
    """Every name that a module binds, and those of its classes' members."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
    return found


def test_what_docstrings_refer_to_is_there() -> None:
    """`module.name` in comments and docstrings, where a module of the package has that name."""
    stems: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        stems[module.rpartition(".")[2]].append(module)
    names = {module: _within(module) for module in MODULES}
    gone = []
    for module, path in MODULES.items():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for ref in re.findall(r"`(?!jax|configs)([a-z_][\w.]*\.\w+)`", line):
                *_, stem, name = ref.split(".")
                places = stems.get(stem, []) if stem not in ELSEWHERE else []
                if name in FILES or not places:
                    continue
                if not any(name in names[p] or f"{p}.{name}" in MODULES for p in places):
                    gone.append(f"{module}:{number} `{ref}`")
    assert not gone, gone
