"""Beginning a run from another run's parameters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.ast import ASTConfig
from moezoo.backbones.decoder import DecoderConfig
from moezoo.cli import train as train_command
from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.pretrained import VisionTransformers
from moezoo.domains.text.domain import TextDataConfig
from moezoo.errors import UserError
from moezoo.models.language.model import LanguageConfig
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.nn import module
from moezoo.nn.upcycle import carry_over
from moezoo.ops.interpolate import bicubic, resize_position_embedding
from moezoo.train import config_file, start, zoo
from moezoo.train.checkpoint import Checkpointer
from moezoo.train.config import to_json
from moezoo.train.console import Console
from moezoo.weights.augreg_names import to_augreg
from tests.growth.numbers import NumbersData
from tests.train import tiny

TASKS = {"depth": 1, "semseg": 5}
SMALL = ASTConfig(frames=64, mel=32, width=8, depth=1, heads=2, hidden=8)
OTHER = replace(SMALL, stride_time=12)
TEXT = DecoderConfig(vocabulary=11, width=8, depth=1, heads=2, groups=1, hidden=6)
NORM = replace(TEXT, norm_epsilon=1e-6)


def params_of(config, tasks=TASKS, seed: int = 0) -> dict:
    return module.split(config.build(tasks, tiny.SIZE, nnx.Rngs(seed))).params


@pytest.mark.slow
def test_experts_begin_as_the_mlp_and_everything_else_as_it_was() -> None:
    dense = params_of(tiny.dense(mlp_ratio=1.0))
    sparse = params_of(tiny.model(mlp_ratio=1.0), {"depth": 1, "edge": 1}, seed=1)
    carried = carry_over(module.flatten(dense), sparse)
    made, old, new = (module.flatten(t) for t in (carried.params, dense, sparse))
    for e in range(4):
        for name in ("fc1/kernel", "fc2/bias"):
            copy = made[f"blocks/1/mlp/experts/{name}"][e]
            np.testing.assert_array_equal(copy, old[f"blocks/1/mlp/{name}"])
    heads = [path for path in new if path.startswith("heads/depth/")]
    assert heads
    for path in ("blocks/0/attn/qkv/kernel", "pos_embed", *heads):
        np.testing.assert_array_equal(made[path], old[path])
    router = "blocks/1/mlp/router/kernel"
    assert router in carried.fresh
    np.testing.assert_array_equal(made[router], new[router])
    assert all(path.startswith("heads/semseg/") for path in carried.unused)
    fresh = set(carried.fresh) - {router}
    assert fresh and all(path.startswith("heads/edge/") for path in fresh)
    assert "1 of routers and heads/edge/" in start.summary("there", carried)


def state_of(model, device: jax.Device) -> dict:
    parts = module.split(model)
    return jax.device_put({"params": parts.params, "stats": parts.stats}, device)


def flat(state: dict) -> dict:
    return {group: module.flatten(state[group]) for group in ("params", "stats")}


def test_the_same_model_is_taken_over_whole_statistics_too_and_lies_where_it_did() -> None:
    here = jax.devices()[3]
    built = [tiny.model().build(TASKS, tiny.SIZE, nnx.Rngs(seed)) for seed in (0, 1)]
    learned, fresh = (state_of(model, here) for model in built)
    learned["stats"] = jax.tree.map(lambda a: a + 0.5, learned["stats"])
    assert learned["stats"]
    begun, taken = start.begin(flat(learned), fresh | {"step": jnp.zeros(())})
    assert not taken.fresh and not taken.unused and "step" in begun
    assert "fresh are none" in start.summary("there", taken)
    for group in ("params", "stats"):
        for a, b in zip(
            jax.tree.leaves(begun[group]), jax.tree.leaves(learned[group]), strict=True
        ):
            np.testing.assert_array_equal(a, b)
            assert a.devices() == {here}


def test_a_model_without_a_class_token_takes_the_positions_of_the_patches() -> None:
    learned = module.flatten(params_of(tiny.model()))
    patches = learned["pos_embed"].shape[1] - 1
    fresh = {"pos_embed": jnp.zeros((1, patches, 16)), "blocks": {"0": {}}}
    carried = carry_over(learned, fresh)
    np.testing.assert_array_equal(carried.params["pos_embed"], learned["pos_embed"][:, 1:])
    fewer = {"pos_embed": jnp.ones((1, patches - 1, 16)), "cls_token": jnp.zeros((1, 1, 16))}
    assert carry_over(learned, fewer).fresh == ("pos_embed",)


def test_a_run_that_shares_nothing_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    other = {"params": {"blocks/0/attn/qkv/kernel": jnp.zeros((5, 15))}, "stats": {}}
    state = {"params": params_of(tiny.model()), "stats": {}}
    with pytest.raises(UserError, match="no parameter that fits"):
        start.begin(other, state)
    with pytest.raises(
        UserError,
        match="no such folder, file or configuration; name a run's folder or a pretrained",
    ):
        start.check(tmp_path / "absent", tiny.config("unused"))


@pytest.mark.slow
def test_a_file_of_a_vision_transformer_begins_a_model_on_another_grid(tmp_path: Path) -> None:
    """Trunk from the file, positions for the model's grid, everything else fresh."""
    plain = module.flatten(params_of(tiny.dense(mlp_ratio=1.0)))
    arrays, _ = to_augreg({k: np.asarray(v) for k, v in plain.items()}, heads=2)
    np.savez(tmp_path / "vit.npz", **arrays)  # type: ignore[arg-type]
    model = tiny.model(mlp_ratio=1.0)
    config = tiny.config("unused", model=model, data=DataConfig(resolution=(16, 24)))
    state = state_of(model.build(TASKS, (16, 24), nnx.Rngs(1)), jax.devices()[0])
    shapes = {path: a.shape for path, a in module.flatten(state["params"]).items()}
    arrays = VisionTransformers().arrays(tmp_path / "vit.npz", config, shapes)
    begun, taken = start.begin({"params": arrays, "stats": {}}, state)
    made, fresh = module.flatten(begun["params"]), module.flatten(state["params"])
    for path in ("blocks/0/mlp/fc2/bias", "blocks/1/attn/qkv/kernel", "patch_embed/kernel"):
        np.testing.assert_array_equal(made[path], plain[path])
    copies = made["blocks/1/mlp/experts/fc1/kernel"]
    np.testing.assert_array_equal(copies, np.stack([plain["blocks/1/mlp/fc1/kernel"]] * 4))
    assert made["pos_embed"].shape == (1, 1 + 4 * 6, 16)
    wanted = resize_position_embedding(plain["pos_embed"], (4, 6), bicubic)
    np.testing.assert_allclose(made["pos_embed"], wanted, rtol=1e-6)
    kept = [path for path in fresh if path.startswith("heads/") or "/router/" in path]
    assert set(taken.fresh) == set(kept) and not taken.unused
    for path in kept:
        np.testing.assert_array_equal(made[path], fresh[path])
    other = tiny.config("unused", model=tiny.model(width=24))
    with pytest.raises(UserError, match="the model's"):
        start.started(tmp_path / "vit.npz", other, {"params": params_of(other.model), "stats": {}})


