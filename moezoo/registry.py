"""What there is, by name: the systems and the domains, each one line; imported when asked for.

Configurations are stored with the names of their classes. Here those names lead to modules, and
what somebody defines outside of the package is made known with `learn`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from moezoo.errors import UserError, unknown


class Registry:
    """Classes by name. `places` says in which module of this package each one is.

    what: how one of them is called in errors.
    """

    def __init__(self, what: str, places: dict[str, str]):
        self.what, self.places = what, places
        self.learned: dict[str, type] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names that are known now."""
        return (*self.places, *(name for name in self.learned if name not in self.places))

    def by_name(self, name: str) -> type:
        """The class; UserError with the nearest names for one that is not known."""
        if name in self.places:
            return getattr(import_module(f"moezoo.{self.places[name]}"), name)
        if name in self.learned:
            return self.learned[name]
        raise unknown(self.what, name, list(self.names))

    def all(self) -> tuple[type, ...]:
        """Every class; imports all of their modules."""
        return tuple(self.by_name(name) for name in self.names)

    def learn(self, kind: type) -> None:
        """Make a class known that does not come with the package.

        Raises UserError where one of the package's has its name.
        """
        name = kind.__name__
        if name in self.places and kind is not self.by_name(name):
            raise UserError(
                f"The {self.what}'s class is called {name}, as one of the zoo is: rename it, "
                "because a run's folder knows its classes by name."
            )
        self.learned[name] = kind


# The configuration class of every system.
SYSTEMS = Registry(
    "model",
    {
        "ALTERConfig": "models.alter.model",
        "AdapterFusionConfig": "models.adapter_fusion.model",
        "CPolyConfig": "models.cpoly.model",
        "ConditionalMoEConfig": "models.conditional_moe.model",
        "DyTConfig": "models.dyt.model",
        "LanguageConfig": "models.language.model",
        "M3ViTConfig": "models.m3vit.model",
        "MeteoRAConfig": "models.meteora.model",
        "MoCLEConfig": "models.mocle.model",
        "MLoREConfig": "models.mlore.model",
        "MTLoRAConfig": "models.mtlora.model",
        "MTLoRAViTConfig": "models.mtlora.model",
        "MixDAConfig": "models.mixda.model",
        "ModSquadConfig": "models.mod_squad.model",
        "MoSAConfig": "models.mosa.model",
        "PhatgooseConfig": "models.phatgoose.model",
        "PolyConfig": "models.polytropon.model",
        "SMoRAConfig": "models.smora.model",
        "SoftMoAConfig": "models.soft_moa.model",
        "SwinDenseConfig": "models.swin_dense.model",
        "TaskExpertConfig": "models.taskexpert.model",
        "ViTDenseConfig": "models.vit_dense.model",
        "VMoEConfig": "models.vmoe.model",
    },
)
# The class of every domain's `data` section.
DOMAINS = Registry(
    "data section",
    {
        "DataConfig": "domains.images.domain",
        "TextDataConfig": "domains.text.domain",
        "AudioDataConfig": "domains.audio.domain",
        "PairsDataConfig": "domains.pairs.domain",
    },
)
# Which module reads an export's input of this name (`deploy.runtime.load.Reader`). Never one of the
# export's own folder, which is a stranger's.
READERS = {"image": "moezoo.domains.images.runtime", "audio": "moezoo.domains.audio.runtime"}

# Modules whose `cutter(folder)` gives what cuts one task out of a folder in a way of its own
# (`deploy.cutter.Cutter`), or None where the folder is not theirs.
# The first that answers.
CUTTERS = ("moezoo.domains.text.rank_pruning", "moezoo.domains.text.pruning")


def cutter(folder: Any) -> Any:
    """What cuts one task out of this folder in a way of its own; None: nobody does."""
    found = (import_module(name).cutter(folder) for name in CUTTERS)
    return next((own for own in found if own is not None), None)


# Modules whose `exporters(config)` gives by task who makes its path where no export is made of
# paths, or None where the configuration is not theirs.
PATHS = ("moezoo.domains.text.paths",)


def exporters(config: Any) -> Any:
    """By task what its path reads and is scored on (`deploy.exporter.Exporter`).

    Raises UserError for a run of which no path can be cut.
    """
    found = (import_module(name).exporters(config) for name in PATHS)
    own = next((one for one in found if one is not None), None)
    return own or dict.fromkeys(config.tasks, config.data.domain.exports(config))


def reader(name: str) -> Any:
    """The module that reads inputs of this name; UserError where none is known."""
    if name not in READERS:
        raise unknown("kind of input", name, list(READERS))
    try:
        return import_module(READERS[name])
    except ImportError as error:
        raise UserError(
            f"The module {READERS[name]}, which is to read inputs called {name}, cannot be "
            f"imported ({error}): give learn_reader its dotted name."
        ) from error


def learn_reader(name: str, module: str) -> None:
    """Make the module known, by its dotted name, that reads exports' inputs of this name.

    Raises UserError where another one does already.
    """
    if READERS.setdefault(name, module) != module:
        raise UserError(
            f"Inputs called {name} are read by {READERS[name]}: give yours another name."
        )


def default_data() -> Any:
    """The `data` section of a configuration that names none: rendered rooms."""
    return DOMAINS.by_name("DataConfig")()
