"""The command `moezoo launch`: a back end, its own options, and a run to start with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moezoo.command import parse
from moezoo.errors import UserError, unknown
from moezoo.launch.gke import GkeBackEnd
from moezoo.launch.job import BackEnd, LaunchJob, check_fits
from moezoo.launch.local import LocalBackEnd
from moezoo.launch.slurm import SlurmBackEnd
from moezoo.launch.tpu import TpuBackEnd
from moezoo.train import config_file

BACK_ENDS: dict[str, type] = {
    "local": LocalBackEnd,
    "slurm": SlurmBackEnd,
    "tpu": TpuBackEnd,
    "gke": GkeBackEnd,
}
DRY = "--dry-run"
USAGE = """usage: moezoo launch {kinds} CONFIG [options] [--dry-run] [--section.option VALUE ...]

Start one run as several processes, show what process 0 prints, and end with the exit code of the
run; of a failure, with the log of the process that failed first. Ctrl-C reaches all of them.

{rows}

  CONFIG            a configuration, for example rooms/m3vit_tiny
  --dry-run         print the files and commands, and run nothing

moezoo launch {kinds} --help lists the options of one. All options of moezoo train can be
given, too (moezoo train CONFIG --help).

Example: moezoo launch local rooms/m3vit_tiny --processes 2 --devices 4 --dry-run"""


def usage() -> str:
    """The help of the command by itself."""
    rows = [f"  {name:8}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in BACK_ENDS.items()]
    return USAGE.format(kinds="{" + ",".join(BACK_ENDS) + "}", rows="\n".join(rows))


def run(words: list[str], prog: str = "moezoo launch") -> int:
    """Check everything, then print the plan or carry it out; the run's exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    dry = DRY in words
    back_end, job = read([word for word in words if word != DRY], prog)
    check_fits(job, back_end)
    if not dry:
        back_end.check(job)
    plan = back_end.plan(job)
    if dry:
        print("\n".join(plan.lines()))
        return 0
    return back_end.run(job, plan)


def read(words: Sequence[str], prog: str) -> tuple[BackEnd, LaunchJob]:
    """The back end and the job that the words mean; UserError where they mean none."""
    name, *rest = words
    if name not in BACK_ENDS:
        raise unknown("way to launch", name, list(BACK_ENDS))
    kind = BACK_ENDS[name]
    own, others = separated(rest, kind)
    if any(word in ("-h", "--help") for word in rest):
        parse(kind, ["--help"], prog=f"{prog} {name} CONFIG")
    if not others or others[0].startswith("-"):
        raise UserError(
            f"Name a configuration after '{name}', for example: {prog} {name} rooms/m3vit_tiny."
        )
    back_end = parse(kind, own, prog=f"{prog} {name}")
    config, options = others[0], others[1:]
    settings = config_file.load(config, options, prog=f"{prog} {name}")
    return back_end, LaunchJob(config, tuple(options), settings)


def separated(words: Sequence[str], kind: type) -> tuple[list[str], list[str]]:
    """The options of a back end with their values, and all other words, in their order."""
    names = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)}
    own: list[str] = []
    others: list[str] = []
    left = iter(words)
    for word in left:
        option, equals, _ = word.partition("=")
        if option.replace("_", "-") not in names:
            others.append(word)
        elif equals:
            own.append(word)
        else:  # in one piece, because a value may begin with dashes
            value = next(left, None)
            own.append(word if value is None else f"{word}={value}")
    return own, others
