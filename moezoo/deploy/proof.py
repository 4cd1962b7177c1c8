"""An exported folder checked by a process that knows nothing but the folder and its loader.

A fresh process, which has no moezoo and whose loader is a copy of ours, shows what a user without
moezoo gets. None of the folder's own programs is run: they are whoever's wrote the folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from moezoo import regular
from moezoo.deploy import page
from moezoo.deploy.export import CHECKING
from moezoo.deploy.runtime.forms import ExportError
from moezoo.deploy.runtime.load import GIVE_UP, load_export

LONGER = 60.0  # seconds to start and end, beyond those after which the process gives up


def checked(folder: Path) -> list[str]:
    """What was found right, a line each; ExportError with one sentence for what was not."""
    # Here first: what the input's reader says of the manifest is asked by no other process.
    load_export(folder)
    with tempfile.TemporaryDirectory() as own:
        for name, module in CHECKING.items():
            shutil.copyfile(str(module.__file__), Path(own) / name)
        done = _run(Path(own) / "verify.py", folder)
    said = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode and said.startswith("error: "):
        raise ExportError(said.removeprefix("error: "))
    if done.returncode:  # not by its own decision: what it says last may be anything
        raise ExportError(
            f"{folder} was not checked: the process that was to check it ended by itself, with "
            f"{done.returncode}."
        )
    *told, last = done.stdout.strip().splitlines()
    return [*told, f"programs: {_programs(folder)}", *_page(folder), last]


def _programs(folder: Path) -> str:
    """Whether those in the folder are the ones that this version writes."""
    others = [
        name
        for name, module in CHECKING.items()
        if not (folder / name).is_file()
        or (folder / name).stat().st_size > regular.MB
        or (folder / name).read_bytes() != Path(str(module.__file__)).read_bytes()
    ]
    if not others:
        return "those that load and check are this version's"
    more = f" and {len(others) - 1} more" if others[1:] else ""
    return (
        f"{others[0]}{more} are not this version's: do not run them where the folder is a "
        "stranger's"
    )


def _page(folder: Path) -> list[str]:
    """Whether the page is this version's, a line; a page is a program that a browser runs."""
    file = folder / "index.html"
    if not file.is_file():
        return []
    if page.is_own(file):
        return ["page: index.html is this version's program; what it shows was not compared"]
    return [
        "page: index.html is not this version's: do not open it where the folder is a stranger's"
    ]


def _run(program: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    # Isolated (-I): neither the working directory nor PYTHONPATH can bring modules in.
    words = [sys.executable, "-I", "-B", str(program), str(folder.resolve())]
    try:
        return subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=GIVE_UP + LONGER,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{folder} was not checked within {GIVE_UP:.0f} s.") from error
