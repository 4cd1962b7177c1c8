"""A Slurm of its own for tests: one controller and two nodes, all of them on this machine.

Nothing of the system is changed: munge has its own key and socket, Slurm its own configuration and
folders. Nodes are named by addresses of the loopback, so that programs can reach them by name.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
NODES = ("127.0.0.1", "127.0.0.2")
PATIENCE = 60  # seconds for the nodes to come up
SETTINGS = """
ClusterName=moezoo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=20
MinJobAge=600
{nodes}
PartitionName=tests Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here, None where there can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "a Slurm of its own needs root, who may start jobs for others"
    return None


def _ports(count: int) -> list[int]:
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    found = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return found


def _configured(folder: Path) -> Path:
    """The configuration's file, after making every folder that it names."""
    controller, *ports = _ports(1 + len(NODES))
    lines = [
        f"NodeName={name} NodeAddr={name} NodeHostname={socket.gethostname()} Port={port} CPUs=2 "
        "RealMemory=4000 State=UNKNOWN"
        for name, port in zip(NODES, ports, strict=True)
    ]
    (folder / "state").mkdir()
    for name in NODES:
        (folder / f"spool.{name}").mkdir()
    file = folder / "slurm.conf"
    file.write_text(
        SETTINGS.format(
            folder=folder,
            host=socket.gethostname(),
            controller=controller,
            nodes="\n".join(lines),
            names=",".join(NODES),
        )
    )
    return file


def _munge(folder: Path) -> subprocess.Popen[bytes]:
    """munge's daemon with a key of its own, in the foreground."""
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    words = [shutil.which("munged", path="/usr/sbin:/sbin:" + os.environ["PATH"]), "--foreground"]
    files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    words += [f"--{name}={path}" for name, path in files.items()]
    # Folders of tests belong to root and lie below one that all may write to.
    return subprocess.Popen([*words, "--force"], stderr=(folder / "munge.err").open("wb"))


def _until(holds, folder: Path, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            logs = "\n".join(f"{p}:\n{p.read_text()[-2000:]}" for p in folder.glob("*.log"))
            raise RuntimeError(f"{what} did not come up in {PATIENCE} s.\n{logs}")
        time.sleep(0.2)


@contextmanager
def running(folder: Path) -> Iterator[Mapping[str, str]]:
    """Slurm with its files in `folder` (a short path), and the environment in which it is used."""
    folder.chmod(0o755)
    env = os.environ | {"SLURM_CONF": str(_configured(folder))}
    env["PATH"] += ":/usr/sbin:/sbin"
    started = [_munge(folder)]
    try:
        _until((folder / "munge.socket").exists, folder, "munge")
        daemons = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]
        for words in daemons:
            quiet = (folder / f"{words[0]}.{words[-1]}.err").open("wb")
            started.append(subprocess.Popen(words, env=env, stdout=quiet, stderr=quiet))

        def idle() -> bool:
            asked = ["sinfo", "-h", "-N", "-o", "%T"]
            said = subprocess.run(asked, env=env, capture_output=True, text=True).stdout.split()
            return said == ["idle"] * len(NODES)

        _until(idle, folder, "Slurm")
        yield env
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
