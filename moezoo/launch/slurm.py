"""A job of Slurm: one process per task, saved and queued again when it has to make room.

Two scripts are written. job.sh is what sbatch is given; it starts task.sh once per process.
Slurm sends SIGTERM before the time is over, and whoever wants the nodes does the same by
`scancel --signal=TERM`: the run saves and leaves with exit code 130, and the job queues itself
again. The same command then goes on where it stopped.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moezoo.errors import UserError
from moezoo.launch import processes
from moezoo.launch.job import (
    Command,
    File,
    LaunchJob,
    LaunchPlan,
    check_installed,
    check_plain,
    check_positive,
    here,
    quoted,
    set_up,
)

SAVED = 130  # the exit code of a run that was asked to stop and has saved
EARLY = 143  # of a program that SIGTERM ends
POLL = 1.0  # seconds between two questions to Slurm
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
ENDS |= {"BOOT_FAIL", "PREEMPTED", "REVOKED"}
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
ENDED = re.compile(r"^moezoo: exit code (\d+) at ([\d.]+)$", re.M)

JOB = """\
#!/bin/bash
{options}
# Written by `moezoo launch slurm`; submit it again with: sbatch {self}
set -u

srun --kill-on-bad-exit=0 --wait=60 --open-mode={mode} \\
    --output={output} \\
    bash {task}
code=$?

# {saved}: the run was asked to stop and has saved; {early}: it was asked before there was anything
# to save. It goes on when there is room again.
case "$code" in
    {saved} | {early})
        if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "$code"
"""

TASK = """\
#!/bin/bash
# One process of the run, started by job.sh on every node.
set -u
cd {folder} || exit 2
{setup}\
# Slurm tells all processes at once; this one stays to say how the other ended.
trap : TERM INT
{train}
code=$?
echo "moezoo: exit code $code at $(date +%s.%N)"
exit "$code"
"""


@dataclass(frozen=True)
class SlurmBackEnd:
    """A job on the nodes of a Slurm cluster; folder and run lie on a disk that they share.

    Example: moezoo launch slurm rooms/m3vit_tiny --nodes 2 --gpus-per-node 4 --mesh.data 8
    """

    nodes: int = 1
    """How many nodes."""
    processes_per_node: int | None = None
    """Processes on each; one, or one per GPU where there are GPUs, as JAX wants it."""
    gpus_per_node: int | None = None
    """GPUs of each node; none where it is left out."""
    cpus_per_process: int | None = None
    """Cores of each process."""
    partition: str | None = None
    """The partition; the cluster's default one, if left out."""
    account: str | None = None
    """The account that pays."""
    time: str | None = None
    """The limit as Slurm takes it, for example 12:00:00; the run saves 90 seconds before it."""
    restarts: int = 100
    """How often the job queues itself again after saving."""
    extra: str = ""
    """More options of sbatch in one word, for example '--qos=high --constraint=a100'."""
    setup: str | None = None
    """A line of shell that every process runs first, for example 'module load cuda'."""
    python: str = sys.executable
    """The Python that has moezoo, on every node."""

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or self.gpus_per_node or 1

    def total_devices(self, job: LaunchJob) -> int:
        """One for each process: JAX gives a process of a Slurm job one GPU."""
        for name in ("nodes", "processes_per_node", "gpus_per_node", "cpus_per_process"):
            check_positive(getattr(self, name), f"--{name}")
        if self.gpus_per_node not in (None, self.tasks):
            raise UserError(
                f"--processes_per_node is {self.tasks}, but --gpus_per_node is "
                f"{self.gpus_per_node}: JAX gives each process one GPU, so leave the former out."
            )
        for name in ("partition", "account", "setup", "python"):
            check_plain(getattr(self, name), f"--{name}")
        if self.time is not None and not TIME.fullmatch(self.time):
            raise UserError(f"--time is '{self.time}'; give for example 90 (minutes) or 12:00:00.")
        if self.restarts < 0:
            raise UserError(f"--restarts is {self.restarts}; it must be at least 0.")
        self._more()
        check_plain(str(here()), "The folder of this run")
        return self.nodes * self.tasks

    def _more(self) -> list[str]:
        try:
            words = shlex.split(self.extra)
        except ValueError as error:
            raise UserError(f"--extra is {self.extra!r}: {error}.") from error
        for word in words:
            if not re.fullmatch(r"--[a-z][-a-z]*(=\S+)?", word):
                raise UserError(
                    f"--extra has '{word}'; it must have long options of sbatch only, each in one "
                    "piece: --qos=high."
                )
        return words

    def plan(self, job: LaunchJob) -> LaunchPlan:
        """The two scripts and their submission."""
        logs = here() / job.logs
        values: list[tuple[str, object]] = [
            ("job-name", job.name.replace("/", "-")),
            ("nodes", self.nodes),
            ("ntasks-per-node", self.tasks),
            ("gpus-per-node", self.gpus_per_node),
            ("cpus-per-task", self.cpus_per_process),
            ("partition", self.partition),
            ("account", self.account),
            ("time", self.time),
            ("signal", "TERM@90"),
            ("open-mode", "append"),
            ("output", _pattern(logs / "job.log")),
        ]
        given = [f"--{name}={value}" for name, value in values if value is not None]
        options = [*given, "--requeue", *self._more()]
        texts = {
            "job.sh": JOB.format(
                options="\n".join(f"#SBATCH {_option(option)}" for option in options),
                self=shlex.quote(str(logs / "job.sh")),
                mode="append",
                output=shlex.quote(f"{_pattern(logs)}/%t.log"),
                task=shlex.quote(str(logs / "task.sh")),
                saved=SAVED,
                early=EARLY,
                restarts=self.restarts,
            ),
            "task.sh": TASK.format(
                folder=shlex.quote(str(here())),
                setup=set_up(self.setup),
                train=quoted(job.train(self.python)),
            ),
        }
        submit = ("sbatch", "--parsable", str(logs / "job.sh"))
        return LaunchPlan(
            tuple(File(logs / name, text) for name, text in texts.items()), (Command(submit),)
        )

    def check(self, job: LaunchJob) -> None:
        """UserError where there is no Slurm."""
        for program in ("sbatch", "squeue", "scontrol", "scancel"):
            check_installed(program, "run this on a login node of a Slurm cluster")

    def run(self, job: LaunchJob, plan: LaunchPlan) -> int:
        """Submit, show what process 0 prints, wait through all restarts."""
        plan.write()
        logs = here() / job.logs
        for old in logs.glob("[0-9]*.log"):
            old.unlink()  # of another job
        said = _ask(plan.commands[0].words)
        number = said.strip().partition(";")[0]
        if not number.isdigit():
            raise UserError(f"sbatch did not say the number of a job, but: {said.strip()!r}.")
        print(f"Job {number} is submitted; it goes on if this program is closed.", flush=True)
        with processes.signals() as held:
            state, code = _follow(number, logs, held)
        if state == "COMPLETED":
            return 0
        if held.seen or state == "CANCELLED":
            print(f"Job {number}: {state}.")
            return SAVED
        return _failed(number, state, code, self.nodes * self.tasks, logs)


