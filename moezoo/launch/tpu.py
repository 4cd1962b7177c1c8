"""A TPU pod of Google Cloud: one VM per host, the same command on all of them through ssh.

The pod is asked for at once (`--request vm`), through the queue (`--request queued`), or there
already (`--request existing`). `gcloud` writes what each worker prints into a file of its own. The
pod stays when the run has ended: it costs money until it is deleted, and the command for that is
printed.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from moezoo import storage
from moezoo.errors import UserError
from moezoo.launch import processes
from moezoo.launch.job import (
    COMPILED,
    Command,
    LaunchJob,
    LaunchPlan,
    check_installed,
    check_label,
    check_plain,
    label_of,
    set_up,
)
from moezoo.launch.slurm import ENDED, SAVED
from moezoo.train.chips import TPUS, slices_text, some_slice_has

# Devices of JAX for each unit of a type's number: v2 and v3 count cores, each of which is a device;
# v4 and v5p count cores, of which two make one; the others count chips.
PER_UNIT = {"v2": 1.0, "v3": 1.0, "v4": 0.5, "v5p": 0.5, "v5litepod": 1.0, "v6e": 1.0}
ACCELERATOR = re.compile(r"(v\w+)-(\d+)")
ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
PER_HOST = {"v2": 8, "v3": 8, "v4": 4, "v5p": 4, "v5litepod": 8, "v6e": 8}  # devices, at most
READY, GONE = "ACTIVE", ("FAILED", "SUSPENDED")
POLL = 15.0  # seconds between two questions about the queue
# What a worker runs: its own number of a process is kept, so that a signal can reach it later.
WORKER = """\
{setup}cd {folder} && sh -c {shell} moezoo {train}
code=$?
echo "moezoo: exit code $code at $(date +%s.%N)"
exit "$code"
"""


@dataclass(frozen=True)
class TpuBackEnd:
    """All hosts of a TPU pod on Google Cloud.

    Example: moezoo launch tpu rooms/m3vit_tiny --zone us-west4-a --accelerator v5litepod-16
    """

    zone: str
    """The zone, for example us-west4-a."""
    accelerator: str
    """The type and size, for example v5litepod-16, v5p-32 or v6e-64."""
    pod: str | None = None
    """The pod's name; that of the run, if left out."""
    project: str | None = None
    """The project; that of gcloud's configuration, if left out."""
    request: Literal["vm", "queued", "existing"] = "vm"
    """vm: create the pod now; queued: wait for it in the queue; existing: it is there."""
    version: str = "v2-alpha-tpuv5-lite"
    """The software of the VMs; Google's pages name the one for each type."""
    provisioning: Literal["on-demand", "spot"] = "on-demand"
    """spot: cheaper, and taken away at any time; the same command goes on later."""
    setup: str | None = None
    """A line of shell that every host runs first, for example to install moezoo."""
    folder: str = "."
    """Where every host starts the run; a folder of a disk that all share, if it holds the runs."""
    python: str = "python3"
    """The Python of the hosts that has moezoo."""
    compiled: str | None = None
    """Where JAX keeps compiled programs for the next start, for example gs://BUCKET/compiled."""

    def name(self, job: LaunchJob) -> str:
        """The pod's."""
        return label_of(job.name) if self.pod is None else self.pod

    def total_devices(self, job: LaunchJob) -> int:
        """Those of the accelerator."""
        check_label(self.name(job), "--pod")
        for name in ("project", "version", "setup", "folder", "python", "compiled"):
            check_plain(getattr(self, name), f"--{name}")
        if not ZONE.fullmatch(self.zone):
            raise UserError(f"--zone is '{self.zone}'; give one such as us-west4-a.")
        found = ACCELERATOR.fullmatch(self.accelerator)
        if found is None or found[1] not in PER_UNIT or int(found[2]) < 1:
            known = ", ".join(f"{kind}-N" for kind in PER_UNIT)
            raise UserError(f"--accelerator is '{self.accelerator}'; it must be one of {known}.")
        if job.settings.mesh.slices != 1:
            raise UserError(
                f"mesh.slices is {job.settings.mesh.slices}, but `launch tpu` starts one pod; use "
                "`launch gke` for several slices."
            )
        count = int(found[2]) * PER_UNIT[found[1]]
        if found[1] in TPUS and not some_slice_has(found[1], int(count)):
            raise UserError(
                f"No slice is --accelerator {self.accelerator} ({count:g} chips): "
                f"{slices_text(found[1])}."
            )
        devices = max(1, int(count))
        self._check_disk(job, devices > PER_HOST[found[1]])
        return devices

    def _check_disk(self, job: LaunchJob, several: bool) -> None:
        """UserError where every one of several hosts would keep the run on a disk of its own."""
        directory = job.settings.directory
        if not several or storage.is_stored(directory) or PurePosixPath(directory).is_absolute():
            return
        if self.folder == ".":
            raise UserError(
                f"{self.accelerator} has several hosts, and '{directory}' would be another folder "
                "on each: give a --directory in an object store (gs://BUCKET/runs), or a --folder "
                "on a disk that all of them mount."
            )

    def _where(self) -> tuple[str, ...]:
        project = () if self.project is None else (f"--project={self.project}",)
        return (f"--zone={self.zone}", *project)

    def ssh(self, job: LaunchJob, script: str, *more: str) -> tuple[str, ...]:
        """The words that run a script on all hosts at once."""
        return (
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", self.name(job), *self._where()),
            *("--worker=all", f"--command={script}", *more),
        )

    def pid_file(self, job: LaunchJob) -> str:
        """Where every host keeps which process to signal."""
        return f"/tmp/moezoo-{self.name(job)}.pid"

    def plan(self, job: LaunchJob) -> LaunchPlan:
        """The pod, then the run on it; what is asked for at once also as a request to the queue."""
        worker = WORKER.format(
            setup=set_up(self.setup) + exported(self.compiled),
            folder=shlex.quote(self.folder),
            shell=shlex.quote(f'echo $$ > {self.pid_file(job)}; exec "$@"'),
            train=shlex.join(job.train(self.python)),
        )
        train = self.ssh(job, worker, f"--output-directory={job.logs}")
        made = REQUESTS[self.request](self, job)
        others = {"vm": "queued", "queued": "vm"}
        instead = [
            (f"The same with --request {other}", Command(words))
            for other in [others.get(self.request)]
            if other is not None
            for words in REQUESTS[other](self, job)
        ]
        instead += [("When the pod is not needed any more", Command(self._delete(job)))]
        folder = Command(("mkdir", "-p", str(job.logs)))
        return LaunchPlan((), (*map(Command, made), folder, Command(train)), tuple(instead))

    def _delete(self, job: LaunchJob) -> tuple[str, ...]:
        name, where = self.name(job), self._where()
        if self.request == "queued":
            return (*_QUEUE, "delete", name, *where, "--force", "--quiet")
        return ("gcloud", "compute", "tpus", "tpu-vm", "delete", name, *where, "--quiet")

    def check(self, job: LaunchJob) -> None:
        """UserError where gcloud is missing."""
        check_installed("gcloud", "see https://cloud.google.com/sdk/docs/install")

    def run(self, job: LaunchJob, plan: LaunchPlan) -> int:
        """Ask for the pod, run on all hosts, show what host 0 prints."""
        *before, train = plan.commands
        print(f"The pod stays until you run: {plan.instead[-1][1].shown()}", flush=True)
        with processes.signals() as held:
            for command in before:
                code = subprocess.call(command.words, stdin=subprocess.DEVNULL)
                if code != 0 or held.seen:
                    return SAVED if held.seen else _refused(command)
            if self.request == "queued" and not self._waited(job, held):
                return SAVED
            for old in job.logs.glob("[0-9]*.log"):
                old.unlink()
            return self._followed(job, train, held)

    def _waited(self, job: LaunchJob, held: processes.Signals) -> bool:
        """Whether the queue has given the pod, and nobody lost patience."""
        ask = (*_QUEUE, "describe", self.name(job), *self._where(), "--format=value(state.state)")
        before = ""
        while not held.seen:
            done = subprocess.run(ask, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            state = done.stdout.strip()
            if done.returncode != 0 or state in GONE:
                why = state or " ".join(done.stderr.split())
                raise UserError(f"The queue did not give the pod {self.name(job)}: {why}.")
            if state == READY:
                return True
            if state != before:
                print(f"{self.name(job)} waits in the queue ({state}).", flush=True)
                before = state
            time.sleep(POLL)
        return False

    def _followed(self, job: LaunchJob, train: Command, held: processes.Signals) -> int:
        """Show what host 0 prints until the run has ended on all; its exit code."""
        stream = processes.Stream(job.logs / "0.log")
        errors = job.logs / "gcloud.log"
        with errors.open("wb") as file:
            ssh = subprocess.Popen(
                train.words,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,  # Ctrl-C would cut the connection, not end the run
            )  # fmt: skip
        while ssh.poll() is None:
            for _ in held.take():
                print("Telling all hosts, which save first.", flush=True)
                # Not Ctrl-C's: what a shell starts in the background does not hear that.
                kill = f'kill -TERM "$(cat {self.pid_file(job)})"'
                subprocess.call(self.ssh(job, kill), stdin=subprocess.DEVNULL)
                if held.seen > 2:
                    ssh.terminate()
            stream.show()
            time.sleep(processes.LOOK)
        stream.show()
        if ssh.returncode == 0:
            return 0
        return SAVED if held.seen else _first_of(job, ssh.returncode)


def exported(compiled: str | None) -> str:
    """A line that tells JAX where compiled programs are kept."""
    return "" if compiled is None else f"export {COMPILED}={shlex.quote(compiled)}\n"


_QUEUE = ("gcloud", "compute", "tpus", "queued-resources")


def _now(back: TpuBackEnd, job: LaunchJob) -> list[tuple[str, ...]]:
    """Create the pod, or fail."""
    words = ("gcloud", "compute", "tpus", "tpu-vm", "create", back.name(job), *back._where())
    words += (f"--accelerator-type={back.accelerator}", f"--version={back.version}")
    return [(*words, *_spot(back))]


def _queued(back: TpuBackEnd, job: LaunchJob) -> list[tuple[str, ...]]:
    """A place in the queue."""
    name = back.name(job)
    words = (*_QUEUE, "create", name, f"--node-id={name}", *back._where())
    words += (f"--accelerator-type={back.accelerator}", f"--runtime-version={back.version}")
    return [(*words, *_spot(back))]


def _there(back: TpuBackEnd, job: LaunchJob) -> list[tuple[str, ...]]:
    """Nothing: the pod is there."""
    return []


REQUESTS: dict[str, Callable[[TpuBackEnd, LaunchJob], list[tuple[str, ...]]]] = {
    "vm": _now,
    "queued": _queued,
    "existing": _there,
}


def _spot(back: TpuBackEnd) -> Sequence[str]:
    return ("--spot",) if back.provisioning == "spot" else ()


def _refused(command: Command) -> int:
    raise UserError(f"gcloud refused, as it says above: {command.shown()[:200]}")


def _first_of(job: LaunchJob, code: int) -> int:
    """Show the log of the host that failed first; its exit code, or else that of gcloud."""
    found = []
    for log in job.logs.glob("[0-9]*.log"):
        ends = ENDED.findall(processes.tail(log))
        if ends and int(ends[-1][0]):
            found.append((float(ends[-1][1]), int(log.stem), int(ends[-1][0])))
    if not found:
        errors = job.logs / "gcloud.log"
        print(f"gcloud ended with exit code {code}. The end of {errors}:")
        print(processes.tail(errors), flush=True)
        return processes.code_of(code)
    codes = {index: one for _, index, one in found}
    order = [index for _, index, _ in sorted(found)]
    first = processes.first_to_fail(order, lambda index: job.logs / f"{index}.log")
    return processes.report(first, codes.get(first, code) or 1, job.logs / f"{first}.log")
