"""One pass over calibration data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.deploy import calibrate, scores
from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.produce import candidates
from moezoo.deploy.specialise import layers_of
from moezoo.deploy.usage import Usage
from moezoo.errors import UserError
from moezoo.nn.context import NO_TASK
from moezoo.ops import grouped
from moezoo.ops.expert import each_choice
from tests.deploy.conftest import CONFIG, Case, batches


def test_outputs_of_each_choice(case: Case) -> None:
    layer = layers_of(case.whole.module(case.whole.weights))["blocks/1/mlp"]
    x_ND = jnp.asarray(np.random.default_rng(0).normal(size=(24, CONFIG.width)), jnp.float32)
    fn, params = layer.experts.fn, layer.experts.stacked()

    @jax.jit
    def run(x_ND):
        routing = layer.router(x_ND, NO_TASK)
        everything = jax.vmap(lambda p: fn(p, x_ND, grouped.dense))(params)
        found = each_choice(grouped.blocks, fn, params, x_ND, routing).y_ND
        return routing, found, everything

    routing, found, y_END = run(x_ND)
    expected = np.asarray(y_END)[np.asarray(routing.experts_NK), np.arange(24)[:, None]]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_counts_are_those_of_the_routings(case: Case) -> None:
    # The first layer's routing is the same in the pruned path: nothing is removed before it.
    for name in ["blocks/0/mlp"]:
        usage, routing = case.found.layers[name], case.routing
        experts_NK = routing[name].experts_NK
        expected = np.bincount(experts_NK.ravel(), minlength=CONFIG.experts)
        np.testing.assert_array_equal(usage.count_E, expected)
        assert usage.tokens == len(experts_NK) == usage.choices / CONFIG.top_k
        gates = np.asarray(routing[name].weights_NK, np.float64).sum()
        np.testing.assert_allclose(usage.gate_E.sum(), gates, rtol=1e-5)
    assert case.found.images == len(case.images)
    assert case.found.chosen == dict.fromkeys(case.whole.layers, CONFIG.top_k)


def test_neither_order_nor_filled_up_rows_matter(case: Case) -> None:
    order = np.random.default_rng(1).permutation(len(case.images))
    images = case.images[order][: len(order) - 3]
    rest = case.images[order][len(order) - 3 :]
    both = [*batches(images, 8), *batches(rest, 8)]
    assert sum(int((~batch["valid"]).sum()) for batch in both) > 0
    again = calibrate.calibrate(case.whole, both, case.found.fingerprint)
    assert again.images == case.found.images
    for name, usage in again.layers.items():
        for field, a, b in zip(Usage._fields, usage, case.found.layers[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3, err_msg=f"{name} {field}")
    for score in ("reap", "gram"):
        kept = [scores.uniform(candidates(case.whole, c), score, 3) for c in (again, case.found)]
        assert kept[0] == kept[1]


def test_parts_of_a_pass_add_up_and_a_pass_goes_on(case: Case) -> None:
    fingerprint, whole = case.found.fingerprint, case.whole
    both = list(batches(case.images, 8))
    first, rest = (
        calibrate.calibrate(whole, part, fingerprint, moments=True) for part in (both[:1], both[1:])
    )
    merged = first.merged(rest)
    resumed = calibrate.calibrate(whole, both, fingerprint, moments=True, begun=first)
    for other in (merged, resumed):
        assert other.images == case.found.images
        for name, usage in case.found.layers.items():
            for field, a, b in zip(Usage._fields, usage, other.layers[name], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3, err_msg=f"{name} {field}")
    for name, sums in merged.moments.items():
        for a, b in zip(sums, resumed.moments[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="do not go together"):
        first.merged(case.found)


def test_rows_on_several_devices_give_the_same_sums(case: Case) -> None:
    # Eight devices: batches of 8 are divided among them, those of 6 are not.
    assert len(jax.local_devices()) == 8
    again = calibrate.calibrate(case.whole, batches(case.images, 6), "data")
    for name, usage in case.found.layers.items():
        for field, a, b in zip(Usage._fields, usage, again.layers[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3, err_msg=f"{name} {field}")


def test_survives_a_file(case: Case, tmp_path) -> None:
    case.found.save(tmp_path / "calibration.npz")
    again = Calibration.load(tmp_path / "calibration.npz")
    assert (again.task, again.images) == ("semseg", len(case.images))
    assert (again.fingerprint, again.chosen) == (case.found.fingerprint, case.found.chosen)
    for name, usage in case.found.layers.items():
        for a, b in zip(usage, again.layers[name], strict=True):
            np.testing.assert_array_equal(a, b)
    whole = calibrate.calibrate(case.whole, batches(case.images, 8), "data", moments=True)
    whole.save(tmp_path / "moments.npz")
    for name, sums in Calibration.load(tmp_path / "moments.npz").moments.items():
        for a, b in zip(sums, whole.moments[name], strict=True):
            np.testing.assert_array_equal(a, b)


def test_damaged_files_are_refused(case: Case, tmp_path) -> None:
    file = tmp_path / "calibration.npz"
    with pytest.raises(UserError, match="Could not read"):
        Calibration.load(file)
    case.found.save(file)
    content = bytearray(file.read_bytes())
    content[content.find(b"PK\x03\x04", 1) - 20] ^= 255  # in the first array, not in a header
    for damaged in (content, content[:100], b"nothing"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"calibration\.npz is no readable calibration"):
            Calibration.load(file)


@pytest.mark.parametrize("about", ["{}", "[]", '{"task": 1}', "[" * 10_000, "{'task'}"])
def test_files_of_something_else_are_refused(case: Case, about: str, tmp_path) -> None:
    file = tmp_path / "calibration.npz"
    case.found.save(file)
    with np.load(file) as archive:
        arrays = dict(archive)
    np.savez(file, **(arrays | {"about": np.array(about)}))
    with pytest.raises(UserError, match=r"calibration\.npz is no readable calibration"):
        Calibration.load(file)
    name = next(name for name in arrays if name.endswith("gate_E"))
    for odd in (arrays[name][:-1], np.full_like(arrays[name], np.nan), np.array(["a"])):
        np.savez(file, **(arrays | {name: odd}))
        with pytest.raises(UserError, match=r"calibration\.npz is no readable calibration"):
            Calibration.load(file)
    np.savez(file, **{n: a for n, a in arrays.items() if n != name})
    with pytest.raises(UserError, match=r"calibration\.npz is no readable calibration"):
        Calibration.load(file)


def test_only_whole_paths_are_calibrated(case: Case) -> None:
    with pytest.raises(UserError, match="not a pruned one"):
        calibrate.calibrate(case.cut, [], "")
