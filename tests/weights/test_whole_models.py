"""Checkpoints of published codes of whole models begin models that answer as those did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.pretrained import target
from moezoo.errors import UserError
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.models.mlore.model import MLoREConfig
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.train import start
from moezoo.weights import m3vit_names, mlore_names, mod_squad_names, vit
from tests.fixtures import from_manifest, load, text, under
from tests.models.tiny import filled, quick_jit
from tests.parity.test_taskexpert_decoders import compare, weights
from tests.train import tiny
from tests.weights import torch_files
from tests.weights.test_ranks import ranks_of

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
Arrays = dict[str, np.ndarray]


def config(model: Any, size: tuple[int, int], tasks: tuple[str, ...], **changes: Any) -> Any:
    made = tiny.config("unused", model=model, tasks=tasks, data=DataConfig(resolution=size))
    return replace(made, start_heads=model.heads, **changes)


def begun(path: Path, given: Any) -> tuple[module.ModuleParts, str]:
    """The configured model that begins with a file, and the sentence about it."""
    start.check_fits(path, given)
    channels = {"semseg": 5, "depth": 1, "normals": 3, "edge": 1}
    tasks = {task: channels[task] for task in target(given).tasks}
    size = given.data.domain.size(given)
    parts = filled(lambda: given.model.build(tasks, size, nnx.Rngs(0)), seed=3)
    state: Any = {"params": parts.params, "stats": parts.stats}
    state, said = start.started(path, given, jax.tree.map(jnp.asarray, state))
    return module.ModuleParts(parts.definition, state["params"], state["stats"]), said


def refusal(path: Path, given: Any) -> str:
    with pytest.raises(UserError) as raised:
        start.check_fits(path, given)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def nhwc(a: np.ndarray) -> jax.Array:
    return jnp.asarray(a.transpose(0, 2, 3, 1))


# --- M3ViT -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone() -> Arrays:
    return load("m3vit", "backbone")


def m3vit(arrays: Arrays, **changes: Any) -> M3ViTConfig:
    cfg = text(arrays["cfg_json"])
    sizes: dict[str, Any] = {
        "width": cfg["embed"], "depth": cfg["depth"], "heads": cfg["heads"], "patch": cfg["patch"],
        "mlp_ratio": float(cfg["mlp_ratio"]), "experts": cfg["experts"], "top_k": cfg["top_k"],
        "expert_ratio": float(cfg["moe_mlp_ratio"]), "head_channels": 2,
    }  # fmt: skip
    return M3ViTConfig(**(sizes | changes))


def blocks(parts: module.ModuleParts, image: jax.Array, task: int) -> list[np.ndarray]:
    def outputs(params: Any, stats: Any) -> Any:
        model = module.merge(parts.definition, params, stats)
        outs = [model.embed(image)]
        for block in model.blocks:
            outs.append(block(outs[-1], Context(task)).x_BTD)
        return outs[1:]

    return quick_jit(outputs)(parts.params, parts.stats)


def assert_answers(parts: module.ModuleParts, arrays: Arrays, order: tuple[int, ...]) -> None:
    """The recorded tokens after every block, for each of the model's tasks the file's."""
    for task, theirs in enumerate(order):
        outs = blocks(parts, nhwc(arrays["image"]), task)
        given = {i: f"task{theirs}/out{i}" for i in range(len(outs))}
        given = {i: name for i, name in given.items() if name in arrays}
        assert len(given) == 3
        for i, name in given.items():
            np.testing.assert_allclose(outs[i], arrays[name], **CLOSE)


def decoders(tasks: tuple[str, ...], width: int) -> Arrays:
    """The first normalisation of these tasks' heads, which tells the tasks, and a counter."""
    made: Arrays = {}
    for task in tasks:
        made[f"decoders.{task}.norm.weight"] = np.full(width, 2, np.float32)
        made[f"decoders.{task}.syncbn_fc_0.num_batches_tracked"] = np.array(7, np.int64)
    return made


