"""Several processes on this machine, each with CPU devices of its own: a pod on a desk.

For trying what a run does on several hosts before there are any. Processes find each other at a
free port, as hosts would at process 0's address.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from dataclasses import dataclass, field

from moezoo.errors import UserError
from moezoo.launch.job import Command, LaunchJob, LaunchPlan, check_positive
from moezoo.launch.processes import run_all


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class LocalBackEnd:
    """Processes on this machine with virtual CPU devices.

    Example: moezoo launch local rooms/m3vit_tiny --processes 2 --devices 4 --train.steps 20
    """

    processes: int = 2
    """How many processes; each stands for a host."""
    devices: int = 1
    """CPU devices of each process."""
    port: int = field(default_factory=free_port)
    """Where process 0 listens; one that is free, if left out."""

    def total_devices(self, job: LaunchJob) -> int:
        """Those of all processes."""
        check_positive(self.processes, "--processes")
        check_positive(self.devices, "--devices")
        if not 0 < self.port < 2**16:
            raise UserError(f"--port is {self.port}; it must be from 1 to 65535.")
        return self.processes * self.devices

    def plan(self, job: LaunchJob) -> LaunchPlan:
        """One command per process, side by side."""
        env = (("JAX_PLATFORMS", "cpu"), ("JAX_NUM_CPU_DEVICES", str(self.devices)))
        numbers = ("--hosts.count", str(self.processes))
        address = ("--hosts.coordinator", f"127.0.0.1:{self.port}")
        return LaunchPlan(
            (),
            tuple(
                Command(
                    job.train(sys.executable, *address, *numbers, "--hosts.index", str(index)),
                    env,
                    " &",
                )
                for index in range(self.processes)
            ),
        )

    def check(self, job: LaunchJob) -> None:
        """UserError where the port is taken."""
        with contextlib.suppress(OSError), socket.create_server(("", self.port)):
            return
        raise UserError(
            f"--port is {self.port}, which another program on this machine uses: take another "
            "one, or leave it out."
        )

    def run(self, job: LaunchJob, plan: LaunchPlan) -> int:
        """All of them, until all have ended."""
        return run_all(plan.commands, job.logs)
