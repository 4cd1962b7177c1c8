"""Upcycling as configured: what is refused before there are data, and what a run begins with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moezoo
from moezoo.domains.images.domain import DataConfig
from moezoo.errors import UserError
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.nn import module
from moezoo.train import config_file, saved, start, upcycling, zoo
from moezoo.train.config import Config, EvaluateConfig, UpcycleConfig, validate
from moezoo.train.console import Console
from moezoo.train.log import NAME, read
from moezoo.train.loop import train
from moezoo.train.setup import make_builder, make_tasks
from moezoo.weights.augreg_names import to_augreg
from tests.models.tiny import quick_jit
from tests.train import tiny

TASKS = {"semseg": 5, "depth": 1}
RENORMALISED = "softmax_then_top_k_renormalised"
SPLIT = {"experts": 8, "top_k": 2, "expert_ratio": 1.0, "mlp_ratio": 2.0}
SAME = {"experts": 4, "expert_ratio": 2.0, "mlp_ratio": 2.0}
DENSE = tiny.dense(mlp_ratio=2.0)
ZOO = Path(moezoo.__file__).parent / "zoo" / "rooms"


def vmoe(**changes: Any) -> VMoEConfig:
    sizes: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "mlp_ratio": 2.0}
    return VMoEConfig(**(sizes | {"experts": 4, "pool": "mean", "activation": "gelu"} | changes))


def mod_squad(**changes: Any) -> ModSquadConfig:
    sizes: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "head_channels": 8}
    return ModSquadConfig(**(sizes | {"experts": 4, "top_k": 2, "expert_ratio": 2.0} | changes))


def config(model: Any, **options: Any) -> Config:
    tasks = ("scene",) if not model.per_pixel else ("semseg", "depth")
    data = DataConfig(resolution=tiny.SIZE, train=8, test=4)
    made = tiny.config("unused", model=model, upcycle=UpcycleConfig(**options), data=data)
    return replace(made, tasks=tasks, start_from="x")


FIRST = config(DENSE)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (tiny.model(**SPLIT), {"noise": 0.1}, "noise is 0.1, but .* copies of MLPs of "
         "the run in x, because they are smaller: take upcycle.experts split"),
        (tiny.model(**SAME), {"experts": "split"}, "as large as those: take upcycle.experts copy"),
        (tiny.model(**SPLIT | {"expert_ratio": 0.75}), {"experts": "split"}, "hidden units must"),
        (tiny.model(**SPLIT | {"experts": 7}), {"experts": "split"}, "must be a multiple of the"),
        (tiny.model(**SAME | {"width": 24}), {"router": "clusters"}, "clusters, but no experts of"),
        (DENSE, {"gates": "rescaled"}, "rescaled, but no experts of tiny begin as copies of MLPs"),
        (tiny.model(**SPLIT | {"experts": 2}), {"experts": "split", "router": "clusters"},
         "one expert for each of 2 groups, and all of them are chosen"),
        (tiny.model(**SAME, selection=RENORMALISED), {"gates": "rescaled"}, "add up to 1 already"),
        (tiny.model(**SAME | {"top_k": 4}), {"gates": "rescaled"}, "add up to 1 already"),
        (tiny.model(**SAME), {"gates": "rescaled", "router": "clusters"}, "first update would"),
        (tiny.model(**SPLIT | {"top_k": 3}), {"experts": "split", "gates": "rescaled"},
         "a token's 3 experts cannot be all 2 parts equally often, .* take model.top_k 2, or"),
        (tiny.model(**SAME, dispatch="capacity"), {"gates": "rescaled"}, "capacity may drop"),
        (vmoe(), {"gates": "rescaled"}, "capacity may drop choices, .* take model.dispatch auto"),
        (vmoe(routing="experts_choose"), {"gates": "rescaled"}, "tokens do not choose their"),
        (vmoe(routing="soft"), {"gates": "rescaled"}, "tokens do not choose their experts"),
        (vmoe(routing="soft"), {"router": "clusters"}, "no router of its own decides by single"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(model: Any, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=f"^upcycle.*{words}"):
        start.check_first(FIRST, "the run in x", config(model, **options))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (tiny.model(**SPLIT), {"experts": "split", "gates": "rescaled", "noise": 0.1}),
        (tiny.model(**SPLIT, selection=RENORMALISED), {"experts": "split", "router": "clusters"}),
        (tiny.model(**SPLIT, routing="task_conditioned"), {"experts": "split"}),
        (vmoe(routing="experts_choose"), {"router": "clusters"}),
        (vmoe(routing="soft"), {"noise": 0.1, "noise_share": 0.5}),
        (vmoe(dispatch="auto"), {"gates": "rescaled"}),
        (mod_squad(mlp_ratio=2.0), {"router": "clusters"}),
    ],
)
def test_what_makes_sense_is_not(model: Any, options: dict) -> None:
    start.check_first(FIRST, "the run in x", config(model, **options))


def test_options_without_a_start_and_a_share_without_noise() -> None:
    alone = replace(config(tiny.model(**SPLIT), experts="split"), start_from=None)
    with pytest.raises(
        UserError, match=r"upcycle\.experts is about start_from, which is not given"
    ):
        validate(alone, 1)
    with pytest.raises(UserError, match=r"noise_share is 0\.5, but upcycle\.noise is 0"):
        validate(config(tiny.model(**SPLIT), noise_share=0.5), 1)
    for wrong in ({"noise": -0.1}, {"noise": 1.0, "noise_share": 0.0}, {"noise_share": 1.5}):
        with pytest.raises(UserError, match=r"upcycle\.noise\w* is"):
            validate(config(tiny.model(**SPLIT), **wrong), 1)


def test_a_run_is_refused_before_its_data_are_made(tmp_path: Path) -> None:
    given = config_file.load("rooms/vmoe_tiny")
    given = replace(
        given,
        directory=str(tmp_path / "runs"),
        data=replace(given.data, data_dir=str(tmp_path / "data"), test=399),
        upcycle=UpcycleConfig(experts="split"),
    )
    for place in ("rooms/vit_dense_tiny", str(ZOO / "vit_dense_tiny")):
        with pytest.raises(UserError, match="as large as those: take upcycle.experts copy"):
            train(replace(given, start_from=place), Console())
    assert not list(tmp_path.iterdir())


def begun(model: Any, dense: dict, seed: int = 0, images: int = 2, **options: Any) -> tuple:
    """The parameters that a run begins with, and what it says."""
    given = replace(config(model, **options), seed=seed)
    parts = module.create(lambda: model.build(TASKS, tiny.SIZE, nnx.Rngs(3)))
    state = {"params": parts.params, "stats": parts.stats}
    state, taken = start.begin({"params": dense, "stats": {}}, state, upcycling.beginning(given))
    batches = [{"image": image(images, at)} for at in range(2)]
    definition = parts.definition
    state, told = upcycling.finished(given, definition, state, taken.layers, lambda: batches)
    return parts._replace(params=state["params"]), told


def image(count: int = 2, seed: int = 5) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (count, *tiny.SIZE, 3))


@pytest.fixture(scope="module")
def learned() -> module.ModuleParts:
    """A dense model with parameters away from their beginning."""
    parts = module.create(lambda: DENSE.build(TASKS, tiny.SIZE, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda a: a + jnp.asarray(0.3 * rng.normal(size=a.shape)), parts.params)
    return parts._replace(params=jax.tree.map(lambda a: a.astype(jnp.float32), noisy))


def predictions(parts: module.ModuleParts) -> dict[str, jax.Array]:
    run = quick_jit(lambda p: module.merge(parts.definition, p, parts.stats)(image()).predictions)
    return run(parts.params)


def test_a_whole_model_begins_as_the_dense_one(learned: module.ModuleParts) -> None:
    """M3ViT with its own weights, one router per task, experts of half the MLP's size."""
    options = {"experts": "split", "gates": "rescaled"}
    parts, told = begun(tiny.model(**SPLIT), module.flatten(learned.params), **options)
    assert "2 parts of the MLP, 4 experts of each" in told
    assert "there step 0 computes what the MLP did" in told
    wanted, found = predictions(learned), predictions(parts)
    plain, _ = begun(tiny.model(**SPLIT), module.flatten(learned.params), experts="split")
    other = predictions(plain)  # the same program with weights as they are
    for task in TASKS:
        np.testing.assert_allclose(found[task], wanted[task], rtol=1e-4, atol=1e-5)
        assert float(jnp.abs(other[task] - wanted[task]).max()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (tiny.model(**SAME, selection=RENORMALISED), {"router": "clusters"}),
        (tiny.model(**SAME), {"gates": "rescaled"}),
        (tiny.model(**SAME, routing="task_conditioned"), {"gates": "rescaled"}),
        (tiny.model(**SPLIT, selection=RENORMALISED), {"experts": "split"}),
        (tiny.model(**SPLIT, selection="top_k_then_softmax", gate_input_ahead=True),
         {"experts": "split", "router": "clusters"}),
        (tiny.model(**SPLIT | {"top_k": 4}, routing="single"),
         {"experts": "split", "gates": "rescaled"}),
    ],
)  # fmt: skip
def test_all_that_is_promised(learned: module.ModuleParts, model: Any, options: dict) -> None:
    parts, told = begun(model, module.flatten(learned.params), **options)
    assert "there step 0 computes what the MLP did" in told
    wanted, found = predictions(learned), predictions(parts)
    for task in TASKS:
        np.testing.assert_allclose(found[task], wanted[task], rtol=1e-4, atol=1e-5)