@pytest.mark.parametrize("entry", ["", "state_dict"])
def test_an_encoder_of_m3vit(entry: str, backbone: Arrays, tmp_path: Path) -> None:
    path = torch_files.write(tmp_path / "m3vit.pth", under(backbone, "w/"), entry, "module.")
    parts, said = begun(path, config(m3vit(backbone), (32, 32), ("semseg", "depth")))
    assert_answers(parts, backbone, (0, 1))
    assert "0 of its arrays have no place here" in said
    assert ("read from its entry 'state_dict'" in said) == bool(entry)
    assert "routers are taken in the order of these tasks: semseg, depth" in said


def test_files_of_all_ranks_are_one_checkpoint(backbone: Arrays, tmp_path: Path) -> None:
    folder = ranks_of(under(backbone, "w/"), tmp_path / "checkpoint.pth.tar", 2)
    parts, said = begun(folder, config(m3vit(backbone), (32, 32), ("semseg", "depth")))
    assert_answers(parts, backbone, (0, 1))
    assert "0 of its arrays have no place here" in said


@pytest.mark.parametrize(
    ("theirs", "ours", "order"),
    [
        (("semseg", "depth"), ("semseg", "depth"), (0, 1)),
        (("depth", "semseg"), ("semseg", "depth"), (1, 0)),
        (("semseg", "depth"), ("depth",), (1,)),
    ],
)
def test_routers_follow_the_names_of_tasks(theirs, ours, order, backbone: Arrays, tmp_path: Path):
    state = {f"backbone.{name}": a for name, a in under(backbone, "w/").items()}
    state |= decoders(theirs, state["backbone.cls_token"].shape[-1])
    path = torch_files.write(tmp_path / "m3vit.pth", state, "model", "module.")
    given = config(m3vit(backbone), (32, 32), ours)
    parts, said = begun(path, given)
    assert_answers(parts, backbone, order)
    assert "of no use for these tasks, and ignored: heads/" in said
    assert "order of these tasks" not in said and "syncbn" not in said
    head = module.flatten(parts.params)["heads/depth/norm/scale"]
    assert not np.allclose(head, 2)  # a head is taken whole or not at all


def test_routers_of_other_tasks(backbone: Arrays, tmp_path: Path) -> None:
    state = {f"backbone.{name}": a for name, a in under(backbone, "w/").items()}
    state |= decoders(("semseg", "depth"), 32)
    path = torch_files.write(tmp_path / "m3vit.pth", state)
    given = config(m3vit(backbone), (32, 32), ("semseg", "normals"))
    sentence = refusal(path, given)
    assert (
        "router/kernel is for the tasks semseg, depth, the model's for semseg, normals" in sentence
    )
    assert "--start_without blocks/1/mlp/router blocks/3/mlp/router" in sentence
    without = ("blocks/*/mlp/router",)
    parts, said = begun(path, replace(given, start_without=without))
    assert "fresh are 2 of routers" in said and "left out as asked: blocks/*/mlp/router" in said
    flat = module.flatten(parts.params)
    experts = state["backbone.blocks.1.mlp.experts.htoh4.weight"]
    np.testing.assert_array_equal(flat["blocks/1/mlp/experts/fc1/kernel"], experts.swapaxes(1, 2))


def test_a_single_router_begins_all(backbone: Arrays, tmp_path: Path) -> None:
    """As the published code begins with its pretrained encoder, whose classifier stays behind."""
    state = under(backbone, "w/")
    for name in [name for name in state if ".gate.1." in name]:
        del state[name]
    state = {name.replace(".gate.0.", ".gate."): a for name, a in state.items()}
    state |= {"head.weight": np.ones((9, 32), "f"), "head.bias": np.ones(9, "f")}
    path = torch_files.write(tmp_path / "pretrained.pth", state, "state_dict", "module.")
    parts, said = begun(path, config(m3vit(backbone), (32, 32), ("semseg", "normals")))
    assert_answers(parts, backbone, (0, 0))
    assert "used only in pre-training, and ignored: head" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.1.mlp.gate.1.w_gate", "its blocks/1/mlp/router/kernel is"),
        ("blocks.3.mlp.gate.0.w_gate", "is there for .1. only"),
        ("blocks.3.mlp.experts.h4toh.bias", "it lacks blocks/3/mlp/experts/fc2/bias"),
        ("cls_token", "it lacks cls_token"),
    ],
)
def test_what_is_missing_is_named(name: str, words: str, backbone: Arrays, tmp_path: Path) -> None:
    state = under(backbone, "w/")
    del state[name]
    path = torch_files.write(tmp_path / "m3vit.pth", state)
    sentence = refusal(path, config(m3vit(backbone), (32, 32), ("semseg", "depth")))
    with pytest.raises(UserError, match=words):
        raise UserError(sentence)


