"""Options that are legal apart and senseless together, in every system that chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moezoo import registry
from moezoo.backbones.ast import ASTConfig
from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.models.conditional_moe.model import ConditionalMoEConfig
from moezoo.models.language.model import LanguageConfig
from moezoo.models.m3vit.model import ROUTERS, M3ViTConfig
from moezoo.models.mlore.model import MLoREConfig
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.models.smora.model import SMoRAConfig
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.models.taskexpert.model import TaskExpertConfig
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.ops.routing import SELECTIONS, dense_weights
from moezoo.train.config import TrainConfig, check_losses, validate
from moezoo.train.config_file import load
from moezoo.train.config_json import from_json, to_json
from tests.train import tiny

VIT: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2, "patch": 4}
DECODER = DecoderConfig(width=8, depth=1, heads=2, groups=1)
SMORA = SMoRAConfig(decoder=DECODER, ranks=16, active=8, block=4)
SYSTEMS: dict[str, Any] = {
    "m3vit": M3ViTConfig(**VIT, experts=4, top_k=2),
    "vmoe": VMoEConfig(**VIT, experts=4, top_k=2),
    "mod_squad": ModSquadConfig(**VIT, head_experts=4, experts=4, top_k=2),
    "mlore": MLoREConfig(**VIT, levels=2, decoder_width=8, ranks=(1, 2, 3), top_k=2),
    "taskexpert": TaskExpertConfig(**VIT, levels=2, decoder_width=8, experts=3),
    "smora": SMORA,
    "mixture": replace(SMORA, update="mixture", loras=4),
    "conditional": ConditionalMoEConfig.tiny(width=8, heads=2),
    "soft_moa": SoftMoAConfig(ast=ASTConfig(width=8, heads=2)),
    "language": LanguageConfig(),
    "dense": ViTDenseConfig(**VIT),
}
NEVER = "would never learn"
ADDS_UP = ("softmax_then_top_k_renormalised", "top_k_then_softmax")
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(("m3vit", {"top_k": 1, "selection": s}, NEVER) for s in ADDS_UP),
    ("m3vit", {"top_k": 1, "selection": "sigmoid_then_top_k_renormalised"}, NEVER),
    ("m3vit", {"top_k": 1, "experts": 1}, "nothing to choose"),
    ("m3vit", {"top_k": 1, "experts": 1, "selection": ADDS_UP[0]}, "nothing to choose"),
    ("vmoe", {"top_k": 1, "selection": ADDS_UP[0]}, NEVER),
    ("vmoe", {"top_k": 1, "experts": 1}, "nothing to choose"),
    ("vmoe", {"routing": "experts_choose", "experts": 1, "top_k": 1}, "nothing to choose"),
    ("vmoe", {"routing": "experts_choose", "selection": ADDS_UP[0]}, "only where tokens choose"),
    ("vmoe", {"routing": "soft", "selection": ADDS_UP[0]}, "only where tokens choose"),
    ("vmoe", {"slots": 4}, "slots are Soft MoE's"),
    ("mod_squad", {"experts": 1, "top_k": 1}, "experts 1: there is nothing to choose"),
    ("mod_squad", {"heads": 1, "head_experts": 1}, "head_experts 1: there is nothing to choose"),
    ("mlore", {"top_k": 1, "selection": "top_k_then_softmax"}, NEVER),
    ("mlore", {"top_k": 1, "ranks": (3,)}, "nothing to choose"),
    ("taskexpert", {"top_k": 1}, NEVER),
    ("taskexpert", {"experts": 1, "memory": "none"}, "nothing to choose"),
    ("taskexpert", {"memory": "none", "memory_update": "replace"}, "only the last level"),
    (
        "taskexpert",
        {"memory": "none", "memory_update": "ema", "memory_decay": 0.0},
        "only the last level",
    ),
    ("taskexpert", {"memory_update": "ema", "memory_decay": 1.0}, "nothing would ever be written"),
    *(("smora", {"block": 8, "gate": g}, NEVER) for g in ("published", "unbiased", "softmax")),
    ("smora", {"active": 1, "block": 1}, NEVER),
    ("smora", {"active": 16, "block": 16}, NEVER),
    ("smora", {"gate": "unweighted"}, "Unknown gate"),
    ("mixture", {"top_k": 1, "selection": ADDS_UP[0]}, NEVER),
    ("mixture", {"top_k": 1, "loras": 1}, "nothing to choose"),
    ("conditional", {"experts": 1, "top_k": 1}, "nothing to choose"),
    ("conditional", {"noise": "none", "noise_std": 0.5}, "no deviation to set"),
    ("conditional", {"noise": "jitter", "noise_std": 0.5}, "no deviation to set"),
    ("conditional", {"noise": "rsample", "top_k": 8}, "all are"),
    ("soft_moa", {"update": "dense_moa", "experts": 1}, "nothing to choose"),
]
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("m3vit", {"top_k": 1}),
    ("m3vit", {"top_k": 1, "selection": "sigmoid_then_top_k"}),
    ("m3vit", {"top_k": 1, "experts": 1, "selection": "sigmoid_then_top_k"}),
    ("m3vit", {"top_k": 4, "selection": ADDS_UP[0]}),
    ("vmoe", {"top_k": 1}),
    ("vmoe", {"routing": "soft", "slots": 1, "experts": 1, "top_k": 1}),
    ("vmoe", {"moe_last": 0, "top_k": 1, "selection": ADDS_UP[0]}),
    ("mod_squad", {"heads": 1, "top_k": 1}),
    ("mod_squad", {"experts": 1, "top_k": 1, "layout": "attention"}),
    ("mlore", {"top_k": 1}),
    ("taskexpert", {"experts": 1}),
    ("taskexpert", {"top_k": 2}),
    ("taskexpert", {"memory": "none", "memory_update": "ema"}),
    ("taskexpert", {"memory_update": "replace"}),
    ("smora", {"block": 8, "gate": "score"}),
    ("smora", {"active": 1, "block": 1, "gate": "score"}),
    ("smora", {"update": "lora", "block": 8}),
    ("mixture", {"top_k": 1}),
    ("mixture", {"top_k": 1, "selection": "softmax_then_top_k"}),
    ("conditional", {"top_k": 1}),
    ("conditional", {"level": "dense", "experts": 1, "top_k": 1}),
    ("soft_moa", {"experts": 1}),
]


@pytest.mark.parametrize(("system", "changes", "says"), REFUSED)
def test_a_choice_that_could_not_be_learned_is_refused(system, changes, says) -> None:
    with pytest.raises(UserError, match=says):
        replace(SYSTEMS[system], **changes)


@pytest.mark.parametrize(("system", "changes"), ACCEPTED)
def test_what_can_be_learned_is_not(system, changes) -> None:
    replace(SYSTEMS[system], **changes)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("k", "experts"), [(1, 1), (1, 3), (3, 3)])
def test_a_router_of_m3vit_is_taught_or_refused(selection: str, k: int, experts: int) -> None:
    """Said of every selection by the configuration, and measured on the router that it makes."""
    options: dict[str, Any] = {"selection": selection, "top_k": k, "experts": experts}
    try:
        config = replace(SYSTEMS["m3vit"], **options, routing="single", router_std=1.0)
    except UserError:
        return
    router: Any = ROUTERS["single"](config, 2, nnx.Rngs(0))
    parts = module.split(router)

    def total(params: Any) -> Any:
        decided = module.merge(parts.definition, params, parts.stats)(X, Context(0))
        return jnp.sum(dense_weights(decided, experts) * jnp.arange(1.0, experts + 1))

    assert jnp.abs(jax.grad(total)(parts.params)["kernel"]).max() > 1e-3


X = jax.random.normal(jax.random.key(0), (6, VIT["width"]))

# A loss that is asked for, and why it would teach nothing; None: it does.
LOSSES: list[tuple[str, dict[str, Any], str, int | None, str | None]] = [
    ("m3vit", {}, "load", 2, "no noise.*set model.noise_std"),
    ("m3vit", {"noise_std": 1.0}, "load", 2, None),
    ("m3vit", {"noise_std": 1.0, "top_k": 4}, "load", 2, "all 4 experts"),
    ("m3vit", {}, "switch", 2, None),
    ("m3vit", {}, "mutual_information", 2, None),
    ("m3vit", {}, "mutual_information", 1, "only one task"),
    ("m3vit", {"routing": "single"}, "mutual_information", 2, "routing single"),
    ("vmoe", {}, "load", 1, None),
    ("vmoe", {"noise_std": 0.0}, "load", 1, "no noise"),
    ("vmoe", {"top_k": 4}, "load", 1, "all 4 experts"),
    ("vmoe", {}, "mutual_information", 2, "only the balance losses importance and load"),
    ("vmoe", {"routing": "experts_choose"}, "switch", 1, "no token chooses"),
    # What rooms/vmoe_tiny sets for its experts stays where they are exchanged for comparison.
    ("vmoe", {"routing": "experts_choose"}, "load", 1, None),
    ("vmoe", {"moe_last": 0}, "load", 1, None),
    ("mod_squad", {}, "load", 2, "set model.noise learned"),
    ("mod_squad", {"noise": "learned"}, "load", 2, None),
    ("mod_squad", {"noise": "learned", "top_k": 4, "layout": "mlp"}, "load", 2, "all 4 experts"),
    ("mod_squad", {}, "mutual_information", 1, "only one task"),
    ("mlore", {}, "load", 2, "only the balance loss importance"),
    ("mlore", {}, "importance", 2, None),
    ("taskexpert", {}, "load", 2, "no noise"),
    ("taskexpert", {}, "switch", 2, None),
    ("smora", {}, "load", None, "no noise"),
    ("smora", {}, "mutual_information", None, None),
    ("smora", {}, "mutual_information", 1, "only one task"),
    ("smora", {"update": "lora"}, "importance", None, "update lora has no experts"),
    ("mixture", {}, "importance", None, None),
    ("conditional", {}, "importance", 6, "level attribute"),
    ("conditional", {"level": "token"}, "importance", 6, None),
    ("conditional", {"level": "context"}, "load", 6, "only the balance losses"),
    ("conditional", {"level": "token", "location": "none"}, "switch", 6, "location none"),
    ("soft_moa", {}, "importance", 1, "chooses no experts"),
    ("language", {}, "switch", None, "no experts"),
    ("dense", {}, "load", 2, "no experts"),
]


@pytest.mark.parametrize(("system", "changes", "loss", "tasks", "says"), LOSSES)
def test_a_balance_loss_that_would_teach_nothing(system, changes, loss, tasks, says) -> None:
    train = replace(TrainConfig(), **{f"{loss}_weight": 0.02})
    model = replace(SYSTEMS[system], **changes)
    config = replace(tiny.config("."), model=model, train=train)
    if says is None:
        check_losses(config, tasks)
        return
    with pytest.raises(UserError, match=f"train.{loss}_weight is 0.02, but .*{says}.*leave it"):
        check_losses(config, tasks)
    check_losses(replace(config, train=TrainConfig()), tasks)


def test_it_is_refused_before_there_is_data() -> None:
    config = tiny.config(".")
    validate(config, 1)
    train = replace(config.train, load_weight=0.01)
    with pytest.raises(UserError, match="load_weight is 0.01, but its routers have no noise"):
        validate(replace(config, train=train), 1)
    validate(replace(config, train=train, model=tiny.model(noise_std=1.0)), 1)


def test_every_system_says_which_losses_would_teach_nothing() -> None:
    for kind in registry.SYSTEMS.all():
        assert callable(getattr(kind, "idle_losses", None)), kind


def test_a_stored_mixture_that_could_not_learn_is_not_read_as_one_that_can() -> None:
    config = load("text/smora_tiny")
    model: Any = config.model
    for top_k, says in ((1, "train it again"), (2, None)):
        made = replace(config, model=replace(model, update="mixture", top_k=top_k))
        text = to_json(made)
        assert from_json(text) == made
        values = json.loads(text)
        assert values["model"].pop("selection") == "auto"
        older = json.dumps(values)
        if says is None:
            assert from_json(older) == made
            continue
        with pytest.raises(UserError, match=says):
            from_json(older)
