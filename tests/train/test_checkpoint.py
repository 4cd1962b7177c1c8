"""Checkpoints: saved in the background, restored anywhere, never trusted when damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moezoo.errors import UserError
from moezoo.train import checkpoint, manifest, placement, sealed
from moezoo.train.checkpoint import Checkpointer
from moezoo.train.mesh import make_mesh
from moezoo.train.schema import MeshConfig
from tests.fixtures import ROOT

OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed: int = 0, width: int = 8) -> dict:
    """Parameters, statistics and an optimiser's state with moments that are not 0."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "blocks": {
            "0": {
                "experts": {"kernel": jax.random.normal(keys[0], (4, 6, width))},
                "proj": {"kernel": jax.random.normal(keys[1], (width, 16))},
                "half": jax.random.normal(keys[2], (width,)).astype(jnp.bfloat16),
            }
        },
        "empty": jnp.zeros((0, 3)),
    }
    moments = OPTIMISER.init(params)
    moments = jax.tree.map(lambda x: x + jnp.asarray(1 + seed, x.dtype), moments)
    stats = {"mean": jax.random.normal(keys[3], (5,))}
    step = jnp.asarray(seed, jnp.int32)
    return {"params": params, "stats": stats, "optimiser": moments, "step": step}


def target(state: dict, sizes: MeshConfig, devices: int = 8) -> dict:
    mesh = make_mesh(sizes, jax.devices()[:devices])
    places = placement.shardings(mesh, state)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def saved(folder, *steps: int, keep: int = 9, scores=None):
    """A folder of checkpoints `make_state(step)`."""
    with Checkpointer(folder, "{}", keep) as checkpoints:
        for i, step in enumerate(steps):
            checkpoints.save(step, make_state(step), scores[i] if scores else None)
    return folder


