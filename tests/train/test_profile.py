"""A window of steps is recorded, and what devices exchanged is told apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moezoo.errors import UserError
from moezoo.train import profile
from moezoo.train.profile import Window, window

PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moezoo.train.profile import Profiler, Window
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
x = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, P("data")))
f = jax.jit(lambda x: jnp.sum(x.T @ x))
recorder = Profiler(Path(sys.argv[1]), Window(2, 3))
for at in range(1, 6):
    recorder.before(at)
    y = f(x)
    if said := recorder.after(at, y):
        print(at, said)
"""


def test_a_window_of_steps() -> None:
    assert window(None, 10) is None and window("3:7", 10) == Window(3, 7)
    for text in ("3", "3-7", "a:b", ":7", "3:7:9"):
        with pytest.raises(UserError, match="give two steps, such as 100:110"):
            window(text, 10)
    for text in ("0:3", "7:3", "3:11"):
        with pytest.raises(UserError, match="its steps must lie between 1 and 10"):
            window(text, 10)


def test_a_store_takes_no_recording() -> None:
    profile.check(None, 10, "gs://bucket/runs")
    profile.check("3:7", 10, "runs")
    with pytest.raises(UserError, match="JAX's profiler writes on a disk and gs://bucket/runs is"):
        profile.check("3:7", 10, "gs://bucket/runs")
    with pytest.raises(UserError, match="its steps must lie between 1 and 10"):
        profile.check("3:11", 10, "runs")


def test_without_a_window_nothing_is_recorded(tmp_path: Path) -> None:
    recorder = profile.Profiler(tmp_path, None)
    recorder.before(1)
    assert recorder.after(1, ()) is None and recorder.end() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_exchange_is_told_from_the_rest(tmp_path: Path) -> None:
    call = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(call, capture_output=True, text=True, env=env, timeout=300, check=True)
    assert done.stdout.startswith("3 Recorded in ")  # once, after the last of its steps
    found = json.loads((tmp_path / profile.FOLDER / profile.NAME).read_text())
    assert any(profile.EXCHANGE.match(name) for name in found["longest"])
    assert 0 < found["exchange_share"] < 1 and found["seconds"] > 0
    assert list(tmp_path.rglob("*.trace.json.gz"))
