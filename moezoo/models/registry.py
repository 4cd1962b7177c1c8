"""The models of the zoo by the name of their configuration."""

from __future__ import annotations

from moezoo.errors import unknown
from moezoo.models.conditional_moe import ConditionalMoEConfig
from moezoo.models.language import LanguageConfig
from moezoo.models.m3vit import M3ViTConfig
from moezoo.models.mlore import MLoREConfig
from moezoo.models.mod_squad import ModSquadConfig
from moezoo.models.smora import SMoRAConfig
from moezoo.models.soft_moa import SoftMoAConfig
from moezoo.models.taskexpert import TaskExpertConfig
from moezoo.models.vit_dense import ViTDenseConfig
from moezoo.models.vmoe import VMoEConfig

CONFIGS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        ConditionalMoEConfig,
        LanguageConfig,
        M3ViTConfig,
        MLoREConfig,
        ModSquadConfig,
        SMoRAConfig,
        SoftMoAConfig,
        TaskExpertConfig,
        ViTDenseConfig,
        VMoEConfig,
    )
}


def by_name(name: str) -> type:
    """The configuration class called `name`; raises UserError with the nearest names."""
    if name not in CONFIGS:
        raise unknown("kind of model", name, list(CONFIGS))
    return CONFIGS[name]
