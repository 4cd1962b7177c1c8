"""The models of the zoo by the name of their configuration."""

from __future__ import annotations

from moezoo.errors import UserError, unknown
from moezoo.models.conditional_moe.model import ConditionalMoEConfig
from moezoo.models.language.model import LanguageConfig
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.models.mlore.model import MLoREConfig
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.models.smora.model import SMoRAConfig
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.models.taskexpert.model import TaskExpertConfig
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.models.vmoe.model import VMoEConfig

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


def learn(kind: type) -> None:
    """Make a model's configuration class known that does not come with the zoo.

    Raises UserError where one of the zoo's has its name.
    """
    known = CONFIGS.setdefault(kind.__name__, kind)
    if known is not kind and known.__module__.startswith("moezoo."):
        raise UserError(
            f"The model's class is called {kind.__name__} like one of the zoo: give it another "
            "name, by which it can be found again."
        )
    CONFIGS[kind.__name__] = kind
