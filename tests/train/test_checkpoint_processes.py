"""Checkpoints of processes that are killed, and of several processes at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moezoo.train import checkpoint
from tests.fixtures import ROOT
from tests.train.test_mesh import free_port

RUN = """
import os, sys
import numpy as np
import jax, jax.numpy as jnp
from moezoo.train.checkpoint import Checkpointer

def state(step):
    values = np.random.default_rng(step).standard_normal((8, 60_000), np.float32)
    return {"params": {f"k{i}": jnp.asarray(v) for i, v in enumerate(values)}}

wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
with Checkpointer(sys.argv[1], "{}", keep=2) as checkpoints:
    start = checkpoints.latest_valid()
    if start is not None:
        found = checkpoints.restore(start, wanted)
        equal = jax.tree.map(lambda a, b: bool((a == b).all()), found, state(start))
        assert all(jax.tree.leaves(equal)), f"step {start} was restored wrongly"
    print("from", start, flush=True)
    step = start or 0
    while True:
        step += 1
        checkpoints.save(step, state(step))
        os.write(1, f"saving {step}\\n".encode())  # whole, or not at all when it is killed
"""


def run_and_kill(folder, saves: int, after: float) -> tuple[int, list[int], str]:
    """Kill `after` seconds past so many begun saves; (resumed step, steps begun, errors)."""
    words = [sys.executable, "-u", "-c", RUN, str(folder)]
    pipe = subprocess.PIPE
    run = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    assert run.stdout is not None and run.stderr is not None
    first = run.stdout.readline().split()
    if not first:
        pytest.fail(run.stderr.read())
    begun = [int(run.stdout.readline().split()[1]) for _ in range(saves)]
    time.sleep(after)
    run.send_signal(signal.SIGKILL)
    rest, errors = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL, errors
    begun += [int(line.split()[1]) for line in rest.splitlines() if line.startswith("saving ")]
    return 0 if first[1] == "None" else int(first[1]), begun, errors


def kill_repeatedly(folder, times: int) -> None:
    chance = random.Random(0)
    begun = [0]
    for life in range(times):
        # A second save begins when the first is whole: every other life gets on, however slow.
        resumed, steps, errors = run_and_kill(folder, 1 + life % 2, chance.uniform(0.0, 0.3))
        # The newest checkpoint was being written when it was killed; the one before is whole.
        # One may be whole whose line was not written any more.
        assert begun[-1] - 1 <= resumed <= begun[-1] + 1, (resumed, begun)
        assert "Skipping" not in errors
        begun = [resumed, *steps]
    assert begun[-1] >= times // 2, "the runs were killed before anything was written"


def test_killed_at_any_moment_the_checkpoint_before_is_whole(tmp_path):
    kill_repeatedly(tmp_path, 4)


@pytest.mark.slow
def test_killed_many_times(tmp_path):
    kill_repeatedly(tmp_path, 12)


HOST = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from types import SimpleNamespace
import jax.numpy as jnp
import numpy as np
from moezoo.train import join, mesh as meshes, placement
from moezoo.train.checkpoint import Checkpointer
from moezoo.train.schema import MeshConfig
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
hosts = dict(coordinator=f"127.0.0.1:{port}", count=2, index=index, timeout=60)
join.initialise_distributed(SimpleNamespace(**hosts))
sizes = MeshConfig(data=1, fsdp=2, expert=2)
mesh = meshes.make_mesh(sizes)

def build():
    x = jnp.arange(4 * 6 * 8.0).reshape(4, 6, 8)
    return {"params": {"experts": {"kernel": x}, "bias": jnp.ones(5)}, "stats": {}}

shardings = placement.shardings(mesh, jax.eval_shape(build))
state = jax.jit(build, out_shardings=shardings)()
wanted = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
)
with Checkpointer(folder, "{}") as checkpoints:
    assert checkpoints.latest_valid() is None
    checkpoints.save(1, state)
    checkpoints.save(2, jax.tree.map(lambda x: x + 1, state))
    checkpoints.wait()
    newest = checkpoints.latest_valid()
    found = checkpoints.restore(newest, wanted)
    total = jax.jit(lambda t: sum(x.sum() for x in jax.tree.leaves(t)))(found)
    print("newest", newest, "total", float(total))
"""


@pytest.mark.slow
def test_two_processes_save_and_one_process_restores(tmp_path):
    port, pipe = str(free_port()), subprocess.PIPE
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(index), port, str(tmp_path)],
            stdout=pipe, stderr=pipe, text=True, cwd=ROOT,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [host.communicate(timeout=180) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    for out, _ in outputs:
        assert f"newest 2 total {float(192 * 191 / 2 + 192 + 10)}" in out
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    bias = np.ones(5, np.float32)
    kernel = np.arange(192, dtype=np.float32).reshape(4, 6, 8)
    target = {"params": {"experts": {"kernel": kernel}, "bias": bias}, "stats": {}}
    found = checkpoint.load_params(tmp_path, target)["params"]
    np.testing.assert_array_equal(found["experts"]["kernel"], kernel + 1)
    np.testing.assert_array_equal(found["bias"], bias + 1)