def steps_in(folder) -> list[int]:
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 1 and 2; copied by tests that damage them."""
    return saved(tmp_path_factory.mktemp("two") / "checkpoints", 1, 2)


MESHES = [
    (MeshConfig(), 1),
    (MeshConfig(), 8),
    (MeshConfig(data=2, expert=4), 8),
    (MeshConfig(fsdp=2, expert=2), 4),
    (MeshConfig(fsdp=8), 8),
]


@pytest.mark.slow
@pytest.mark.parametrize("origin", [0, 3])
def test_restores_onto_any_mesh_bit_for_bit(tmp_path, origin):
    state = make_state(7)
    places = target(state, *MESHES[origin])
    placed = jax.device_put(state, jax.tree.map(lambda x: x.sharding, places))
    with Checkpointer(tmp_path, "{}") as checkpoints:
        checkpoints.save(7, placed)
        checkpoints.wait()
        assert checkpoints.latest_valid() == 7
        for sizes, devices in MESHES:
            wanted = target(state, sizes, devices)
            found = checkpoints.restore(7, wanted)
            assert_same(found, state)
            jax.tree.map(lambda x, t: x.sharding == t.sharding or pytest.fail(), found, wanted)


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    state = {"params": {f"k{i}": jnp.full((256, 256), 1.0) for i in range(8)}}
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpointer(tmp_path, "{}", keep=9) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, state)
            for _ in range(3):
                state = advance(state)
        checkpoints.wait()
        for step in range(1, 4):
            for array in checkpoints.restore(step, wanted)["params"].values():
                np.testing.assert_array_equal(array, 1.0 + 3 * (step - 1))


def test_plain_numbers_are_stored(tmp_path):
    with Checkpointer(tmp_path, "{}") as checkpoints:
        checkpoints.save(3, {"params": {"x": np.float32(2)}, "stats": {}, "step": 3})
    found = checkpoint.load_params(
        tmp_path, {"params": {"x": jax.ShapeDtypeStruct((), jnp.float32)}, "stats": {}}
    )
    assert found["step"] == 3 and found["params"]["x"] == 2


def test_newest_and_best_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5, keep=2, scores=[0.1, 0.9, 0.2, 0.3, 0.4])
    assert steps_in(tmp_path) == [2, 4, 5]
    assert checkpoint.find(tmp_path).name == "5"
    assert checkpoint.find(tmp_path, checkpoint.best).name == "2"


def test_without_scores_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert steps_in(tmp_path) == [3, 4]
    assert checkpoint.find(tmp_path, checkpoint.best).name == "4"


def test_a_step_saved_again_is_replaced(tmp_path):
    saved(tmp_path, 4)
    with Checkpointer(tmp_path, "{}") as checkpoints:
        checkpoints.save(4, make_state(5))
        checkpoints.wait()
        assert_same(checkpoints.restore(4, make_state()), make_state(5))


def files_of(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, os.remove, lambda path: os.truncate(path, 0)])
def test_damaged_newest_is_skipped_with_one_message(two, tmp_path, harm):
    names = [n for n in files_of(two / "2") if (two / "2" / n).stat().st_size > 1]
    assert len(names) > 5
    for name in names:
        folder = tmp_path / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(two, folder)
        harm(folder / "2" / name)
        said = []
        with Checkpointer(folder, "{}", say=said.append) as checkpoints:
            assert checkpoints.latest_valid() == 1, name
        unfinished = harm is os.remove and name == manifest.NAME
        assert len(said) == (0 if unfinished else 1), name
        assert unfinished or "2, which is damaged" in said[0]


def test_every_flipped_bit_of_a_manifest_is_seen(two, tmp_path):
    """In names, numbers, checksums: damaged, or (in a space) without any meaning."""
    folder = shutil.copytree(two / "2", tmp_path / "2")
    path, sound = folder / manifest.NAME, manifest.read(two / "2")
    content = path.read_bytes()
    seen = 0
    for at in range(0, 8 * len(content), 61):
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
        found = manifest.read(folder)
        assert found in (None, sound), (at, changed[at // 8 - 20 : at // 8 + 20])
        seen += found is None
    assert seen > 100


@pytest.mark.parametrize(
    "change",
    [
        {"step": 2.0}, {"step": True}, {"step": 3}, {"score": "0.5"}, {"score": True},
        {"files": {}}, {"files": {"../x": [0, "0"]}}, {"files": {"/dev/zero": [0, "0"]}},
        {"files": {"x": [0]}}, {"files": []}, {"arrays": {"a": [[1.5], "float32"]}},
        {"arrays": {"a": [[-1], "float32"]}}, {"arrays": {"a": [[2], "floaty"]}},
        {"arrays": {"a": [[2], 3]}}, {"arrays": None}, {"more": 1},
    ],
)  # fmt: skip
def test_manifests_of_other_types_are_damaged(two, tmp_path, change):
    folder = shutil.copytree(two / "2", tmp_path / "2")
    content = manifest.read(folder)._asdict()
    (folder / manifest.NAME).write_text(sealed.seal(content | change))
    assert manifest.read(folder) is None
    (folder / manifest.NAME).write_text(sealed.seal(content))
    assert manifest.read(folder)._asdict() == content


def test_manifests_of_older_versions_are_read(two, tmp_path):
    folder = shutil.copytree(two / "2", tmp_path / "2")
    content = manifest.read(folder)._asdict()
    (folder / manifest.NAME).write_text(json.dumps(content | {"score": float("nan")}))
    assert manifest.read(folder)._asdict() == content


@pytest.mark.parametrize("name", ["²", "٣", "007", "-1", "+2"])
def test_only_plain_numbers_are_steps(two, tmp_path, name):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    shutil.copytree(folder / "1", folder / name)
    assert checkpoint.find(folder).name == "2"


def test_damaged_checkpoint_pushes_no_sound_one_out(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    cut(folder / "2" / "arrays" / "state" / "manifest.ocdbt")
    said = []
    with Checkpointer(folder, "{}", keep=2, say=said.append) as checkpoints:
        assert checkpoints.latest_valid() == 1
        checkpoints.save(3, make_state(3))
        checkpoints.wait()
        assert steps_in(folder) == [1, 3]
        assert checkpoints.latest_valid() == 3
    assert len(said) == 1


def test_no_checkpoint_is_none_or_a_user_error(tmp_path):
    with Checkpointer(tmp_path / "new", "{}") as checkpoints:
        assert checkpoints.latest_valid() is None
    for path in (tmp_path / "new", tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="No checkpoint"):
            checkpoint.find(path)


def test_unfinished_remains_are_removed_by_the_run_alone(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    (folder / "3" / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    shutil.copytree(folder / "2", folder / "4")
    (folder / "4" / manifest.NAME).unlink()
    assert checkpoint.find(tmp_path).name == "2"
    assert steps_in(folder) == [1, 2, 3, 4]
    with Checkpointer(folder, "{}") as checkpoints:
        assert checkpoints.latest_valid() == 2
    assert steps_in(folder) == [1, 2]


def test_run_folder_checkpoints_and_single_checkpoint_are_read(two):
    wanted = {name: make_state()[name] for name in ("params", "stats")}
    for path, step in ((two.parent, 2), (two, 2), (two / "1", 1)):
        found = checkpoint.load_params(path, wanted)
        assert found.pop("step") == step
        assert_same(found, {name: make_state(step)[name] for name in wanted})


def test_named_checkpoint_that_is_damaged_is_a_user_error(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    os.remove(folder / "1" / "config.json")
    with pytest.raises(UserError, match="1 is damaged .config.json is missing"):
        checkpoint.find(folder / "1")


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda s: s["params"]["blocks"].update({"1": s["params"]["blocks"]["0"]}),
         ["params/blocks/1/experts/kernel is missing"]),
        (lambda s: s["params"]["blocks"]["0"].pop("proj"),
         ["params/blocks/0/proj/kernel is not in the model"]),
        (lambda s: s.update(make_state(width=16)),
         ["params/blocks/0/experts/kernel is (4, 6, 8)", "(4, 6, 16)", "more"]),
        (lambda s: s["stats"].update(mean=jnp.zeros(5, jnp.int32)), ["stats/mean is float32"]),
    ],
)  # fmt: skip
def test_checkpoint_of_another_model_names_what_differs(two, change, parts):
    state = make_state()
    change(state)
    with pytest.raises(UserError, match="is of another model") as caught:
        checkpoint.restore(two, target(state, MeshConfig()))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("place", ["params", "stats"])
def test_what_is_not_finite_is_no_model(tmp_path, place):
    """Older versions kept such checkpoints."""
    tree = {
        "params": {"w": jnp.ones(3), "half": jnp.ones(2, jnp.bfloat16)},
        "stats": {"m": jnp.ones(2)},
    }
    spoiled = jax.tree.map(lambda x: x * jnp.nan, tree[place])
    with Checkpointer(tmp_path, "{}") as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.save(2, tree | {place: spoiled})
    with pytest.raises(UserError, match=f"2 is no model: {place}/.* is not finite"):
        checkpoint.load_params(tmp_path, tree)
    assert checkpoint.load_params(tmp_path / "1", tree)["step"] == 1


def test_remains_go_although_something_is_still_being_written(tmp_path, monkeypatch):
    """As the threads of a write do that fails on a full disk."""
    original, calls = shutil.rmtree, []

    def rmtree(folder, **words):
        original(folder, **words)
        calls.append(folder)
        if len(calls) < 3:
            (folder / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)

    (tmp_path / "2" / "arrays").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with Checkpointer(tmp_path, "{}"):
        assert os.listdir(tmp_path) == [] and len(calls) == 3


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_may_come_and_go(tmp_path, clip):
    """Its place in the optimiser's chain moves the others by one."""
    chains = [optax.chain(optax.clip(1.0), optax.adam(0.1)), optax.chain(optax.adam(0.1))]
    before, after = chains if clip else reversed(chains)
    params = {"w": jnp.ones(3)}
    moments = jax.tree.map(lambda x: x + 5, before.init(params))
    with Checkpointer(tmp_path, "{}") as checkpoints:
        checkpoints.save(1, {"params": params, "optimiser": moments})
    found = checkpoint.restore(tmp_path, {"params": params, "optimiser": after.init(params)})
    leaves = jax.tree.leaves(found["optimiser"])
    assert [x.tolist() for x in leaves] == [x.tolist() for x in jax.tree.leaves(moments)]


