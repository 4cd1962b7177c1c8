"""Parameters and multiply-accumulates against the paper's, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moezoo.backbones.vit import ViT, ViTConfig
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.models.mlore.model import NYUD_RANKS, MLoREConfig
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.models.shared.multitask import TAM
from moezoo.models.taskexpert.model import TaskExpertConfig
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.nn import module
from moezoo.nn.heads import UpConvHead


def count(build) -> int:
    return module.count(module.abstract(build).params)


def test_deit_small_with_its_classifier():
    assert count(lambda: ViT(ViTConfig.small(), rngs=nnx.Rngs(0))) == 22_050_664


def test_deit_tiny_and_base_with_their_classifiers():
    assert count(lambda: ViT(ViTConfig.tiny(), rngs=nnx.Rngs(0))) == 5_717_416
    assert count(lambda: ViT(ViTConfig.base(), rngs=nnx.Rngs(0))) == 86_567_656


@pytest.mark.parametrize(
    ("routing", "tasks", "wanted"),
    [("single", 1, 43_383_400), ("multi_gate", 2, 43_420_264), ("multi_gate", 5, 43_530_856)],
)
def test_m3vit_small_in_its_pretraining_form(routing, tasks, wanted):
    config = M3ViTConfig.small(routing=routing)
    assert count(lambda: config.build_classifier(nnx.Rngs(0), tasks)) == wanted


def test_heads_and_training_branch():
    head = count(lambda: UpConvHead(384, 40, 4, rngs=nnx.Rngs(0)))
    assert round(head / 1e6, 2) == 2.67
    for tasks, millions in ((2, 7.7), (5, 23.6)):
        outputs = {f"t{j}": 40 for j in range(tasks)}
        level = count(lambda outputs=outputs: TAM(outputs, 256, 256, rngs=nnx.Rngs(0)))
        assert abs(level / 1e6 - millions) < 0.1


@pytest.mark.parametrize(
    ("variant", "size", "classes", "encoder", "decoder", "dense", "moe"),
    [
        ("small", (512, 512), 21, 31.75, 51.99, 83.74, 83.78),
        ("small", (480, 640), 40, 39.15, 61.30, 100.45, 100.50),
        ("base", (480, 640), 40, 129.30, 62.36, 191.66, 191.75),
    ],
)
def test_multiply_accumulates_of_tables_1_to_3(
    variant, size, classes, encoder, decoder, dense, moe
):
    tasks = {"semseg": classes}
    plain = getattr(ViTDenseConfig, variant)().macs(size, tasks)
    mixed = getattr(M3ViTConfig, variant)().macs(size, tasks)
    for value, wanted in (
        (plain.encoder, encoder),
        (plain.heads, decoder),
        (plain.total, dense),
        (mixed.total, moe),
    ):
        assert round(value / 1e9, 2) == wanted
    assert mixed.encoder == plain.encoder


def test_several_tasks_repeat_only_what_depends_on_the_task():
    tasks = {"a": 1, "b": 1, "c": 1}
    config = M3ViTConfig(depth=4)
    one, three = (config.macs((64, 64), {"a": 1}), config.macs((64, 64), tasks))
    assert three.heads == 3 * one.heads and three.routers == 3 * one.routers
    assert one.encoder < three.encoder < 3 * one.encoder
    single = M3ViTConfig(depth=4, routing="single")
    assert single.macs((64, 64), tasks).encoder == one.encoder


# 13 Taskonomy tasks: 1,000 objects, 365 scenes, and 13 channels of 16 x 16 pixels per patch.
OUTPUTS, TASKONOMY = 1000 + 365 + 13 * 256, 13


@pytest.mark.parametrize(("variant", "millions"), [("small", 23.48), ("base", 89.42)])
def test_mod_squads_dense_models(variant: str, millions: float) -> None:
    """Numbers in comments of the published code; its heads are linear, their sizes our inference.

    The totals of its MoE models (34.17 and 195.80 M) cannot be derived: with 24 heads, 16 experts
    of hidden width D and 13 routers per layer the layout "twice" gives 53.3 and 206.3 M.
    """
    config = getattr(ViTConfig, variant)()
    encoder = count(lambda: ViT(config, classes=1, rngs=nnx.Rngs(0))) - config.width - 1
    heads = (config.width + 1) * OUTPUTS + TASKONOMY * config.width
    assert round((encoder + heads) / 1e6, 2) == millions


@pytest.mark.parametrize("variant", ["small", "base"])
def test_mod_squads_encoder(variant: str) -> None:
    config = getattr(ModSquadConfig, variant)(heads=12, head_channels=1)
    tasks = {f"t{j}": 1 for j in range(TASKONOMY)}
    made = module.abstract(lambda: config.build(tasks, (224, 224), nnx.Rngs(0))).params
    d, inner, head = config.width, 2 * config.width, 2 * config.width // 12
    norms = 4 * d
    looking = 24 * 2 * d * head + (d + 1) * 2 * head + 13 * d * 24  # experts, kv, routers
    plain = (d + 1) * 3 * inner + (inner + 1) * d
    mlp = (d + 1) * 4 * d + (4 * d + 1) * d
    feeding = 16 * 2 * (d + 1) * d + 13 * d * 16
    blocks = 6 * (looking + mlp + norms) + 6 * (plain + feeding + norms)
    embed = (16 * 16 * 3 + 1) * d + d + 197 * d + 13 * d
    here = sum(module.count({"": t}) if hasattr(t, "shape") else module.count(t)
               for name, t in made.items() if name not in ("heads", "tam"))  # fmt: skip
    assert here == blocks + embed


JFT = 18_291  # classes of JFT-300M


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "patch", "last", "millions"),
    [
        ("small", 32, 0, 36.5),
        ("base", 16, None, 979.0),
        ("large", 16, 2, 843.6),
        ("huge", 14, 5, 2688.6),
        # Of the same sizes with experts in other layers.
        pytest.param("small", 32, 2, 166.7, marks=pytest.mark.claims),
        pytest.param("small", 32, None, 296.9, marks=pytest.mark.claims),
        pytest.param("base", 32, 0, 102.1, marks=pytest.mark.claims),
        pytest.param("base", 32, 2, 395.0, marks=pytest.mark.claims),
        pytest.param("base", 32, None, 980.6, marks=pytest.mark.claims),
        pytest.param("large", 16, None, 3446.0, marks=pytest.mark.claims),
        pytest.param("huge", 14, None, 7160.8, marks=pytest.mark.claims),
    ],
)
def test_vmoe_of_the_paper_in_its_pretraining_form(variant, patch, last, millions):
    """32 experts, a tanh layer before the classifier of JFT-300M, images of 224 x 224."""
    config = getattr(VMoEConfig, variant)(patch=patch, moe_last=last)
    config = replace(config, representation=config.width)
    found = count(lambda: config.build({"scene": JFT}, (224, 224), nnx.Rngs(0)))
    assert abs(found / 1e6 - millions) < 0.1, found


def products(jaxpr) -> int:
    """Multiply-accumulates of all matrix products and convolutions of a program."""
    total = 0
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            total += products(value.jaxpr) if hasattr(value, "jaxpr") else 0
        shapes = [v.aval.shape for v in (*eqn.invars[:2], *eqn.outvars)]
        if eqn.primitive.name == "dot_general":
            (inner, _), _ = eqn.params["dimension_numbers"]
            total += math.prod(shapes[2]) * math.prod(shapes[0][i] for i in inner)
        if eqn.primitive.name == "conv_general_dilated":
            total += math.prod(shapes[2]) * math.prod(shapes[1][:-1])
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"moe_last": 0},
        {"moe_last": 0, "pool": "attention", "representation": 24},
        {"top_k": 4, "dispatch": "reference"},
        {"routing": "soft", "slots": 2, "pool": "mean"},
    ],
)
def test_multiply_accumulates_of_classifiers_are_those_of_the_program(changes):
    config = VMoEConfig(width=16, depth=4, heads=2, patch=4, experts=4, mlp_ratio=2.0)
    config = replace(config, **changes)
    model = config.build({"scene": 5}, (16, 24), nnx.Rngs(0))
    made = jax.make_jaxpr(lambda x: model(x).predictions)(jnp.zeros((1, 16, 24, 3)))
    wanted = config.macs((16, 24), {"scene": 5}).total
    # The reference backend mixes the experts' outputs by one more product.
    mixing = 2 * 25 * 4 * 16 if config.dispatch == "reference" else 0
    assert products(made.jaxpr) == wanted + mixing


def test_experts_that_choose_cost_their_slots():
    choosing = VMoEConfig(routing="experts_choose", capacity_factor=1.0, experts=4)
    costs = [
        c.macs((224, 224), {"scene": 5})
        for c in (choosing, replace(choosing, routing="tokens_choose", top_k=1))
    ]
    # 197 tokens: 50 slots of each of 4 experts instead of one expert per token.
    extra = 6 * (4 * 50 - 197) * 2 * 768 * 3072
    assert costs[0].encoder - costs[1].encoder == extra and costs[0].routers == costs[1].routers


PASCAL = {"semseg": 21, "parts": 7, "saliency": 2, "normals": 3, "edge": 1}
NYUD = {"semseg": 40, "normals": 3, "edge": 1, "depth": 1}
SLOW = pytest.mark.slow
NYUD_MLORE = {"decoder_width": 768, "ranks": NYUD_RANKS, "task_rank": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "tasks", "size", "millions", "giga"),
    [
        (TaskExpertConfig.large(), PASCAL, (512, 512), 420.2, 611.9),
        (
            TaskExpertConfig.large(decoder_width=480, experts=5),
            PASCAL,
            (512, 512),
            424.4,
            636.6,
        ),
        (TaskExpertConfig.large(decoder_width=480, experts=5), NYUD, (448, 576), 411.5, 583.1),
        (TaskExpertConfig.base(decoder_width=384, experts=5), PASCAL, (512, 512), 164.0, 282.4),
        pytest.param(MLoREConfig.large(), PASCAL, (512, 512), 407.69, 826.6, marks=SLOW),
        pytest.param(
            *(MLoREConfig.large(**NYUD_MLORE), NYUD, (448, 576), 551.63, 1405.8),
            marks=pytest.mark.claims,
        ),
    ],
)
def test_decoders_on_several_levels_have_the_published_sizes(config, tasks, size, millions, giga):
    parameters = count(lambda: config.build(tasks, size, nnx.Rngs(0)))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)
    assert config.macs(size, tasks).total / 1e9 == pytest.approx(giga, rel=5e-3)


@pytest.mark.parametrize(
    "config",
    [
        TaskExpertConfig(experts=3, gate_hidden=6),
        TaskExpertConfig(experts=3, gate_hidden=6, gate="token", memory="none"),
        TaskExpertConfig(experts=2, gate="static", share_experts=True, top_k=2),
        MLoREConfig(ranks=(2, 3, 5), task_rank=4, top_k=2),
    ],
)
def test_multiply_accumulates_of_decoders_are_those_of_the_program(config):
    config = replace(config, width=16, depth=4, heads=2, patch=4, levels=2, decoder_width=8)
    tasks, size = {"semseg": 5, "depth": 1}, (16, 24)
    parts = module.abstract(lambda: config.build(tasks, size, nnx.Rngs(0)))

    def trunk_and_decoder(params, stats, image):
        model = module.merge(parts.definition, params, stats)
        levels = model.levels(image, None)
        more = () if isinstance(config, TaskExpertConfig) else (None,)
        return model.decode(levels, tuple(tasks), *more, False)[0]

    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    made = jax.make_jaxpr(trunk_and_decoder)(parts.params, parts.stats, image)
    counted = config.macs(size, tasks)
    assert products(made.jaxpr) == counted.encoder + counted.routers
    assert counted.heads == 16 * 24 * (2 * 9 * 8 * 8 + 8 * 6)
