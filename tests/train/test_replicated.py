"""No large parameter is copied to every device by accident: what is, is known here, with a reason.

One configuration of every system, at its published width where there is one; a few layers say as
much as all.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import pytest
from flax import nnx

from moezoo import registry
from moezoo.nn import module
from moezoo.train import config as configs
from moezoo.train import placement, setup
from moezoo.train.mesh import make_mesh
from moezoo.train.schema import MeshConfig

LIMIT = 2**20  # bytes
FILES = ["--data.train_file", "a.jsonl", "--data.test_file", "b.jsonl"]
# By system: a configuration, options.
LARGE = {
    "AdapterFusionConfig": ("text/adapter_fusion_tiny", []),
    "ConditionalMoEConfig": ("rooms/conditional_moe_base", []),
    "ALTERConfig": ("text/alter_tiny", []),
    "CPolyConfig": ("text/cpoly_tiny", []),
    "DyTConfig": ("rooms/dyt_tiny", []),
    "MeteoRAConfig": ("text/meteora_tiny", []),
    "MixDAConfig": ("text/mixda_tiny", []),
    "MoCLEConfig": ("text/mocle_tiny", []),
    "MoSAConfig": ("rooms/mosa_tiny", []),
    "MTLoRAConfig": ("rooms/mtlora_tiny", []),
    "MTLoRAViTConfig": ("rooms/mtlora_vit_tiny", []),
    "PhatgooseConfig": ("text/phatgoose_tiny", []),
    "LanguageConfig": ("text/base_tiny", ["--model.decoder.vocabulary", "32000"]),
    "M3ViTConfig": ("pascal/m3vit_small", []),
    "MLoREConfig": ("pascal/mlore_l", []),
    "ModSquadConfig": (
        "rooms/mod_squad_tiny",
        ["--model.width", "768", "--model.heads", "12", "--model.head_experts", "24"],
    ),
    "PolyConfig": ("text/polytropon_tiny", []),
    "SMoRAConfig": ("text/smora_qwen25_7b", [*FILES, "--model.decoder.depth", "2"]),
    "SoftMoAConfig": ("sounds/soft_moa_esc50", []),
    "SwinDenseConfig": ("rooms/swin_dense_tiny", ["--model.width", "96"]),
    "TaskExpertConfig": ("pascal/taskexpert_l", []),
    "ViTDenseConfig": ("rooms/vit_dense_tiny", ["--model.width", "768", "--model.heads", "12"]),
    "VMoEConfig": ("jft/vmoe_h14", ["--model.depth", "2"]),
}
# Why these may be: by how the path ends.
KNOWN = {
    r"pos_embed": "added to every token, never multiplied: one table of a few MB",
    r"experts/fc[12]/bias": "stacks of biases are split over expert, where there is that axis",
    r"update/(down|up)": "factors of a LoRA: tens of ranks beside matrices of thousands",
}


ENDS = rf"(^|/)({'|'.join(KNOWN)})$"


def shapes(system: str) -> Any:
    """The shapes of its parameters."""
    name, words = LARGE[system]
    config = configs.load(name, words)
    assert type(config.model).__name__ == system
    model: Any = config.model
    if system == "SMoRAConfig":  # the data's example needs a tokenizer
        size = config.data.domain.size(config)
        return module.abstract(
            lambda: model.build({"lm": model.decoder.vocabulary}, size, nnx.Rngs(0))
        ).params
    _, classes = config.data.domain.example(config)
    tasks = setup.make_tasks(config, classes)
    return module.abstract(setup.make_builder(config, tasks)).params


def test_every_system_is_looked_at() -> None:
    assert set(LARGE) == set(registry.SYSTEMS.places)


@pytest.mark.slow
@pytest.mark.parametrize("system", LARGE)
def test_what_falls_through_to_replication(system: str) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params = shapes(system)
    found = placement.shardings(mesh, params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    copied = {
        placement.path_name(path): math.prod(leaf.shape) * leaf.dtype.itemsize
        for (path, leaf), place in zip(leaves, jax.tree.leaves(found), strict=True)
        if place.is_fully_replicated
    }
    large = {path: size for path, size in copied.items() if size > LIMIT}
    unknown = {path: s for path, s in large.items() if not re.search(ENDS, path)}
    assert not unknown, f"{system}: split these, or say in KNOWN why not"