def test_another_optimiser_is_called_one(tmp_path):
    params = {"w": jnp.ones(3)}
    with Checkpointer(tmp_path, "{}") as checkpoints:
        checkpoints.save(1, {"params": params, "optimiser": optax.adam(0.1).init(params)})
    target = {"params": params, "optimiser": optax.sgd(0.1, 0.9).init(params)}
    with pytest.raises(UserError, match="is of another optimiser: optimiser/0/"):
        checkpoint.restore(tmp_path, target)


def test_config_lies_beside_the_arrays(tmp_path):
    with Checkpointer(tmp_path, '{"name": "x"}') as checkpoints:
        checkpoints.save(1, make_state())
    assert json.loads((tmp_path / "1" / "config.json").read_text()) == {"name": "x"}


def test_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write to"):
        Checkpointer(tmp_path / "file" / "checkpoints", "{}")


LIMITED = """
import resource, sys
import jax.numpy as jnp
from moezoo.errors import UserError
from moezoo.train.checkpoint import Checkpointer
state = {"params": {"x": jnp.arange(1000.0)}}
big = {"params": {"x": jnp.sin(jnp.arange(300000.0))}}
with Checkpointer(sys.argv[1], "{}") as checkpoints:
    checkpoints.save(1, state)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        checkpoints.save(2, big)
        checkpoints.wait()
    except UserError as error:
        print(error)
    checkpoints.save(3, state)
    checkpoints.wait()
    print(checkpoints.latest_valid())
"""


def run_limited(folder) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", LIMITED, str(folder)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.slow
def test_refused_write_is_one_sentence_and_older_checkpoints_stay(tmp_path):
    done = run_limited(tmp_path)
    assert done.returncode == 0, done.stderr
    sentence, newest = done.stdout.splitlines()
    assert sentence.startswith(f"Could not write checkpoint {tmp_path / '2'}: File too large;")
    assert sentence.endswith("Older checkpoints are kept.") and newest == "3"
    assert steps_in(tmp_path) == [1, 3]
    assert "Traceback" not in done.stderr


def test_full_disk_is_one_sentence_and_older_checkpoints_stay(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        state = {"params": {"x": jnp.arange(1000.0)}}
        big = {"params": {"x": jnp.sin(jnp.arange(300000.0))}}
        with Checkpointer(tmp_path / "c", "{}") as checkpoints:
            checkpoints.save(1, state)
            checkpoints.save(2, big)
            with pytest.raises(UserError, match="No space left on device; free space"):
                checkpoints.save(3, state)
            checkpoints.save(4, state)
            checkpoints.wait()
            assert checkpoints.latest_valid() == 4
        assert steps_in(tmp_path / "c") == [1, 4]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