def test_other_files_are_refused_at_once(tmp_path: Path) -> None:
    for name in ("model.h5", "model.pth"):
        (tmp_path / name).write_bytes(b"x")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    for name, words in (
        ("model.h5", "no file of weights"),
        ("model.pth", "cannot be read as .pth"),
        ("other.npz", "no vision transf"),
    ):
        with pytest.raises(UserError, match=words):
            start.check_fits(tmp_path / name, tiny.config("unused"))


def test_parameters_are_read_from_a_checkpoint_of_any_model(tmp_path: Path) -> None:
    params = params_of(tiny.dense())
    state = {"params": params, "stats": {}, "optimiser": {"mu": jnp.ones(3)}, "step": jnp.ones(())}
    config = tiny.config("unused", model=tiny.dense())
    with Checkpointer(tmp_path / "checkpoints", to_json(config), 1, print) as checkpoints:
        checkpoints.save(1, state, None)
        checkpoints.wait()
    found = start.read(tmp_path)["params"]
    assert found.keys() == module.flatten(params).keys()
    for path, array in module.flatten(params).items():
        np.testing.assert_array_equal(found[path], array)
    with pytest.raises(UserError, match="no such folder"):
        start.read(tmp_path / "absent")


@pytest.mark.parametrize(
    ("model", "first", "words"),
    [
        (tiny.model(heads=4), tiny.dense(), "model.heads is 4, but the run in there has 2"),
        (SoftMoAConfig(ast=SMALL), SoftMoAConfig(ast=OTHER), "model.ast.stride_time is 10, but"),
        (LanguageConfig(TEXT), LanguageConfig(NORM), "model.decoder.norm_epsilon is 1e-05, but"),
    ],
)
def test_runs_of_the_same_shapes_that_compute_something_else(
    model, first, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes alone would let them pass."""
    config = tiny.config("unused", model=model)
    before = tiny.config("unused", model=first)
    monkeypatch.setattr(start.restore, "find", lambda path, say: path)
    monkeypatch.setattr(start.restore, "read_config", lambda path: before)
    monkeypatch.setattr(start, "owner", lambda path: None)
    with pytest.raises(UserError, match=words):
        start.check_fits("there", config)
    start.check_fits("there", replace(config, model=first))


@pytest.mark.parametrize(
    ("given", "first", "words"),
    [
        ({}, {"model": tiny.model(heads=4)}, "model.heads is 2, but the configuration x has 4"),
        ({"start_heads": 4}, {}, "start_heads and start_without are for pretrained netw"),
        ({}, {"data": NumbersData()}, "run on images, but the configuration x is one on numbers"),
        ({}, {"data": TextDataConfig()}, "start from a run on images, or a pretrained vision"),
    ],
)
def test_a_configuration_that_nothing_begins_with_is_not_trained_first(
    given: dict, first: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.config(str(tmp_path), **first)
    monkeypatch.setattr(start.config_file, "exists", lambda name: name == "x")
    monkeypatch.setattr(start.config_file, "load", lambda name: base)
    monkeypatch.setattr(start, "held_name", lambda name: None)  # no weights come with it
    wanted = tiny.config(str(tmp_path), name="second", start_from="x", **given)
    with pytest.raises(UserError, match=words):
        start.with_start(wanted, Console(), lambda *given, **more: pytest.fail("trained"))


def test_runs_of_another_domain_only_where_that_can_be_read() -> None:
    images = tiny.config("unused", model=tiny.model(width=12, heads=3))
    pairs = config_file.load("rooms/conditional_moe_tiny")
    start.check_first(images, "the run in x", pairs)
    for first, then in ((pairs, images), (config_file.load("sounds/ast_tiny"), pairs)):
        with pytest.raises(UserError, match=f"on {then.data.domain.name}, but the run in x is one"):
            start.check_first(first, "the run in x", then)


def test_folders_that_are_no_model_are_called_what_they_are(tmp_path: Path) -> None:
    config = tiny.config("unused")
    for nothing in ("", ".", " "):
        with pytest.raises(UserError, match="start_from is empty: name a run's folder or"):
            start.check(nothing, config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="whose config.json does not say model_type"):
        start.check_fits(tmp_path, config)
    (tmp_path / "model.stablehlo").write_bytes(b"")
    with pytest.raises(UserError, match="which is an export: name the folder of the run"):
        start.check(tmp_path, config)
    (tmp_path / "library.json").write_bytes(b"")
    with pytest.raises(UserError, match="a library of LoRAs, which has no base in it"):
        start.check(tmp_path, config)


def never(*given: object, **named: object) -> None:
    pytest.fail("nothing is to be trained")


@pytest.mark.parametrize("name", ["rooms/vit_dense_tiny", "vit_dense_tiny"])
def test_a_configuration_stands_for_the_weights_that_come_with_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = tiny.config(str(tmp_path), start_from=name)
    start.check_named(wanted)
    found = start.with_start(wanted, Console(), never).start_from
    assert found == "rooms/vit_dense_tiny"
    assert (
        "starts from the weights of rooms/vit_dense_tiny that come with" in capsys.readouterr().out
    )
    held, read = start.read(zoo.ZOO / found), start.read(found)
    for group, arrays in held.items():
        assert arrays.keys() == read[group].keys()
        for path, array in arrays.items():
            np.testing.assert_array_equal(read[group][path], array)


def test_a_configuration_of_ones_own_goes_before_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs/rooms").mkdir(parents=True)
    (tmp_path / "configs/rooms/vit_dense_tiny.py").write_text("config = None")
    monkeypatch.chdir(tmp_path)
    assert start.held_name("rooms/vit_dense_tiny") is None
    assert start.held_name("rooms/vmoe_tiny") == "rooms/vmoe_tiny"


def test_a_named_configuration_without_weights_is_refused(tmp_path: Path) -> None:
    wanted = tiny.config(str(tmp_path), start_from="rooms/mlore_tiny")
    with pytest.raises(
        UserError,
        match=r"rooms/mlore_tiny, a configuration without weights: .*"
        r"rooms/vit_dense_tiny.*mlore_tiny is no finished run of it; train it first",
    ):
        start.check_named(wanted)
    folder, steps = tmp_path / "mlore_tiny", config_file.load("rooms/mlore_tiny").train.steps
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "split": "test"}) + "\n")
    start.check_named(wanted)
    with pytest.raises(UserError, match="a configuration without weights"):
        train_command.configured(
            [
                "rooms/m3vit_tiny",
                "--start-from",
                "rooms/mlore_tiny",
                "--directory",
                str(tmp_path / "none"),
            ]
        )