def test_clusters_and_noise_follow_the_seed(learned: module.ModuleParts) -> None:
    """Every task has a router of its own, of whole copies; noise is on the last half."""
    dense = module.flatten(learned.params)
    model = tiny.model(**SPLIT, selection=RENORMALISED)
    options: dict[str, Any] = {"experts": "split", "router": "clusters", "noise": 0.05}
    options |= {"noise_share": 0.5}
    one, two, other = (
        {
            k: np.asarray(v)
            for k, v in module.flatten(begun(model, dense, s, **options)[0].params).items()
        }
        for s in (0, 0, 1)
    )
    for path, array in one.items():
        np.testing.assert_array_equal(array, two[path])
    kernel_JDE = one["blocks/1/mlp/router/kernel"]
    assert np.abs(kernel_JDE - other["blocks/1/mlp/router/kernel"]).max() > 1e-3
    assert np.abs(kernel_JDE[0] - kernel_JDE[1]).max() > 1e-3
    np.testing.assert_array_equal(kernel_JDE[..., ::2], kernel_JDE[..., 1::2])
    first = one["blocks/1/mlp/experts/fc1/kernel"]
    dense_fc1 = np.asarray(dense["blocks/1/mlp/fc1/kernel"])
    for e in range(8):
        part = dense_fc1[:, 16 * (e % 2) : 16 * (e % 2) + 16]
        apart = np.abs(first[e] - part).std() / part.std()
        assert apart == 0 if e < 4 else 0.01 < apart < 0.1
    assert np.abs(first - other["blocks/1/mlp/experts/fc1/kernel"])[4:].max() > 0