def test_other_sizes_and_what_is_too_much(backbone: Arrays, tmp_path: Path) -> None:
    state = under(backbone, "w/")
    path = torch_files.write(tmp_path / "m3vit.pth", state)
    other = m3vit(backbone, experts=2, expert_ratio=2.0)
    sentence = refusal(path, config(other, (32, 32), ("semseg", "depth")))
    assert "--model.experts 4" in sentence and "--model.expert_ratio 1.0" in sentence
    more = state | {"blocks.1.mlp.extra": np.ones(3, "f")}
    path = torch_files.write(tmp_path / "more.pth", more)
    sentence = refusal(path, config(m3vit(backbone), (32, 32), ("semseg", "depth")))
    assert "backbone.blocks.1.mlp.extra, for which there is no place" in sentence


def test_positions_of_a_grid_that_is_no_square(backbone: Arrays, tmp_path: Path) -> None:
    state = under(backbone, "w/")
    rng = np.random.default_rng(0)
    state["pos_embed"] = rng.normal(size=(1, 1 + 16, 32)).astype(np.float32)
    path = torch_files.write(tmp_path / "m3vit.pth", state)
    given = config(m3vit(backbone), (16, 64), ("semseg", "depth"))  # 2 x 8 patches, not 4 x 4
    parts, _ = begun(path, given)
    found = module.flatten(parts.params)["pos_embed"]
    np.testing.assert_array_equal(found, state["pos_embed"])
    state["pos_embed"] = state["pos_embed"][:, :13]
    path = torch_files.write(tmp_path / "small.pth", state)
    assert "positions of 13 tokens, which are no square grid" in refusal(path, given)


def test_m3vit_as_a_whole(tmp_path: Path) -> None:
    """Trunk, routers and heads with their statistics: nothing is fresh, nothing left over."""
    arrays = load("m3vit", "train_step")
    cfg, state = text(arrays["cfg_json"]), from_manifest(arrays["manifest_json"])
    assert list(state) == sorted(state) and cfg["tasks"] == ["semseg", "depth"]
    channels = state["decoders.semseg.conv_0.weight"].shape[0]
    hidden = state["backbone.blocks.1.mlp.experts.htoh4.weight"].shape[1]
    model = M3ViTConfig(
        width=cfg["embed"], depth=cfg["depth"], heads=cfg["heads"], patch=cfg["patch"],
        mlp_ratio=state["backbone.blocks.0.mlp.fc1.weight"].shape[0] / cfg["embed"],
        experts=cfg["experts"], top_k=cfg["top_k"], expert_ratio=hidden / cfg["embed"],
        head_channels=channels,
    )  # fmt: skip
    given = config(model, tuple(cfg["img_size"]), ("semseg", "depth"))
    classes = given.data.domain.known_classes().counts["semseg"]
    path = torch_files.write(tmp_path / "m3vit.pth", state, "state_dict", "module.")
    said = begun_with(path, given, {"semseg": classes, "depth": 1})
    assert "ignored: heads/semseg" in said and "fresh are heads/semseg" in said
    for leaf in ("weight", "bias"):  # as many classes as this data set has
        name = f"decoders.semseg.conv_4.{leaf}"
        state[name] = np.resize(state[name], (classes, *state[name].shape[1:]))
    turned = {name: state[name] for name in sorted(state, reverse=True)}  # semseg comes first
    for name, ordered in (("sorted", state), ("published", turned)):
        path = torch_files.write(tmp_path / f"{name}.pth", ordered, "state_dict", "module.")
        said = begun_with(path, given, {"semseg": classes, "depth": 1}, state)
        assert "fresh are none" in said and "0 of its arrays have no place" in said
        assert ("order of these tasks" in said) == (name == "sorted")
    fewer = config(model, tuple(cfg["img_size"]), ("depth",))
    assert "router/kernel is for the tasks depth, semseg, the model's for depth" in refusal(
        tmp_path / "sorted.pth", fewer
    )
    start.check_fits(tmp_path / "published.pth", fewer)


