"""JAX's cache of compiled programs in an object store: written by one process, read by the next."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moezoo import storage
from tests.fixtures import ROOT
from tests.object_store import bucket, door

__all__ = ["bucket", "door"]  # fixtures

PROGRAM = """
import logging
import jax, jax.numpy as jnp
import moezoo.object_path  # how gs:// is reached, as in every run
hits = []
jax.monitoring.register_event_listener(lambda name, **more: hits.append(name))
jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((8, 8))).block_until_ready()
print(sum(name == "/jax/compilation_cache/cache_hits" for name in hits))
"""


@pytest.mark.slow
def test_a_compilation_cache_in_a_store(bucket: str) -> None:
    own = {"JAX_COMPILATION_CACHE_DIR": f"{bucket}/compiled", "JAX_PLATFORMS": "cpu"}
    own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    own |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0", "PYTHONPATH": str(ROOT)}
    found = list[int]()
    for _ in range(2):
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "rror" not in done.stderr, done.stderr
        found.append(int(done.stdout))
    assert found[0] == 0 < found[1]
    assert any(storage.place(f"{bucket}/compiled").iterdir())
