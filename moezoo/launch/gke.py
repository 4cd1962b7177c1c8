"""TPU slices of Google Kubernetes Engine: a JobSet, or the command of xpk that makes the same.

`kubectl` has to know the cluster (gcloud container clusters get-credentials). Pods come one after
the other, so processes wait longer for each other here than elsewhere.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from moezoo import storage
from moezoo.errors import UserError, unknown
from moezoo.launch import processes
from moezoo.launch.job import (
    COMPILED,
    Command,
    File,
    LaunchJob,
    LaunchPlan,
    check_installed,
    check_label,
    check_plain,
    check_positive,
    label_of,
)
from moezoo.launch.manifest import Disk, Slices, job_set, yaml
from moezoo.launch.slurm import SAVED
from moezoo.train.chips import chips_of_slice

PATIENCE = "900"  # seconds that processes wait for each other, while images are fetched
POLL = 5.0  # seconds between two questions to Kubernetes
SET, INDEX = "jobset.sigs.k8s.io/jobset-name", "batch.kubernetes.io/job-completion-index"
JOB_INDEX = "jobset.sigs.k8s.io/job-index"
IMAGE = re.compile(r"[\w][\w.\-/:@]*", re.A)


class Generation(NamedTuple):
    """What Google calls a generation of TPUs in Kubernetes and in xpk.

    units: what the number in xpk's names counts, for each chip.
    """

    accelerator: str
    xpk: str
    units: int


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "v4", 2),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", 1),
    "v5p": Generation("tpu-v5p-slice", "v5p", 2),
    "v6e": Generation("tpu-v6e-slice", "v6e", 1),
}


@dataclass(frozen=True)
class GkeBackEnd:
    """TPU slices of a Kubernetes cluster on Google Cloud, as a JobSet.

    Example: moezoo launch gke rooms/m3vit_tiny --image IMAGE --topology v5e:4x4 --claim runs
    """

    image: str
    """The container's image, which has moezoo."""
    topology: str
    """The slice as `moezoo plan` takes it, for example v5e:4x4 or v5p:2x2x4."""
    claim: str | None = None
    """A PersistentVolumeClaim that many nodes can write to, for the folder of runs."""
    folder: str = "/shared"
    """Where the pods have that volume; runs go below, if --directory is not given."""
    slices: int | None = None
    """How many slices; mesh.slices, if left out."""
    chips_per_host: int = 4
    """TPU chips of each host."""
    cluster: str = "CLUSTER"
    """The cluster's name, in the command for xpk only."""
    context: str | None = None
    """The context of kubectl; its current one, if left out."""
    restarts: int = 10
    """How often the whole set begins again after a failure."""
    python: str = "python3"
    """The Python of the image that has moezoo."""
    compiled: str | None = None
    """Where JAX keeps compiled programs for the next start, for example gs://BUCKET/compiled."""

    def name(self, job: LaunchJob) -> str:
        """The JobSet's; pods add the slice's and the host's number, in a label of 63 letters."""
        return label_of(job.name)

    def _slices(self, job: LaunchJob) -> tuple[Slices, Generation]:
        name, _, sides = self.topology.partition(":")
        if name not in GENERATIONS:
            raise unknown("kind of TPU", name, list(GENERATIONS))
        kind, total = GENERATIONS[name], chips_of_slice(self.topology)
        chips = min(self.chips_per_host, total)
        if total % chips:
            raise UserError(
                f"--chips_per_host is {chips}, which does not divide the {total} chips of "
                f"{self.topology}."
            )
        count = job.settings.mesh.slices if self.slices is None else self.slices
        return Slices(count, kind.accelerator, sides, total // chips, chips), kind

    def total_devices(self, job: LaunchJob) -> int:
        """The chips of all slices."""
        check_positive(self.slices, "--slices")
        check_positive(self.chips_per_host, "--chips_per_host")
        if self.restarts < 0:
            raise UserError(f"--restarts is {self.restarts}; it must be at least 0.")
        check_label(self.name(job), "The name of the JobSet")
        if not IMAGE.fullmatch(self.image):
            raise UserError(f"--image is '{self.image}', which is no name of an image.")
        if self.claim is not None:
            check_label(self.claim, "--claim")
        if not PurePosixPath(self.folder).is_absolute():
            raise UserError(f"--folder is '{self.folder}'; it must begin with a slash.")
        for name in ("cluster", "context", "python", "compiled"):
            check_plain(getattr(self, name), f"--{name}")
        found, _ = self._slices(job)
        self._check_disk(job)
        if found.count != job.settings.mesh.slices:
            raise UserError(
                f"--slices is {found.count}, but mesh.slices is {job.settings.mesh.slices}: leave "
                "the former out."
            )
        return found.count * found.hosts * found.chips

    def _check_disk(self, job: LaunchJob) -> None:
        """UserError where a run would lie on the disks of pods, which go with them."""
        directory = job.settings.directory
        if storage.is_stored(directory):
            return
        if self.claim is None:
            raise UserError(
                "Pods keep nothing: give a --directory in an object store (gs://BUCKET/runs), or "
                "name a volume that all of them share (--claim)."
            )
        own = "--directory" in job.heads()
        if own and not PurePosixPath(directory).is_relative_to(self.folder):
            raise UserError(
                f"--directory is '{directory}', but pods have the volume {self.claim} at "
                f"{self.folder} (--folder) and keep nothing else: leave --directory out, or name a "
                "folder in it."
            )

    def _train(self, job: LaunchJob) -> tuple[str, ...]:
        more: list[str] = []
        heads = job.heads()
        if "--directory" not in heads and not storage.is_stored(job.settings.directory):
            more += ["--directory", self.folder]
        if "--hosts.timeout" not in heads:
            more += ["--hosts.timeout", PATIENCE]
        return job.train(self.python, *more)

    def _env(self) -> dict[str, str]:
        return {} if self.compiled is None else {COMPILED: self.compiled}

    def kubectl(self, *words: str) -> tuple[str, ...]:
        """The words of a command to the cluster."""
        context = () if self.context is None else (f"--context={self.context}",)
        return ("kubectl", *context, *words)

    def plan(self, job: LaunchJob) -> LaunchPlan:
        """The manifest and its application; the command of xpk instead."""
        (slices, kind), train = self._slices(job), self._train(job)
        disk = Disk(self.claim, self.folder)
        made = job_set(self.name(job), self.image, train, slices, self.restarts, disk, self._env())
        file = job.logs / "jobset.yaml"
        chips = slices.hosts * slices.chips
        xpk = (
            *("xpk", "workload", "create", f"--cluster={self.cluster}"),
            *(f"--workload={self.name(job)}", f"--tpu-type={kind.xpk}-{chips * kind.units}"),
            *(f"--num-slices={slices.count}", f"--docker-image={self.image}"),
            *(f"--env={name}={value}" for name, value in self._env().items()),
            *(f"--max-restarts={self.restarts}", f"--command={shlex.join(train)}"),
        )
        apply = Command(self.kubectl("apply", f"--filename={file}"))
        return LaunchPlan(
            (File(file, yaml(made)),), (apply,), (("The same with xpk", Command(xpk)),)
        )

    def check(self, job: LaunchJob) -> None:
        """UserError where kubectl is missing."""
        check_installed("kubectl", "see https://kubernetes.io/docs/tasks/tools")

    def run(self, job: LaunchJob, plan: LaunchPlan) -> int:
        """Apply, show what the first pod prints, wait through all restarts."""
        plan.write()
        self._ask(*plan.commands[0].words)
        name = self.name(job)
        print(f"JobSet {name} is there; it goes on if this program is killed.", flush=True)
        with processes.signals() as held:
            state = self._follow(name, held)
        if held.seen:
            return SAVED
        return 0 if state == "Completed" else self._failed(name)

    def _ask(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise UserError(f"kubectl refused: {why}")
        return done.stdout

    def _state(self, name: str) -> str:
        """Completed, Failed, or nothing yet."""
        said = json.loads(self._ask(*self.kubectl("get", "jobset", name, "--output=json")))
        for one in said.get("status", {}).get("conditions", []):
            if one.get("status") == "True" and one.get("type") in ("Completed", "Failed"):
                return one["type"]
        return ""

    def _pods(self, name: str) -> list[dict[str, Any]]:
        """All pods of the set, the newest last."""
        asked = ("get", "pods", f"--selector={SET}={name}", "--output=json")
        items = json.loads(self._ask(*self.kubectl(*asked)))["items"]
        return sorted(items, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def _follow(self, name: str, held: processes.Signals) -> str:
        """Show the log of the first pod, of every attempt, until the set has ended."""
        shown: dict[str, subprocess.Popen[bytes]] = {}
        try:
            while not (state := self._state(name)):
                if held.take():
                    print(f"Deleting the JobSet {name}, whose pods save first.", flush=True)
                    self._ask(*self.kubectl("delete", "jobset", name, "--wait=true"))
                    return "deleted"
                first = [pod["metadata"]["name"] for pod in self._pods(name) if _is_first(pod)]
                if first and first[-1] not in shown:
                    log = self.kubectl("logs", "--follow", f"pod/{first[-1]}")
                    shown[first[-1]] = subprocess.Popen(log, stdin=subprocess.DEVNULL)
                time.sleep(POLL)
            return state
        finally:
            for log in shown.values():
                try:
                    log.wait(POLL)
                except subprocess.TimeoutExpired:
                    log.terminate()
                    log.wait()

    def _failed(self, name: str) -> int:
        """Show the end of the log of the pod that failed first; its exit code."""
        ends = sorted(end for pod in self._pods(name) for end in _bad_ends(pod))
        if not ends:
            print(
                f"JobSet {name} has failed, and its pods are gone: kubectl describe jobset {name}"
            )
            return 1
        _, code, pod = ends[0]
        print(f"Pod {pod} failed first, with exit code {code}. The end of its log:")
        print(
            self._ask(*self.kubectl("logs", f"--tail={processes.LINES}", f"pod/{pod}")), flush=True
        )
        return code


def _is_first(pod: dict[str, Any]) -> bool:
    """Whether it is host 0 of slice 0, and its container has begun."""
    labels, status = pod["metadata"].get("labels", {}), pod.get("status", {})
    begun = status.get("phase") in ("Running", "Succeeded", "Failed")
    return begun and labels.get(INDEX) == "0" and labels.get(JOB_INDEX, "0") == "0"


def _bad_ends(pod: dict[str, Any]) -> Sequence[tuple[str, int, str]]:
    """When and how the containers of a pod failed."""
    states = pod.get("status", {}).get("containerStatuses", [])
    ended = [one.get("state", {}).get("terminated", {}) for one in states]
    return [
        (one.get("finishedAt", ""), one["exitCode"], pod["metadata"]["name"])
        for one in ended
        if one.get("exitCode")
    ]