@pytest.mark.parametrize("turned", [False, True])
def test_branches_between_tasks(turned: bool, tmp_path: Path) -> None:
    """They join the features of tasks in their order: with another one they stay behind."""
    model = M3ViTConfig(
        width=8, depth=2, heads=2, patch=8, experts=2, top_k=2, head_channels=4, tam=(0,)
    )
    given = config(model, (32, 32), ("semseg", "depth"))
    tasks = {"semseg": given.data.domain.known_classes().counts["semseg"], "depth": 1}
    parts = filled(lambda: model.build(tasks, (32, 32), nnx.Rngs(0)), seed=5)
    flat = module.flatten(parts.params) | module.flatten(parts.stats)
    state, unknown = m3vit_names.to_reference({n: np.asarray(a) for n, a in flat.items()})
    assert not unknown and any(name.startswith("tam_model0.") for name in state)
    state = {name: state[name] for name in sorted(state, reverse=True)}
    if turned:
        own = {n: a for n, a in state.items() if n.startswith("decoders.depth")}
        state = own | state
    path = torch_files.write(tmp_path / "m3vit.pth", state)
    said = begun_with(path, given, tasks, None if turned else state)
    assert ("ignored: tam/0" in said) == turned
    assert "fresh are none" in said or turned


def test_names_of_an_encoder_alone() -> None:
    for name, wanted in {
        "module.blocks.1.norm1.bias": "backbone.blocks.1.norm1.bias",
        "backbone.cls_token": "backbone.cls_token",
        "module.decoders.sal.norm.bias": "decoders.saliency.norm.bias",
        "tam_model1.layers3.human_parts.0.bias": "tam_model1.layers3.parts.0.bias",
    }.items():
        assert m3vit_names.whole(name) == wanted


def begun_with(path: Path, given: Any, tasks: dict[str, int], state: Arrays | None = None) -> str:
    start.check_fits(path, given)
    size = given.data.domain.size(given)
    parts = filled(lambda: given.model.build(tasks, size, nnx.Rngs(0)), seed=3)
    before: Any = {"params": parts.params, "stats": parts.stats}
    after, said = start.started(path, given, jax.tree.map(jnp.asarray, before))
    if state is not None:
        flat = module.flatten(after["params"]) | module.flatten(after["stats"])
        wanted = m3vit_names.from_m3vit(state).arrays
        assert wanted.keys() == flat.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(flat[name], array, err_msg=name)
    return said


# --- MLoRE -------------------------------------------------------------------------------------


def mlore(arrays: Arrays, path: Path) -> tuple[Any, Arrays]:
    """The fixture's model as a configuration, and its weights in a file."""
    height, width, patch, channels, depth, heads, inner, rank, k, after = arrays["cfg"].tolist()
    model = MLoREConfig(
        width=channels, depth=depth, heads=heads, patch=patch, levels=len(arrays["route1"]),
        decoder_width=inner, ranks=tuple(arrays["rank_list"].tolist()), task_rank=rank, top_k=k,
        selection="top_k_then_softmax" if after else "softmax_then_top_k",
    )  # fmt: skip
    state = weights(arrays)
    given = config(model, (height, width), tuple(arrays["tasks"].tolist()))
    torch_files.write(path, state, "model")
    return given, state


