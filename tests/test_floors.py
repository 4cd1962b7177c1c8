"""The architecture as a test: imports go downwards, and no module imports itself in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from moezoo.registry import DOMAINS, SYSTEMS
from tests.fixtures import ROOT

FLOORS = {
    "early": -1,
    "errors": 0,
    "regular": 0,
    "object_path": 0.3,
    "storage": 0.6,
    "label": 1,
    "registry": 1,
    "folder_lock": 0,
    "schema_check": 0,
    "tensor_header": 1,
    "fields": 1,
    "files": 1,
    "text_lines": 0,
    "json_text": 0,
    "command": 1,
    "timing": 1,
    "plain_path": 1,
    "structured": 1,
    "ops": 1,
    "nn": 2,
    "backbones": 3,
    "models": 4,
    "tasks": 4,
    "data": 4,
    "weights": 4,
    "train": 5,
    "deploy": 6,
    "planning": 7,
    "launch": 7,
    "domains": 8,
    "bench": 9,
    "front": 9,
    "cli": 10,
    "__main__": 11,
}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted((ROOT / "moezoo").rglob("*.py"))}


def _imports(path: Path, everywhere: bool) -> set[str]:
    """Names of moezoo modules that a file imports (at module level only, or everywhere)."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name in MODULES}


def _folder(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("module", [m for m in MODULES if m != "moezoo"])
def test_imports_point_downwards(module: str) -> None:
    here = _folder(module)
    for other in _imports(MODULES[module], everywhere=True) - {"moezoo"}:
        there = _folder(other)
        if here == there:
            continue
        assert FLOORS[there] < FLOORS[here], (
            f"{module} (floor {FLOORS[here]}) imports {other} (floor {FLOORS[there]})"
        )


def test_no_circles() -> None:
    # Imports inside functions, too: a circle that hides there is one all the same.
    graph = {m: _imports(path, everywhere=True) - {"moezoo", m} for m, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for other in graph[module]:
            visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_nothing_imports_configs() -> None:
    for module, path in MODULES.items():
        assert "import configs" not in path.read_text(), module
        assert "from configs" not in path.read_text(), module


def test_functions_stay_short() -> None:
    long = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if length > 40:
                    long[f"{name}.{node.name}"] = length
    assert not long, long


ENGINE = ("train", "deploy", "planning")
# Words that mean something else where they stand, and must stay because files have them.
OTHERWISE = {
    "moezoo.train.curves": {"edge"},  # matplotlib's, of a tick
    "moezoo.deploy.certificate": {"event"},  # that two predictions disagree
    "moezoo.deploy.deliver": {"event"},
    "moezoo.deploy.calibrate": {"images"},  # the name of an array in files of statistics
}


def _names_of_kinds() -> set[str]:
    """Names by which code could tell one domain, system or task from another."""
    names = {*SYSTEMS.places, *DOMAINS.places}
    names |= {place.split(".")[1] for place in (*SYSTEMS.places.values(), *DOMAINS.places.values())}
    for kind in DOMAINS.all():
        domain = kind().domain
        names |= {domain.name, *domain.tasks}
    return names


@pytest.mark.parametrize("module", [m for m in MODULES if _folder(m) in ENGINE])
def test_the_engine_names_no_domain_system_or_task(module: str) -> None:
    """Neither as a text, nor as a class, nor by importing one: it asks the object."""
    names = _names_of_kinds()
    tree = ast.parse(MODULES[module].read_text())
    # The files of an export are a format, which travels without moezoo and names its inputs.
    allowed = {"image", "audio", "sound"} if ".runtime" in module else OTHERWISE.get(module, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in names - allowed, f"{module}:{node.lineno} {node.value!r}"
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            classes = {*SYSTEMS.places, *DOMAINS.places}
            assert name not in classes, f"{module}:{node.lineno} {name}"
    for other in _imports(MODULES[module], everywhere=True):
        assert not other.startswith("moezoo.domains"), f"{module} imports {other}"
        if other.startswith("moezoo.models"):
            assert other.startswith("moezoo.models.shared"), f"{module} imports {other}"
