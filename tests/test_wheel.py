"""What a wheel holds: the package with its configurations inside, and nothing beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moezoo.train import zoo
from tests.fixtures import ROOT


@pytest.mark.slow
def test_a_wheel_has_the_configurations_inside_of_the_package(tmp_path: Path) -> None:
    kept = ("moezoo", "configs", "pyproject.toml", "README.md", "LICENSE")
    for name in kept:  # a copy, so that nothing is left where it was built
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, tmp_path / "clone" / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, tmp_path / "clone" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*pip, str(tmp_path / "clone")], check=True, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(tmp_path / "site")
    assert {name.split("/")[0].split("-")[0] for name in names} == {"moezoo"}
    own = {f"moezoo/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert own <= set(names)
    weights = {f"moezoo/{path.relative_to(ROOT / 'moezoo')}" for path in zoo.ZOO.rglob("*.*")}
    assert weights and weights <= set(names)
    assert "moezoo/front/printed.json" in names
    code = (
        "import moezoo; from moezoo.train.config_file import load; "
        "print(moezoo.__file__, load('rooms/m3vit_tiny').name)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    where, name = told.stdout.split()
    assert where.startswith(str(tmp_path / "site")) and name == "m3vit_tiny"
