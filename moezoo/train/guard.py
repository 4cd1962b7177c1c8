"""Nothing that is not finite is kept: the loss of every step, the state before every save.

A step that is not finite changes nothing (`step.make_step`): the devices see that by themselves.
Here such steps are counted, and a run that has too many of them in a row ends.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moezoo.errors import UserError
from moezoo.train.evaluate import to_host
from moezoo.train.placement import path_name
from moezoo.train.restore import FOLDER
from moezoo.train.schema import Config

# Trained arrays must have a finite square sum in float32, too: what a step of 1e30 leaves is
# finite, but no model.
TRAINED = ("params", "weighting")


class Diverged(UserError):
    """A loss or a state is not finite; says which option to change and how to go on."""


def not_finite(state: Any) -> list[str]:
    """Paths of the arrays of a state that hold a NaN or an infinity, or trained values past 1e19.

    One small program on the state's devices; only its answer comes to the host.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    kept = {path_name(path): x for path, x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)}
    if not kept:
        return []
    sound = to_host(_sound(kept))
    return [path for path, fine in zip(sorted(kept), sound, strict=True) if not fine]


@jax.jit
def _sound(arrays: dict[str, jax.Array]) -> jax.Array:
    """Whether each array is sound, in the order of their names."""

    def fine(path: str) -> jax.Array:
        x = arrays[path]
        if path.partition("/")[0] in TRAINED:
            return jnp.isfinite(jnp.sum(jnp.square(x.astype(jnp.float32))))
        return jnp.isfinite(x).all()

    return jnp.stack([fine(path) for path in sorted(arrays)])


class SeenStep(NamedTuple):
    """A step that was started: its loss, and whether it changed nothing, both on the device."""

    at: int
    loss: Any
    skipped: Any


class Guard:
    """Ends a run whose loss or state is not finite, before anything of it is kept.

    Args:
      config: that of the run; the sentence names its options.
      directory: the run's folder.
      newest: the step of the newest sound checkpoint, None where there is none; asked on failure.
      say: takes a line about a step that was skipped.

    `resumed` is the step of the checkpoint that the run goes on from, 0 for none. `skipped`: steps
    since then that changed nothing; `in_row`: the last of them, without a sound one between or
    after; `sound`: the others.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        newest: Callable[[], int | None],
        say: Callable[[str], None] = lambda line: None,
    ):
        self._config, self._directory, self._newest = config, directory, newest
        self._say = say
        self._last: SeenStep | None = None
        self._tested = 0
        self.resumed = self.skipped = self.in_row = self.sound = 0

    def seen(self, at: int, loss: Any, skipped: Any = False) -> None:
        """Note the loss of a step that was started, and whether it changed nothing; wait for the
        step before it, and test that.

        So the host is one step ahead of the device and no more. Diverged where a loss that changed
        something is not finite.
        """
        before, self._last = self._last, SeenStep(at, loss, skipped)
        # Only the step before: reading this one's loss would wait for the device.
        self._test(before)

    @property
    def exhausted(self) -> bool:
        """Whether more steps in a row were skipped than the configuration bears."""
        return self.in_row > self._config.train.nonfinite_steps

    @property
    def idle(self) -> bool:
        """Whether every step so far was skipped; nobody wants the result of such a run."""
        return bool(self.in_row) and not self.sound

    def give_up(self) -> None:
        """Always raises Diverged, for steps that were skipped."""
        first = self._tested - self.in_row + 1
        steps = f"Step {first}" if self.in_row == 1 else f"Steps {first} to {self._tested}"
        raise Diverged(
            f"{steps} changed nothing, because loss, gradient or update were not finite: "
            f"{self._advice()}{self._origin(first)}"
        )

    def settle(self) -> None:
        """Wait for the last step that was started; Diverged where its loss is not finite."""
        self._test(self._last)

    def check(self, at: int, state: Any) -> None:
        """Diverged where the loss of the last step or the state after step `at` is not finite."""
        self.settle()
        bad = not_finite(state)
        if bad:
            more = f" and {len(bad) - 1} more arrays" if len(bad) > 1 else ""
            when = f"after step {at}" if at else "at the beginning of the run"
            raise Diverged(f"{bad[0]}{more} {_are(bad)} not finite {when}: {self._advice()}")

    def _test(self, step: SeenStep | None) -> None:
        if step is None or step.at <= self._tested:
            return
        self._tested = at = step.at
        if bool(step.skipped):
            self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
            self._say(
                f"Step {at} changed nothing: its loss, gradient or update is not finite "
                f"(loss {float(step.loss):.4g})."
            )
            return
        if not math.isfinite(float(step.loss)):
            # Asked about again, by whoever saves next, it is no better.
            self._tested = at - 1
            raise Diverged(
                f"The loss is {float(step.loss)} at step {at}: {self._advice()}{self._origin(at)}"
            )
        self.in_row, self.sound = 0, self.sound + 1

    def _origin(self, at: int) -> str:
        if not self.resumed or at != self.resumed + 1:
            return ""
        folder = self._directory / FOLDER / str(self.resumed)
        return (
            f" It is the first step from checkpoint {self.resumed}: if it fails again, delete "
            f"{folder} to go on from an older one."
        )

    def _advice(self) -> str:
        found, optimiser = self._newest(), self._config.optimiser
        odd = [
            f"optimiser.{field.name}"
            for field in dataclasses.fields(optimiser)
            if isinstance(value := getattr(optimiser, field.name), float)
            and not math.isfinite(value)
        ]
        change = f"give {' and '.join(odd)} a finite value" if odd else _calmer(optimiser)
        example = f"--{odd[0]} VALUE" if odd else f"--optimiser.lr {min(optimiser.lr / 10, 1e-3):g}"
        kept = "there is no checkpoint" if found is None else f"checkpoint {found} is sound"
        origin = "begins anew" if found is None else "goes on from there"
        command = f"python train.py --resume {quote(str(self._directory))} {example}"
        return (
            f"{change}, or look for an example that is not finite. Nothing of it was saved; "
            f"{kept}, and `{command}` {origin}."
        )


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _calmer(optimiser: Any) -> str:
    clip = "set" if optimiser.clip is None else f"lower {optimiser.clip:g} of"
    return f"lower optimiser.lr ({optimiser.lr:g}), {clip} optimiser.clip"
