"""Plans from shapes: against compiled ones, on GPUs, and over all meshes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from moezoo.errors import UserError
from moezoo.planning import shapes
from moezoo.planning import step as pod_step
from moezoo.train.config import EvaluateConfig, MeshConfig
from moezoo.train.mesh import make_mesh
from tests.planning.test_command import config


@pytest.fixture(scope="module")
def seen() -> shapes.StepShapes:
    return shapes.look(config(), "train")


@pytest.mark.slow
def test_an_estimate_is_near_what_the_compiler_says(seen: shapes.StepShapes) -> None:
    own = config(data=2, fsdp=2, expert=2)
    real = pod_step.measure(own, "here", jax.devices()[:8])
    found = shapes.estimate(own, "here", 8, seen)
    for name in ("parameter_bytes", "optimiser_bytes", "state_bytes", "batch_bytes", "balance"):
        assert getattr(found, name) == getattr(real, name), name
    assert found.flops == pytest.approx(real.flops, rel=0.3)
    assert found.least_token_bytes == real.least_token_bytes
    assert found.token_bytes == pytest.approx(real.token_bytes, rel=0.3)
    assert found.memory_bytes == pytest.approx(real.memory_bytes, rel=0.5)
    assert real.source == "compiled" and found.source == "shapes"


@pytest.mark.slow
def test_moments_over_data_take_their_share(seen: shapes.StepShapes) -> None:
    own = config(data=8)
    split = replace(own, optimiser=replace(own.optimiser, split="over_data"))
    plain, shared = (shapes.estimate(c, "h100:8", 8, seen) for c in (own, split))
    assert plain.parameter_bytes == shared.parameter_bytes
    assert shared.optimiser_bytes < 0.2 * plain.optimiser_bytes


@pytest.mark.slow
def test_what_is_computed_again_is_not_kept(seen: shapes.StepShapes) -> None:
    own = config()
    less = replace(own, train=replace(own.train, rematerialise="all_but_products"))
    again = shapes.look(less, "train")
    assert 0 < again.activations < 0.7 * seen.activations
    losses = []
    for one in (own, less):
        traced = pod_step.train_step(
            replace(one, mesh=MeshConfig()), make_mesh(MeshConfig(), jax.devices()[:1])
        )
        state, batch = jax.tree.map(
            lambda a: jnp.ones(a.shape, a.dtype) * 0.1, (traced.form.state, traced.form.batch)
        )
        _, metrics = traced.form.update(state, batch)
        losses.append((float(metrics["loss/total"]), float(metrics["gradient_norm"])))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_all_meshes_are_ranked(seen: shapes.StepShapes) -> None:
    rows = shapes.search(config(), "h100:8", 8, seen)
    assert len({row.mesh for row in rows}) == len(rows) >= 8  # at most 4 experts on the axis
    assert all("expert 8" not in row.mesh for row in rows)
    seconds = [row.bound.seconds for row in rows]
    assert None not in seconds and seconds == sorted(seconds)  # type: ignore[type-var]
    assert all(row.fits for row in rows) and rows[0].chip_bytes == 80e9
    two = replace(config(), mesh=MeshConfig(slices=2))
    across = shapes.search(two, "h100:16", 16, seen)
    assert any(row.bound.dcn for row in across)
    with pytest.raises(UserError, match="No mesh of 7 chips is possible"):
        shapes.search(config(), "h100:7", 7, seen)


@pytest.mark.slow
def test_an_evaluation_keeps_no_gradients() -> None:
    own = replace(config(data=2, expert=2), evaluate=EvaluateConfig(batch=8))
    row = shapes.estimate(own, "here", 4, shapes.look(own, "evaluation"))
    assert row.step == "evaluation" and row.batch == 8 and row.optimiser_bytes == 0
    assert {one.kind for one in row.traffic} == {"all-to-all"}
    real = pod_step.measure(own, "here", jax.devices()[:4], "evaluation")
    assert real.flops == pytest.approx(row.flops, rel=0.3)
    assert real.optimiser_bytes == 0 and real.state_bytes == row.state_bytes


def test_numbers_of_chips() -> None:
    two = replace(config(), mesh=MeshConfig(slices=2))
    assert shapes.count_of("h100:8", config()) == 8 and shapes.count_of("h100:16", two) == 16
    assert shapes.count_of("v5p:2x2x4", config()) == 16
    assert shapes.count_of("v6e:4x4", two) == 32
    for topology, said in (
        ("h100", "say how many GPUs, for example h100:8"),
        ("h100:0", "say how many"),
        ("v5p:2x", "those of v5p are 2x2x1, 2x2x2, .* multiples of 4 "),
        ("v5e:3x5", "There is no TPU slice 'v5e:3x5': those of v5e are 1x1, 2x2, .* and 16x16"),
        ("h100:16", "add --mesh.slices 2"),
        ("v7p:2x2", "did you mean v5p"),
    ):
        with pytest.raises(UserError, match=said):
            shapes.count_of(topology, config())