def test_mlore_array_by_array(tmp_path: Path) -> None:
    path = tmp_path / "mlore.pth"
    given, state = mlore(load("taskexpert", "mlore_tiny"), path)
    own = mlore_names.from_mlore(state).arrays
    wanted = replaced_heads(target(given), own)
    found = vit.trunk(path, wanted)
    assert found.pop("pos_embed").shape[1] == own["pos_embed"].shape[1] + 1  # a class token's
    assert found.keys() == own.keys() - {"pos_embed"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, own[name], err_msg=name)
    lacking = {n: a for n, a in state.items() if "lora_list_1.0.W.weight" not in n}
    torch_files.write(path, lacking)
    with pytest.raises(UserError, match="it lacks first/0/experts/experts/0/down/kernel"):
        vit.trunk(path, wanted)


def replaced_heads(wanted: vit.Target, own: Arrays) -> vit.Target:
    """The target for as many classes as the weights have."""
    heads = {path: own[path].shape for path in own if path.startswith("heads/")}
    return wanted._replace(shapes={**wanted.shapes, **heads})


@pytest.mark.slow
def test_mlore_as_a_whole(tmp_path: Path) -> None:
    arrays, path = load("taskexpert", "mlore_tiny"), tmp_path / "mlore.pth"
    parts, said = begun(path, mlore(arrays, path)[0])
    assert "read from its entry 'model'" in said

    def run(params: Any, stats: Any, image: jax.Array) -> Any:
        return module.merge(parts.definition, params, stats)(image).predictions

    found = quick_jit(run)(parts.params, parts.stats, nhwc(arrays["input"]))
    for task in arrays["tasks"].tolist():
        compare(np.asarray(found[task]), arrays, f"pred_{task}", (5, 7))
    assert "0 of its arrays have no place here" in said and "fresh are none" in said


# --- Mod-Squad ---------------------------------------------------------------------------------


def squad_file() -> Arrays:
    """A whole model of the code's names: its recorded blocks, and a trunk around them."""
    rng = np.random.default_rng(1)
    state = {
        f"blocks.0.{n}": a for n, a in under(load("modsquad", "block_attn_moe"), "param/").items()
    }
    state |= {
        f"blocks.1.{n}": a for n, a in under(load("modsquad", "block_ffn_moe"), "param/").items()
    }
    width = state["blocks.0.norm1.weight"].shape[0]
    tasks = sum(name.startswith("blocks.0.attn.q_proj.f_gate.") for name in state)
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 5, width), "patch_embed.proj.bias": (width,),
        "patch_embed.proj.weight": (width, 3, 8, 8), "norm.weight": (width,), "norm.bias": (width,),
        "fc_norm.weight": (width,), "task_embedding": (1, tasks, width),
        "task_heads.0.1.weight": (64, width), "blocks.1.mlp.task_gate_freq": (tasks, 4),
    }  # fmt: skip
    return state | {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def squad(state: Arrays, **changes: Any) -> ModSquadConfig:
    experts, width, inner = state["blocks.0.attn.q_proj.experts.w"].shape
    sizes: dict[str, Any] = {
        "width": width, "depth": 2, "heads": 2, "patch": 8, "mlp_ratio": 4.0,
        "head_experts": experts, "head_ratio": 2 * inner / width, "top_k": 2,
        "experts": state["blocks.1.mlp.experts.w"].shape[0],
        "expert_ratio": state["blocks.1.mlp.experts.w"].shape[2] / width,
    }  # fmt: skip
    return ModSquadConfig(**(sizes | changes))


TASKS = ("semseg", "depth", "normals", "edge")


def test_a_whole_model_of_mod_squad(tmp_path: Path) -> None:
    state = squad_file()
    tasks = TASKS[: state["task_embedding"].shape[1]]
    path = torch_files.write(tmp_path / "squad.pth", state, "model", "module.")
    parts, said = begun(path, config(squad(state), (16, 16), tasks))
    assert "used only in pre-training, and ignored: fc_norm, task_heads.0.1;" in said
    assert "routers are taken in the order of these tasks: semseg, " in said
    flat = {**module.flatten(parts.params)}
    for i, half in ((0, "attn.q_proj"), (1, "mlp")):
        kernel = flat[f"blocks/{i}/{half.split('.')[0]}/router/kernel"]
        for task in range(len(tasks)):
            theirs = state[f"blocks.{i}.{half}.f_gate.{task}.0.weight"]
            np.testing.assert_array_equal(kernel[task], theirs.T)
    np.testing.assert_array_equal(flat["task_bias/bias"], state["task_embedding"][0])
    for ours, theirs in (
        ("blocks/0/attn/experts/query/kernel", "blocks.0.attn.q_proj.experts.w"),
        ("blocks/0/attn/experts/out/kernel", "blocks.0.attn.q_proj.output_experts.w"),
        ("blocks/1/mlp/experts/fc1/bias", "blocks.1.mlp.experts.b"),
        ("blocks/1/mlp/experts/fc2/kernel", "blocks.1.mlp.output_experts.w"),
    ):
        np.testing.assert_array_equal(flat[ours], state[theirs])
    # And back: every array of the trunk under its own name again, nothing else but heads left.
    back = mod_squad_names.to_reference({k: np.asarray(v) for k, v in flat.items()})
    beyond = mod_squad_names.BEYOND
    # Every head here has a norm of its own, there is one before all.
    trunk = {name for name in state if not beyond.fullmatch(name)}
    assert set(back.arrays) == trunk - {"norm.weight", "norm.bias"}
    for name, array in back.arrays.items():
        np.testing.assert_array_equal(array, state[name])
    assert back.unknown and all(name.startswith("heads/") for name in back.unknown)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.1.mlp.f_gate.0.0.weight", "blocks.1.mlp.f_gate is there for"),
        ("blocks.1.mlp.output_experts.b", "it lacks blocks/1/mlp/experts/fc2/bias"),
        ("blocks.0.attn.kv_proj.0.bias", "it lacks blocks/0/attn/kv/bias"),
        ("task_embedding", "it lacks task_bias/bias"),
    ],
)
def test_what_a_mod_squad_lacks_is_named(name: str, words: str, tmp_path: Path) -> None:
    state = squad_file()
    tasks = TASKS[: state["task_embedding"].shape[1]]
    del state[name]
    path = torch_files.write(tmp_path / "squad.pth", state)
    assert words in refusal(path, config(squad(state), (16, 16), tasks))


