"""Everything that a system trains is taught by its tasks, or is refused with its configuration.

Balance losses are left out: a router that only they move has not learned what to choose.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from moezoo.nn import module
from moezoo.ops import selection
from moezoo.train import step
from moezoo.train.config import Config
from moezoo.train.config_file import load
from moezoo.train.setup import make_builder, make_tasks
from tests.models.tiny import quick_jit

STEPS, ROWS = 3, 4
IMAGES = {"resolution": (8, 8), "train": 8, "test": 4}
SOUNDS = {"train": 8, "valid": 4, "test": 4, "frames": 48}
VIT = {"width": 16, "heads": 2, "patch": 4}
SWIN = {"width": 8, "depths": (2, 1), "heads": (1, 2), "window": 2, "patch": 2, "head_channels": 4}
DECODER = {"width": 16, "heads": 2, "groups": 1, "hidden": 16, "depth": 1}
TASKEXPERT = {"decoder_width": 8, "gate_hidden": 8, "experts": 2}
AST = {"width": 16, "heads": 2, "hidden": 16, "depth": 1}

TEXT = {"train": 60, "test": 20}

# Every tiny configuration: what shrinks its data and its model, structure left as it is.
TINY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rooms/m3vit_tiny": (IMAGES, VIT | {"head_channels": 4}),
    "rooms/mod_squad_tiny": (IMAGES, VIT | {"head_channels": 4}),
    "rooms/vit_dense_tiny": (IMAGES, VIT | {"head_channels": 4}),
    "rooms/swin_dense_tiny": (IMAGES, SWIN),
    "rooms/mtlora_tiny": (IMAGES, SWIN),
    "rooms/mtlora_vit_tiny": (IMAGES, VIT | {"head_channels": 4}),
    "rooms/dyt_tiny": (IMAGES, VIT | {"head_channels": 4}),
    "rooms/mosa_tiny": (IMAGES, VIT | {"head_channels": 4}),
    "rooms/vmoe_tiny": (IMAGES, VIT),
    "rooms/mlore_tiny": (IMAGES, VIT | {"decoder_width": 8, "ranks": (2, 3), "top_k": 1}),
    "rooms/taskexpert_tiny": (IMAGES, VIT | TASKEXPERT),
    "rooms/conditional_moe_tiny": (IMAGES, VIT | {"depth": 1}),
    "sounds/ast_tiny": (SOUNDS, AST),
    "sounds/soft_moa_tiny": (SOUNDS, AST),
    "text/adapter_fusion_adapters_tiny": (TEXT, DECODER),
    "text/adapter_fusion_tiny": (TEXT, DECODER),
    "text/alter_adapters_tiny": (TEXT, DECODER | {"depth": 4}),
    "text/alter_tiny": (TEXT, DECODER | {"depth": 4}),
    "text/mixda_domains_tiny": (TEXT, DECODER | {"depth": 4}),
    "text/mixda_tiny": (TEXT, DECODER | {"depth": 4}),
    "text/skills_tiny": (TEXT, DECODER),
    "text/smora_tiny": (TEXT, DECODER),
}
# Two of a configuration's tasks, where those are dense or on pairs: the others are like them.
TWO = ("semseg", "depth", "parts", "saliency", "scene", "caption")
# What no loss can move, as published: a constant that the norm behind it takes away again.
IDLE = (
    "heads/*/convs/[01]/bias",  # and not the last one, behind which nothing follows
    "heads/*/conv/bias",
    "decoder/*/write/conv/bias",
    "experts/*/experts/*/conv/bias",
    "mix/*/look/conv/bias",
    "*/norm_mixture/bias",
    "*/shared/bias",
    "*/router/weigh/bias",
    "*/attn/k/bias",  # taken away by the softmax over keys
)
# Likewise, of one configuration: what reaches the norm through 1x1 convolutions only.
ALSO_IDLE = {
    "rooms/swin_dense_tiny": ("heads/*/keep/*/bias", "norm/bias"),
    "rooms/mtlora_tiny": ("heads/*/keep/*/bias", "norm/bias"),
    # Fresh adapters give 0, whatever their gate; a run takes over those of its first stage.
    "text/alter_tiny": ("layers/*/mlp/decide/*",),
    "text/adapter_fusion_tiny": ("layers/*/mlp/mix/*",),
}
FACTORS = (3.0, 0.7)  # no powers of two, so that rounding is another
PARTS = ("decoder", "ast")  # the section of a model's configuration that the sizes are of


def shrunk(name: str, folder: Path, **changes: Any) -> Config:
    """The configuration of that name on little data."""
    config, (data, sizes) = load(name), TINY.get(name, (TEXT, DECODER))
    section = replace(config.data, **data)
    if hasattr(section, "data_dir"):
        section = replace(section, data_dir=str(folder))
    model: Any = config.model
    part = next((part for part in PARTS if hasattr(model, part)), None)
    if part is not None:
        own = {"frames": section.frames} if part == "ast" else {}  # type: ignore[attr-defined]
        sizes = {part: replace(getattr(model, part), **sizes, **own)}
    train = replace(config.train, batch=ROWS, steps=100)
    tasks = tuple(task for task in config.tasks if task in TWO) or config.tasks
    model = replace(model, **sizes, **changes)
    return replace(config, tasks=tasks, data=section, model=model, train=train)


def batches(config: Config) -> tuple[Any, list[Any]]:
    """The classes of the data, and a batch for each step; of pairs, one of every task together."""
    kind = config.data.domain
    source = kind.open(config, "train")
    drawn = kind.training(config, source, config.tasks, 0, range(ROWS))
    if not config.model.reads == "pairs":
        return kind.classes(config, source), [next(drawn)[1] for _ in range(STEPS)]
    shares = config.data.shares.of(config.tasks)  # type: ignore[union-attr]
    trained = {task for task, share in shares.items() if share}
    found: list[Any] = [{} for _ in range(STEPS)]
    for _, batch in drawn:
        task = next(iter(batch))
        missing = [one for one in found if task not in one]
        if missing:
            missing[0][task] = batch[task]
        if all(set(one) == trained for one in found):
            break
    return kind.classes(config, source), found


def idle_parameters(config: Config) -> tuple[set[str], set[str]]:
    """The paths of all parameters, and of those that three steps on the tasks teach nothing.

    Rounding leaves small numbers where a gradient is 0: only what grows with the loss is one.
    """
    classes, data = batches(config)
    tasks = make_tasks(config, classes)
    parts = module.split(make_builder(config, tasks)())
    groups = len(classes.groups or tasks)
    one = step.make_loss(parts.definition, tasks, {}, config.data.domain.read, groups)
    pairs = config.model.reads == "pairs"

    def loss(params: Any, stats: Any, batch: Any, key: Any, factor: float) -> Any:
        each = [{task: rows} for task, rows in batch.items()] if pairs else [batch]
        found = [one(params, stats, some, key) for some in each]
        return factor * sum(total for total, _ in found), found[0][1]

    gradient = quick_jit(jax.grad(loss, has_aux=True))
    optimiser = optax.adam(1e-2)
    params, stats = parts.params, parts.stats
    moments, learned = optimiser.init(params), set()
    for number, batch in enumerate(data):
        key = jax.random.key(number)
        grads, seen = gradient(params, stats, batch, key, 1.0)
        grown = set(module.flatten(grads))
        # By one factor alone, rounding comes close now and then.
        for factor in FACTORS:
            again = module.flatten(gradient(params, stats, batch, key, factor)[0])
            for path, leaf in module.flatten(grads).items():
                off = np.linalg.norm(again[path] - factor * leaf)
                if not off < 0.1 * factor * np.linalg.norm(leaf):
                    grown.discard(path)
        learned |= grown
        updates, moments = optimiser.update(grads, moments)
        params, stats = optax.apply_updates(params, updates), seen.stats  # type: ignore[assignment]
    paths = set(module.flatten(parts.params))
    return paths, paths - learned


SLOW = [pytest.param(n, marks=pytest.mark.slow) if n.startswith("rooms/") else n for n in TINY]


@pytest.mark.parametrize("name", SLOW)
def test_every_parameter_of_a_tiny_configuration_learns(name: str, tmp_path: Path) -> None:
    paths, idle = idle_parameters(shrunk(name, tmp_path))
    known = (*IDLE, *ALSO_IDLE.get(name, ()))
    assert idle == {path for path in paths if any(fnmatch(path, one) for one in known)}


def test_a_router_that_could_not_learn_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "ADD_UP", {})
    always_1 = {"top_k": 1, "selection": "softmax_then_top_k_renormalised"}
    config = shrunk("text/smora_tiny", tmp_path, update="mixture", **always_1)
    paths, idle = idle_parameters(config)
    assert idle == {path for path in paths if path.endswith("router/kernel")} != set()
