"""The models of the zoo by the name of their configuration."""

from __future__ import annotations

from moezoo.errors import unknown
from moezoo.models.m3vit import M3ViTConfig
from moezoo.models.mod_squad import ModSquadConfig
from moezoo.models.multitask import MultiTaskConfig
from moezoo.models.vit_dense import ViTDenseConfig

CONFIGS: dict[str, type[MultiTaskConfig]] = {
    kind.__name__: kind for kind in (M3ViTConfig, ModSquadConfig, ViTDenseConfig)
}


def by_name(name: str) -> type[MultiTaskConfig]:
    """The configuration class called `name`; raises UserError with the nearest names."""
    if name not in CONFIGS:
        raise unknown("kind of model", name, list(CONFIGS))
    return CONFIGS[name]
