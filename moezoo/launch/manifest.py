"""A JobSet of Kubernetes: the same pod on every host of one or several TPU slices, as YAML.

Every slice is one job of the set and every host one pod of it. When a pod fails or is taken away
the whole set begins again, as often as it is told, and the run goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moezoo.launch.job import COORDINATOR_PORT

API = "jobset.x-k8s.io/v1alpha2"
SLICE = "slice"  # the name of the replicated job
GRACE = 120  # seconds that a pod has to save after SIGTERM
POOL = "cloud.google.com/gke-nodepool"
PLAIN = re.compile(r"[A-Za-z][-\w./]*")
WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}  # that YAML takes for others


class Slices(NamedTuple):
    """The hardware: how many slices of which kind, and the hosts and chips of each."""

    count: int
    accelerator: str
    topology: str
    hosts: int
    chips: int


def job_set(
    name: str,
    image: str,
    command: Sequence[str],
    slices: Slices,
    restarts: int,
    disk: Disk,
    env: Mapping[str, str],
) -> dict[str, Any]:
    """The resource that `kubectl apply` takes. env: variables that processes find."""
    job = {
        "backoffLimit": 0,  # one pod alone cannot join the others again
        "completionMode": "Indexed",
        "completions": slices.hosts,
        "parallelism": slices.hosts,
        "template": {"spec": _pod(image, command, slices, disk, env)},
    }
    # A slice is a pool of nodes of its own.
    alone = {"alpha.jobset.sigs.k8s.io/exclusive-topology": POOL}
    return {
        "apiVersion": API,
        "kind": "JobSet",
        "metadata": {"name": name, "annotations": alone},
        "spec": {
            "failurePolicy": {"maxRestarts": restarts},
            "replicatedJobs": [
                {"name": SLICE, "replicas": slices.count, "template": {"spec": job}}
            ],
        },
    }


def _pod(
    image: str, command: Sequence[str], slices: Slices, disk: Disk, env: Mapping[str, str]
) -> dict[str, Any]:
    """One host of a slice with one process."""
    container = {
        "name": "train",
        "image": image,
        "command": list(command),
        **({"env": [{"name": k, "value": v} for k, v in env.items()]} if env else {}),
        # Of TPUs among each other, and of JAX.
        "ports": [{"containerPort": port} for port in (8471, 8080, COORDINATOR_PORT)],
        "resources": {"limits": {"google.com/tpu": slices.chips}},
        **disk.mounts(),
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": slices.accelerator,
            "cloud.google.com/gke-tpu-topology": slices.topology,
        },
        "containers": [container],
        **disk.volumes(),
    }


class Disk(NamedTuple):
    """A volume that all pods share, at a folder of each; None: there is none."""

    claim: str | None
    folder: str

    def mounts(self) -> dict[str, Any]:
        """What a container says of it."""
        if self.claim is None:
            return {}
        return {"volumeMounts": [{"name": "shared", "mountPath": self.folder}]}

    def volumes(self) -> dict[str, Any]:
        """What a pod says of it."""
        if self.claim is None:
            return {}
        return {"volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": self.claim}}]}


def yaml(value: Any) -> str:
    """Nested mappings, lists, texts and whole numbers as YAML."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any, indent: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, held in value.items():
            yield from _entry(f"{indent}{_text(key)}:", held, f"{indent}  ")
    else:
        for held in value:
            first, *rest = _lines(held, f"{indent}  ") if _is_nested(held) else [_scalar(held)]
            yield f"{indent}- {first.strip()}"
            yield from rest


def _entry(head: str, held: Any, indent: str) -> Iterator[str]:
    if _is_nested(held):
        yield head
        yield from _lines(held, indent)
    else:
        yield f"{head} {_scalar(held)}"


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) and bool(value)


def _scalar(value: Any) -> str:
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(value: str) -> str:
    """A text in quotes, unless nobody could take it for anything else. YAML takes JSON's quotes."""
    plain = PLAIN.fullmatch(value) and value.lower() not in WORDS
    return value if plain else json.dumps(value)
