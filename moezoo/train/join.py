"""Joining the other processes of a run on several hosts, or one sentence about why that fails.

First the roll call (`roll_call`), before JAX connects anything; then JAX; then what the devices of
all are. Whether they were started with the same configuration is `agree`'s to ask.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils

from moezoo.errors import UserError
from moezoo.train import roll_call, together
from moezoo.train.roll_call import Meeting

SILENCE = 40  # seconds after which a process counts as dead that nobody hears of


class Hosts(Protocol):
    """What `initialise_distributed` reads (`schema.HostsConfig`)."""

    @property
    def coordinator(self) -> str | None: ...
    @property
    def count(self) -> int | None: ...
    @property
    def index(self) -> int | None: ...
    @property
    def timeout(self) -> int: ...


def initialise_distributed(
    hosts: Hosts,
    say: Callable[[str], None] = print,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Join the other processes of a run on several hosts; the number of processes.

    Explicit numbers come first; otherwise Cloud TPU, GKE, Slurm, Open MPI and Kubernetes are
    detected, and a machine with none of them is a run of one process. Must come before any use
    of a device. Raises UserError where only some numbers are given, where a process does not come
    (a pod run that was started on one worker only), and where they are not alike, also in the
    `settings` of the run (`agree.settings`). Where JAX itself
    waits for too long, the process ends with one sentence and exit code 2.
    """
    given = (hosts.coordinator, hosts.count, hosts.index)
    if any(part is not None for part in given) and None in given:
        raise UserError(
            "hosts.coordinator, hosts.count and hosts.index belong together: give all three "
            "or none."
        )
    expected = hosts.count or detected_processes()
    if expected <= 1:
        return 1
    place = _place(hosts, expected, settings)
    if place is None or place.index == 0:  # the others' consoles stay empty
        say(f"Waiting for {expected} processes (at most {hosts.timeout} s).")
    if place is not None:
        roll_call.hold(place)
    _connect(hosts, place, expected)
    found = jax.process_count()
    if found != expected:
        raise UserError(f"Expected {expected} processes, found {found}: start one per host.")
    together.listen()
    together.wait("joined")
    with _at_most(hosts.timeout, "the devices of all of them are not known"):
        check_devices(together.gathered(json.dumps(_devices())))
        # Connects all devices while everyone is here: on CPUs that must happen within 30 seconds.
        multihost_utils.sync_global_devices("joined")
    if jax.process_index() == 0:
        say(f"All {found} processes are here, {jax.local_device_count()} devices in this one.")
    return found


def _connect(hosts: Hosts, place: Meeting | None, expected: int) -> None:
    given = (hosts.coordinator, hosts.count, hosts.index)
    if place is not None:
        given = place.address, place.count, place.index
    with _at_most(hosts.timeout, f"not all of the {expected} processes have joined"):
        try:
            jax.distributed.initialize(
                *given,
                initialization_timeout=hosts.timeout + 60,
                heartbeat_timeout_seconds=SILENCE,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"Could not join the other {expected - 1} processes: {_line(error)}; start the "
                "same command on every host, and see that nothing else uses the port."
            ) from error


@contextlib.contextmanager
def _at_most(seconds: int, otherwise: str) -> Iterator[None]:
    """End the process with one sentence where the block takes longer.

    JAX's own timeouts abort it with a stack trace of C++, so ours come first.
    """

    def give_up() -> None:
        print(
            f"error: After {seconds} s {otherwise}: look at what the other processes say, start "
            "the same command on every host, or raise --hosts.timeout.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    late = threading.Timer(seconds, give_up)
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()


def _devices() -> dict[str, Any]:
    """What this process has to compute with."""
    own = jax.local_devices()
    return {
        "host": socket.gethostname(),
        "count": len(own),
        "kind": own[0].device_kind if own else "none",
    }


def check_devices(said: Sequence[str]) -> None:
    """UserError, the same on every process, where processes have other devices than process 0.

    said: what each process has, as JSON, in the order of the processes.
    """
    first, *others = [json.loads(text) for text in said]
    for index, one in enumerate(others, 1):
        if (one["count"], one["kind"]) != (first["count"], first["kind"]):
            raise UserError(
                f"Process {index} ({one['host']}) has {one['count']} devices ({one['kind']}), but "
                f"process 0 ({first['host']}) has {first['count']} ({first['kind']}): every "
                "process of a run needs the same; leave that host out, or see what is wrong there."
            )


def _cluster() -> Any:
    """The cluster around this process as JAX sees it, None where there is none."""
    # JAX offers no public question "is there a cluster?"; this is the table that its
    # jax.distributed.initialize() goes through.
    from jax._src.clusters import ClusterEnv

    kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    return next((kind for kind in kinds if kind.is_env_present()), None)


def detected_processes() -> int:
    """How many processes the surrounding cluster announces; 1 where there is none."""
    try:
        found = _cluster()
        return 1 if found is None else found.get_process_count()
    except Exception as error:  # whatever a cluster's metadata may hold
        raise UserError(
            f"This looks like a host of a cluster, but how many there are is not to be found "
            f"({_line(error)}): give --hosts.coordinator, --hosts.count and --hosts.index."
        ) from error


def _place(
    hosts: Hosts, count: int, settings: Mapping[str, str] = MappingProxyType({})
) -> Meeting | None:
    """Where process 0 is and who this one is; None where only JAX knows how to find that out."""
    address, index = hosts.coordinator, hosts.index
    name = "hosts.coordinator"
    if address is None and (address := os.environ.get("JAX_COORDINATOR_ADDRESS")) is not None:
        name = "JAX_COORDINATOR_ADDRESS"
    try:
        if index is None:
            index = _cluster().get_process_id()
        if address is None:
            address = _cluster().get_coordinator_address(
                timeout_secs=hosts.timeout,
                override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
            )
    except Exception:  # other arguments in another JAX, or metadata that it alone can wait for
        return None
    at = roll_call.parted(address, name)
    return Meeting(*at, index, count, hosts.timeout, settings)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
