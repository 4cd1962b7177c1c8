"""Cloud TPU and Kubernetes with stand-ins for gcloud and kubectl, which keep what they were asked.

What they print and how they exit is what the real ones document; nothing leaves this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moezoo.errors import UserError
from moezoo.launch import command, gke, tpu
from tests.fixtures import ROOT

NAME = "rooms/m3vit_tiny"
# Two workers for `ssh --worker=all`; with --output-directory each has a file of its own.
GCLOUD = """#!/bin/bash
echo "$*" | head -n 1 >> "$ASKED"
out="" ; script=""
for word in "$@"; do
    case "$word" in
        --output-directory=*) out="${word#*=}" ;;
        --command=*) script="${word#*=}" ;;
    esac
done
case "$*" in
    *create*) [ -z "$REFUSES" ] || { echo "no capacity" >&2; exit 1; } ;;
    *describe*) echo "${STATE:-ACTIVE}" ;;
    *ssh*)
        pids=()
        for worker in 0 1; do
            if [ -n "$out" ]; then
                WORKER=$worker bash -c "$script" > "$out/$worker.log" 2>&1 & pids+=($!)
            else
                WORKER=$worker bash -c "$script" & pids+=($!)
            fi
        done
        code=0
        for pid in "${pids[@]}"; do wait "$pid" || code=1; done
        exit $code ;;
esac
"""
TRAINS = """#!/bin/bash
# In the place of Python on a worker; both are this machine, so the later one's number is kept.
eval "$BEHAVES"
"""
TPU = ("tpu", NAME, "--zone", "us-west4-a", "--accelerator", "v5litepod-8", "--pod", "mypod")


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to launch from, with the stand-ins first on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"gcloud": GCLOUD, "trains": TRAINS, "kubectl": KUBECTL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("REFUSES", "")
    monkeypatch.setattr(tpu, "POLL", 0.1)
    monkeypatch.setattr(gke, "POLL", 0.1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_tpu(cloud: Path, *more: str) -> int:
    return command.run([*TPU, "--python", str(cloud / "bin" / "trains"), *more])


def asked(cloud: Path) -> list[str]:
    return (cloud / "asked").read_text().splitlines()


def test_a_pod_trains(
    cloud: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVES", 'echo "worker $WORKER: $*"')
    assert on_tpu(cloud, "--train.steps", "200") == 0
    said = capfd.readouterr().out
    assert f"worker 0: -m moezoo train {NAME} --train.steps 200" in said
    assert "worker 1" not in said
    assert "The pod stays until you run: gcloud compute tpus tpu-vm delete mypod" in said
    first, ssh = asked(cloud)
    assert first.startswith("compute tpus tpu-vm create mypod --zone=us-west4-a")
    assert ssh.startswith("compute tpus tpu-vm ssh mypod --zone=us-west4-a --worker=all")


def test_the_queue_is_waited_for(cloud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHAVES", "true")
    assert on_tpu(cloud, "--request", "queued") == 0
    assert [line.split()[2] for line in asked(cloud)] == ["queued-resources"] * 2 + ["tpu-vm"]
    monkeypatch.setenv("STATE", "FAILED")
    with pytest.raises(UserError, match="The queue did not give the pod mypod: FAILED"):
        on_tpu(cloud, "--request", "queued")


def test_the_host_that_failed_first(
    cloud: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = "if [ $WORKER = 1 ]; then echo reason; exit 5; else sleep 0.5; echo lost; exit 1; fi"
    monkeypatch.setenv("BEHAVES", fails)
    assert on_tpu(cloud) == 5
    said = capfd.readouterr().out
    assert "Process 1 failed first, with exit code 5" in said and "reason" in said


def test_what_gcloud_refuses(cloud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSES", "yes")
    with pytest.raises(UserError, match="gcloud refused, as it says above: gcloud compute"):
        on_tpu(cloud)
    assert len(asked(cloud)) == 1, "nothing after it"


def test_ctrl_c_reaches_the_hosts(cloud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = f"pod-{os.getpid()}"
    behaves = (
        'trap "echo saved; exit 130" TERM; echo ready; for i in $(seq 300); do sleep 0.1; done'
    )
    monkeypatch.setenv("BEHAVES", behaves)
    words = [*TPU, "--pod", pod, "--request", "existing", "--python", str(cloud / "bin/trains")]
    process = subprocess.Popen(
        [sys.executable, "-m", "moezoo", "launch", *words], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    logs = [cloud / "runs" / "m3vit_tiny" / "launch" / f"{index}.log" for index in (0, 1)]
    try:
        end = time.monotonic() + 60
        while not all(one.exists() and "ready" in one.read_text() for one in logs):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        end = time.monotonic() + 20
        while sum("saved" in one.read_text() for one in logs) < 1:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert any("kill -TERM " in line for line in asked(cloud))
    finally:
        process.kill()
        process.communicate()
        Path(f"/tmp/moezoo-{pod}.pid").unlink(missing_ok=True)


KUBECTL = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
words = [word for word in sys.argv[1:] if not word.startswith("--context")]
with open(os.environ["ASKED"], "a") as file:
    print(*words, file=file)
turns = Path(os.environ["ASKED"] + ".turns")
if words[0] == "apply" and os.environ["REFUSES"]:
    sys.exit("error: no such cluster")
if words[:2] == ["get", "jobset"]:
    seen = int(turns.read_text()) if turns.exists() else 0
    turns.write_text(str(seen + 1))
    ends = json.loads(os.environ["ENDS"]) if seen >= int(os.environ.get("AFTER", "3")) else None
    conditions = [{{"type": ends, "status": "True"}}] if ends else []
    print(json.dumps({{"status": {{"conditions": conditions}}}}))
elif words[:2] == ["get", "pods"]:
    print(json.dumps({{"items": json.loads(os.environ["PODS"])}}))
elif words[0] == "logs":
    print("log of", words[-1], flush=True)
"""
GKE = ("gke", NAME, "--image", "registry/a/moezoo:1", "--topology", "v5e:2x4", "--claim", "runs")