def test_what_a_start_says_where_it_is_not_the_dense_model() -> None:
    def said(model: Any, **options: Any) -> str:
        given = config(model, **options)
        parts = start.parts_of(given)
        groups = 2 if options.get("experts") == "split" else 1
        return upcycling.told(given, module.merge(*parts), {"blocks/1/mlp": groups})

    assert "not the MLP, because weights do not add up to 1" in said(tiny.model(**SAME), noise=0.1)
    assert "there, noise apart, step 0 computes what the MLP did" in said(
        tiny.model(**SAME, selection=RENORMALISED), noise=0.1
    )
    odd = tiny.model(**SPLIT | {"top_k": 3}, selection=RENORMALISED)
    assert "3 experts cannot be all 2 parts equally often" in said(odd, experts="split")


def test_a_pretrained_file_is_split_too(tmp_path: Path, learned: module.ModuleParts) -> None:
    plain = {k: np.asarray(v) for k, v in module.flatten(learned.params).items()}
    arrays, _ = to_augreg({k: v for k, v in plain.items() if not k.startswith("heads")}, heads=2)
    np.savez(tmp_path / "vit.npz", **arrays)  # type: ignore[arg-type]
    given = config(tiny.model(**SPLIT), experts="split")
    start.check_fits(tmp_path / "vit.npz", given)
    with pytest.raises(UserError, match="no place for its blocks/1/mlp/fc1"):
        start.check_fits(tmp_path / "vit.npz", replace(given, upcycle=UpcycleConfig()))
    with pytest.raises(UserError, match="a token's 2 experts cannot be all 4 parts"):
        smaller = tiny.model(**SPLIT | {"expert_ratio": 0.5})
        options = UpcycleConfig(experts="split", gates="rescaled")
        start.check_fits(tmp_path / "vit.npz", replace(given, model=smaller, upcycle=options))
    parts = start.parts_of(given)
    shapes = upcycling.shapes_of(parts)
    found = given.data.domain.pretrained.arrays(tmp_path / "vit.npz", given, shapes)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), parts.params)
    learned_too = {"params": found, "stats": {}}
    made, taken = start.begin(
        learned_too, {"params": state, "stats": {}}, upcycling.beginning(given)
    )
    assert taken.layers == {"blocks/1/mlp": 2} and not taken.unused
    stack = module.flatten(made["params"])["blocks/1/mlp/experts/fc2/kernel"]
    np.testing.assert_allclose(stack[5], 2 * plain["blocks/1/mlp/fc2/kernel"][16:], rtol=1e-6)


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved dense model in whose output its MLPs matter, as they do not from the beginning."""
    folder = tmp_path_factory.mktemp("dense")
    given = on_rooms("rooms/vit_dense_tiny", folder, steps=1)
    classes = given.data.domain.example(given)[1]
    parts = module.create(make_builder(given, make_tasks(given, classes)))
    flat = module.flatten(parts.params)
    louder = {k: v * (8 if "/mlp/" in k and "kernel" in k else 1) for k, v in flat.items()}
    about = zoo.About(0, "made for a test", classes)
    saved.write(folder / "saved", given, module.unflatten(louder), parts.stats, about)
    return folder / "saved"


CLAIMS = pytest.mark.claims  # whole runs beyond the first
CLUSTERS = {"experts": "split", "router": "clusters"}


def on_rooms(name: str, folder: Path, steps: int, **changes: Any) -> Config:
    given = config_file.load(name)
    return replace(
        given,
        directory=str(folder),
        data=replace(given.data, resolution=(32, 32), train=16, test=8),
        train=replace(given.train, steps=steps, log_every=1),
        optimiser=replace(given.optimiser, warmup=1, lr=1e-3),
        evaluate=EvaluateConfig(pictures=0),
        **changes,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"experts": "split", "gates": "rescaled"},
        pytest.param(CLUSTERS, marks=CLAIMS),
        pytest.param({**CLUSTERS, "noise": 0.5, "noise_share": 0.5}, marks=CLAIMS),
    ],
)
@pytest.mark.claims
def test_a_run_on_rooms_goes_on_where_the_dense_one_stopped(
    options: dict[str, Any], dense_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step's losses are those of the dense model that goes on; without noise."""
    given = on_rooms("rooms/m3vit_tiny", tmp_path, 3, start_from=str(dense_model))
    selection = "softmax_then_top_k" if "gates" in options else RENORMALISED
    model: Any = given.model
    given = replace(given, model=replace(model, selection=selection))
    train(replace(given, upcycle=UpcycleConfig(**options)), Console())
    said = capsys.readouterr()
    assert "Upcycled: experts in blocks/1/mlp begin as 2 parts of the MLP" in said.out + said.err
    dense = on_rooms("rooms/vit_dense_tiny", tmp_path, 3, start_from=str(dense_model))
    train(dense, Console())
    own, wanted = (
        [row for row in read(tmp_path / name / NAME) if row["split"] == "train"]
        for name in ("m3vit_tiny", "vit_dense_tiny")
    )
    assert len(own) == 3 and own[0]["dropped"] == 0
    for task in given.tasks:
        a, b = own[0][f"loss/{task}"], wanted[0][f"loss/{task}"]
        if "noise" in options:
            assert 1e-3 < abs(a - b) / b < 1
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4)
