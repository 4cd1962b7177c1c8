"""Programs of exports: read and checked before JAX compiles one.

Another process reads a program first, because JAX's own reader can crash on damaged ones, and
takes as long as a program wants. It may contain arithmetic on arrays and loops that count to a
limit, and nothing else: no call of code outside of it, no loop without end, no communication.

A copy travels in every export, beside `forms.py`, `limited.py`, `regular.py`, `schema_check.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax import export

if __package__:
    from moezoo import regular
    from moezoo import schema_check as sc
    from moezoo.deploy.runtime import limited, operations
    from moezoo.deploy.runtime.forms import ExportError
else:
    import limited  # pyright: ignore[reportMissingImports]
    import operations  # pyright: ignore[reportMissingImports]
    import regular  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]
    from forms import ExportError  # pyright: ignore[reportMissingImports]

LARGEST = 64 * regular.MB  # of a program; weights are no part of it
GB = 2**30
FITS = "fits"
Array = tuple[Sequence[Any], str]  # shape, with "b" for the batch, and dtype


def read(file: Path, written_by: str) -> export.Exported:
    """A stored program that may be compiled; ExportError says why another one may not."""
    data = regular.read(file, LARGEST, ExportError, "export it again")
    try:
        wrong = _wrong_with(data)
        found = None if wrong else export.deserialize(bytearray(data))
    except Exception as error:  # JAX has no one error for this
        wrong, found = sc.first_line(error), None
    if found is None:
        raise ExportError(
            f"jax {jax.__version__} cannot read {file}, written by jax {written_by}: {wrong}."
        )
    return found


_known: set[str] = set()  # digests of programs that this process has had checked


def _wrong_with(data: bytes) -> str:
    """What another process finds wrong with a program, or nothing."""
    digest = hashlib.sha256(data).hexdigest()
    if digest in _known:
        return ""
    answer, ended = limited.asked("programs", data)
    if ended:
        return f"it {ended}"
    if answer != FITS:
        return str(answer)
    _known.add(digest)
    return ""


def answer() -> None:
    """As the other process: say of the program on the standard input what is wrong with it."""
    try:
        check(sys.stdin.buffer.read())
        wrong = FITS
    except Exception as error:
        wrong = sc.first_line(error)
    print(json.dumps(wrong), flush=True)


def check(data: bytes) -> None:
    """Raise FormatFault, or what JAX raises, for a program that may not be compiled."""
    found = export.deserialize(bytearray(data))
    if found.nr_devices != 1 or found.ordered_effects or found.unordered_effects:
        raise sc.FormatFault("it has effects, or is for several devices")
    for aval in (*found.in_avals, *found.out_avals):
        for size in aval.shape:
            if not re.fullmatch(r"\d{1,12}|[A-Za-z_]\w{0,30}", str(size)):
                raise sc.FormatFault(f"a shape of it has the size {sc.shown(str(size))}")
    operations.check(found.mlir_module_serialized)


def check_arrays(
    found: export.Exported,
    weights: Mapping[str, np.ndarray],
    inputs: Sequence[Array],
    outputs: Mapping[str, Array],
) -> None:
    """Raise FormatFault where a program's arrays are not those of the manifest and the weights."""
    given = ({name: 0 for name in weights}, *(0 for _ in inputs))
    structures = (jax.tree.structure((given, {})), jax.tree.structure(dict.fromkeys(outputs, 0)))
    if (found.in_tree, found.out_tree) != structures:
        raise sc.FormatFault("it reads or gives arrays of other names than the manifest says")
    wanted = [(name, (weights[name].shape, str(weights[name].dtype))) for name in sorted(weights)]
    wanted += [("its input", one) for one in inputs]
    wanted += sorted(outputs.items())
    for (name, (shape, dtype)), aval in zip(
        wanted, (*found.in_avals, *found.out_avals), strict=True
    ):
        if [*map(str, shape)] != [*map(str, aval.shape)] or dtype != str(aval.dtype):
            raise sc.FormatFault(
                f"{sc.shown(name)} is {dtype} {list(shape)}, the program has {aval.str_short()}"
            )


class Program:
    """A checked program, compiled for each batch size that it is called with.

    memory: the most bytes that a call may take; None: what suits its arrays and this machine.
    Raises ExportError where a call takes more, or fails.
    """

    def __init__(self, found: export.Exported, memory: int | None = None) -> None:
        self._call, self._memory = jax.jit(found.call), memory
        self._made: dict[tuple[tuple[int, ...], ...], Any] = {}

    def __call__(self, weights: Mapping[str, Any], *given: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name."""
        try:
            key = tuple(array.shape for array in given)
            if key not in self._made:
                self._made[key] = self._compiled(weights, *given)
            made = self._made[key](weights, *given)
            outputs = {name: np.asarray(value) for name, value in made.items()}
        except ExportError:
            raise
        except Exception as error:  # XLA's, of any kind
            raise ExportError(f"The program cannot be run: {sc.first_line(error)}.") from error
        for name, value in outputs.items():
            if value.dtype.kind not in "iub" and not np.isfinite(value).all():
                raise ExportError(f"The program gives {name} with numbers that are not finite.")
        return outputs

    def _compiled(self, weights: Mapping[str, Any], *given: np.ndarray) -> Any:
        lowered = self._call.lower(weights, *given)
        made = lowered.compile()
        about = made.memory_analysis()
        if about is None:  # a backend that does not tell
            return made
        arrays = int(about.argument_size_in_bytes + about.output_size_in_bytes)
        taken = arrays + int(about.temp_size_in_bytes)
        allowed = room(arrays) if self._memory is None else self._memory
        if taken > allowed:
            raise ExportError(
                f"The program would take {taken / GB:,.1f} GiB for this batch, and "
                f"{allowed / GB:,.1f} GiB are allowed: give fewer examples at once, or load it "
                "with memory=BYTES."
            )
        return made


def room(arrays: int) -> int:
    """The bytes that a program may take whose weights, inputs and outputs have so many.

    More than a hundred times its arrays no path of ours takes; a stranger's may ask for all.
    """
    return min(GB + 256 * arrays, machine_bytes())


def machine_bytes() -> int:
    """The memory of this machine, or of the container that it is seen from."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 64 * GB  # a system that does not tell
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(name).read_text()))
        except (OSError, ValueError):  # no container, or one without a limit
            continue
    return found


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End the process with exit code 2 and a sentence when the block takes longer.

    Of use to commands only: nothing else stops a program that XLA runs. Raises ExportError for a
    time that is none.
    """
    if not 0 < seconds <= 10**6:  # NaN, too
        raise ExportError(f"--seconds is {seconds:g}; it must be above 0 and at most 1000000.")

    def end() -> NoReturn:
        print(f"error: given up after {seconds:g} s (--seconds).", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