def pod(index: int, code: int | None = None, at: str = "") -> dict[str, Any]:
    """A pod as Kubernetes describes it."""
    ended = {"terminated": {"exitCode": code, "finishedAt": at}}
    return {
        "metadata": {
            "name": f"pod-{index}",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {gke.INDEX: str(index), gke.JOB_INDEX: "0"},
        },
        "status": {
            "phase": "Running" if code is None else "Failed",
            "containerStatuses": [{"state": {"running": {}} if code is None else ended}],
        },
    }


def test_a_job_set_trains(
    cloud: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDS", '"Completed"')
    monkeypatch.setenv("PODS", json.dumps([pod(0), pod(1)]))
    assert command.run([*GKE, "--context", "mine"]) == 0
    said = capfd.readouterr().out
    assert said.count("log of pod/pod-0") == 1 and "pod-1" not in said
    assert asked(cloud)[0] == "apply --filename=runs/m3vit_tiny/launch/jobset.yaml"
    assert (cloud / "runs/m3vit_tiny/launch/jobset.yaml").is_file()


def test_the_pod_that_failed_first(
    cloud: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDS", '"Failed"')
    pods = [pod(0, 1, "2026-01-01T00:00:09Z"), pod(1, 137, "2026-01-01T00:00:05Z")]
    monkeypatch.setenv("PODS", json.dumps(pods))
    assert command.run(list(GKE)) == 137
    said = capfd.readouterr().out
    assert "Pod pod-1 failed first, with exit code 137" in said
    assert said.rstrip().endswith("log of pod/pod-1")


def test_what_kubernetes_refuses(cloud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSES", "yes")
    with pytest.raises(UserError, match="kubectl refused: error: no such cluster"):
        command.run(list(GKE))


def test_ctrl_c_deletes_the_job_set(cloud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDS", "null")
    monkeypatch.setenv("PODS", json.dumps([pod(0)]))
    process = subprocess.Popen(
        [sys.executable, "-m", "moezoo", "launch", *GKE], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "log of" in line:
            break
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "whose pods save first" in said
    assert asked(cloud)[-1] == "delete jobset m3vit-tiny --wait=true"
