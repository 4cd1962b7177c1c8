"""Reading the numbers that reference implementations produced (not shipped with the project)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def folder(system: str) -> Path:
    """The fixture folder of one system; skips the test with the reason where it is absent."""
    base = Path(os.environ.get("MOEZOO_FIXTURES", ROOT / ".." / "shared" / "fixtures"))
    path = base / system
    if not path.is_dir():
        pytest.skip(f"no fixtures at {path}: set MOEZOO_FIXTURES to the folder that holds them")
    return path


def load(system: str, name: str) -> dict[str, np.ndarray]:
    """All arrays of `<system>/<name>.npz`."""
    path = folder(system) / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"fixture file {path} is absent")
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def names(system: str, prefix: str, known: Sequence[str]) -> list[str]:
    """Every file `<system>/<prefix>*.npz` there is; the documented ones where the folder is absent.

    For the parameters of tests, which are collected before anything can be skipped.
    """
    base = Path(os.environ.get("MOEZOO_FIXTURES", ROOT / ".." / "shared" / "fixtures"))
    return sorted(path.stem for path in (base / system).glob(f"{prefix}*.npz")) or list(known)


def cases(system: str, name: str, marker: str, known: Sequence[str]) -> list[str]:
    """The prefixes `<case>/` of a file that hold an array `<case>/<marker>`; as `names`, known ones
    where the file is absent.
    """
    base = Path(os.environ.get("MOEZOO_FIXTURES", ROOT / ".." / "shared" / "fixtures"))
    path = base / system / f"{name}.npz"
    if not path.is_file():
        return list(known)
    with np.load(path, allow_pickle=False) as archive:
        ends = f"/{marker}"
        return [key.removesuffix(ends) for key in archive.files if key.endswith(ends)]


@contextmanager
def compiled_as_by_default() -> Iterator[None]:
    """Programs compiled inside are fused as a user's are, which decides their last bits.

    The others of tests are made by emitters that compile faster (see `conftest`).
    """
    if "--xla_cpu_use_fusion_emitters=false" not in os.environ.get("XLA_FLAGS", ""):
        yield
        return
    made = partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", made)
        yield


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose name starts with `prefix`, with the prefix removed."""
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


def text(array: np.ndarray) -> object:
    """The value of an array that holds JSON text."""
    return json.loads(str(array))


def hash_uniform(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Closed-form float64 values in [-1, 1) that stand in for stored weights."""
    with np.errstate(over="ignore"):
        z = np.arange(int(np.prod(shape)), dtype=np.uint64)
        z = z + (np.uint64(seed) << np.uint64(32)) + np.uint64(1)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (2.0 * (z >> np.uint64(11)).astype(np.float64) / 2.0**53 - 1.0).reshape(shape)


def from_manifest(manifest: np.ndarray) -> dict[str, np.ndarray]:
    """Weights that a manifest of `[name, shape, seed, rule, scale]` rows describes, float32."""
    weights = {}
    for name, shape, seed, rule, scale in json.loads(str(manifest)):
        base = {"plain": 0.0, "one_plus": 1.0}[rule]
        values = base + scale * hash_uniform(tuple(shape), seed)
        weights[name] = values.astype(np.float32)
    return weights


def tool(name: str) -> ModuleType:
    """The module of a command that is also `tools/<name>.py`."""
    return import_module(f"moezoo.cli.{name}")


def devices(count: int) -> list[jax.Device]:
    """The first so many devices; skips the test where there are fewer (on a single GPU)."""
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices of one kind, there are {jax.device_count()}")
    return jax.devices()[:count]