def test_a_mod_squad_of_fewer_tasks_or_with_more(tmp_path: Path) -> None:
    state = squad_file()
    tasks = TASKS[: state["task_embedding"].shape[1]]
    path = torch_files.write(tmp_path / "squad.pth", state)
    fewer = refusal(path, config(squad(state), (16, 16), tasks[:-1]))
    assert "router/kernel is [" in fewer
    state["blocks.0.attn.extra"] = np.ones(3, np.float32)
    path = torch_files.write(tmp_path / "more.pth", state)
    more = refusal(path, config(squad(state), (16, 16), tasks))
    assert "blocks.0.attn.extra, for which there is no place" in more


@pytest.mark.parametrize(
    "more",
    [
        "blocks.1.mlp.f_gate.00.0.weight",
        "blocks.1.mlp.f_gate.\u0660.0.weight",
        "module.norm.weight",
    ],
)
def test_second_names_of_the_same_are_refused(more: str, tmp_path: Path) -> None:
    state = squad_file()
    tasks = TASKS[: state["task_embedding"].shape[1]]
    like = more.removeprefix("module.") if "norm" in more else "blocks.1.mlp.f_gate.0.0.weight"
    path = torch_files.write(tmp_path / "squad.pth", state | {more: state[like] + 1})
    sentence = refusal(path, config(squad(state), (16, 16), tasks))
    assert "two arrays for norm.weight" in sentence or "for which there is no place" in sentence


def test_odd_arrays_of_a_mod_squad_get_a_sentence(tmp_path: Path) -> None:
    state = squad_file()
    given = config(squad(state), (16, 16), TASKS[: state["task_embedding"].shape[1]])
    for name, array, says in (
        ("task_embedding", np.concatenate([state["task_embedding"]] * 2), "not one row for every"),
        ("blocks.1.mlp.f_gate.0.0.weight", np.ones((3, 2), "f"), "other shapes for some tasks"),
        ("pos_embed", np.float32(3.0), "pos_embed"),
    ):
        path = torch_files.write(tmp_path / "odd.pth", state | {name: array})
        assert says in refusal(path, given)