def _pattern(path: Path) -> str:
    """A path in which Slurm replaces nothing."""
    return str(path).replace("%", "%%")


def _option(option: str) -> str:
    """An option as a comment of a script, which Slurm splits at spaces as a shell would."""
    return shlex.quote(option)


def _ask(words: Sequence[str]) -> str:
    """What a program of Slurm's says; UserError with its own words where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"{words[0]} refused: {why}")
    return done.stdout


def _state(number: str) -> tuple[str, int]:
    """A job's state and its exit code so far."""
    said = _ask(("scontrol", "--oneliner", "show", "job", number))
    values = dict(word.split("=", 1) for word in said.split() if "=" in word)
    code, _, by = values.get("ExitCode", "1:0").partition(":")
    return values.get("JobState", "FAILED"), int(code) or (128 + int(by or 0) if by != "0" else 0)


def _follow(number: str, logs: Path, held: processes.Signals) -> tuple[str, int]:
    """Show what process 0 prints until the job has ended; its last state and exit code."""
    stream, before, misses, cancelled = processes.Stream(logs / "0.log"), "", 0, False
    while True:
        try:
            state, code = _state(number)
            misses = 0
        except UserError:  # the controller restarts, or has forgotten the job
            misses += 1
            if misses > 30:
                raise
            state, code = before, 1
        if state != before:
            print(f"Job {number}: {state.lower()}.", flush=True)
            before = state
        stream.show()
        if state in ENDS:
            return state, code
        if held.take():
            if cancelled:
                return state, SAVED
            print(f"Cancelling job {number}, which saves first.", flush=True)
            _ask(("scancel", number))
            cancelled = True
        time.sleep(POLL)


def _failed(number: str, state: str, code: int, count: int, logs: Path) -> int:
    """Show the log of the process that failed first; its exit code, or else the job's."""
    ends = {
        index: found[-1]
        for index in range(count)
        if (found := ENDED.findall(processes.tail(logs / f"{index}.log")))
    }
    bad = sorted((float(when), index) for index, (one, when) in ends.items() if int(one))
    if not bad:  # the node is gone, or the script itself failed
        print(f"Job {number} ended as {state}. The end of {logs / 'job.log'}:")
        print(processes.tail(logs / "job.log"), flush=True)
        return code or 1
    order = [index for _, index in bad]
    first = processes.first_to_fail(order, lambda index: logs / f"{index}.log")
    own = int(ends[first][0]) if first in ends else code
    return processes.report(first, own or 1, logs / f"{first}.log")
