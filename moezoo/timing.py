"""Timing that survives a busy machine: pairs measured back to back, medians of their ratios."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from moezoo import __version__

TimedCall = Callable[[], Any]
TimedName = TypeVar("TimedName", bound=Hashable)


class Compiled(NamedTuple):
    """A call without arguments, the seconds its compilation took, bytes of its temporaries.

    device: seconds of each of so many calls by the GPU's own clock; None where there is none.
    """

    run: TimedCall
    seconds: float | None
    temporary_bytes: int | None
    device: Callable[[int], list[float] | None]


class Times(NamedTuple):
    """Seconds of each repeat of one case, and of the base that ran directly before or after it."""

    case: np.ndarray
    base: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """Case over base, repeat by repeat."""
        return self.case / self.base


def seconds(run: TimedCall) -> float:
    """Wall-clock seconds of one call, until its arrays are there."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def interleave(
    base: TimedCall, cases: Mapping[TimedName, TimedCall], repeats: int
) -> Iterator[dict[TimedName, Times]]:
    """All cases against `base`, once per repeat; yields what is known after each repeat.

    Every case runs next to its own run of `base`, in alternating order, so that a machine whose
    speed drifts slows both down. Everything has run once before the first measurement.
    """
    for run in (base, *cases.values()):
        jax.block_until_ready(run())
    pairs: dict[TimedName, list[tuple[float, float]]] = {name: [] for name in cases}
    for repeat in range(repeats):
        for name, run in cases.items():
            if repeat % 2:
                case, other = seconds(run), seconds(base)
            else:
                other, case = seconds(base), seconds(run)
            pairs[name].append((case, other))
        yield {name: Times(*np.asarray(pair).T) for name, pair in pairs.items()}


def kernel_times(executable: Any, calls: int, *arguments: Any) -> list[list[tuple[str, float]]]:
    """For each call its kernels in order, and their seconds by an NVIDIA GPU's clock (CUPTI).

    None of the arguments may be donated.
    """
    from jax.experimental.mosaic.gpu import profiler  # costs half a second

    measured = profiler.measure(executable, aggregate=False, iterations=calls)(*arguments)[1]
    each: Any = [measured] if calls == 1 else measured
    return [[(name, 1e-3 * ms) for name, ms in call] for call in each or ()]


def device_seconds(executable: Any, calls: int, *arguments: Any) -> list[float] | None:
    """Each call's kernels together by the GPU's clock, without what lies between them."""
    if "cuda" not in jax.devices()[0].client.platform_version.lower():
        return None
    found = kernel_times(executable, calls, *arguments)
    return [sum(seconds for _, seconds in call) for call in found]


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory and accelerator."""
    affinity = getattr(os, "sched_getaffinity", None)
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }
    if hasattr(os, "getloadavg"):
        facts["load_average"] = round(os.getloadavg()[0], 2)
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Versions of moezoo, Python and installed `packages`."""
    own = {"moezoo": __version__, "python": platform.python_version()}
    return own | {package: metadata.version(package) for package in packages}
