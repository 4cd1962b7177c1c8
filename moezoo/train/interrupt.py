"""Asking a run to stop: a signal or a pod's preemption notice, answered between two steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # The second request means it: leave at once, finished checkpoints are intact.
            raise KeyboardInterrupt
        self.signal = number
        if jax.process_count() > 1 and number != signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)  # JAX takes it for a notice and tells the others

    def requested(self, step: int) -> bool:
        """Whether to save and leave before `step`; all hosts of a pod give the same answer."""
        if jax.process_count() > 1:
            # A notice reaches one host first; they agree on the step at which all of them stop.
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn SIGTERM and Ctrl-C into a polite request for the time of the block."""
    stop = Stop()
    # On a pod, JAX's preemption service owns SIGTERM.
    numbers = [signal.SIGINT] + ([signal.SIGTERM] if jax.process_count() == 1 else [])
    before: dict[int, Callable | int | None] = {n: signal.signal(n, stop) for n in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
