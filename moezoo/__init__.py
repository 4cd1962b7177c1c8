"""Moezoo: a mixture-of-experts model zoo for multi-task learning on JAX.

    import moezoo

    moezoo.list_models(task="depth")
    model = moezoo.load("rooms/m3vit_tiny")     # a name, a run, an export, a Hugging Face decoder
    predictions = model(photos)                 # {"depth": metres, "semseg": classes, ...}
    model.task_path("depth", keep=4).export("exports/depth")

    model = moezoo.create("m3vit_small", tasks={"depth": 1, "semseg": 14}, image_size=(224, 224))
    model = moezoo.train("rooms/m3vit_tiny", train={"steps": 200}, name="short")

Axis letters, the same in the whole zoo (suffixes of array names, lower-case in einsum strings):

    B batch              T tokens of one example   N tokens of the whole batch (B*T)
    D model width        F hidden width            E experts
    K experts per token  C capacity per expert     S slots per expert (soft routing)
    R rank               H heads                   G groups
    J tasks              A attributes              L layers          P patches
    V vocabulary

Floors: a file imports only from floors below its own.

    1 ops   2 nn   3 backbones   4 models, tasks, data, weights   5 train   6 deploy   7 planning
    8 domains   9 bench, front   10 cli
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import moezoo.train as _train

if TYPE_CHECKING:
    from moezoo.front.build import create, load, streamed, train
    from moezoo.front.catalogue import list_models

# Imported when asked for: `import moezoo` alone costs nothing, JAX takes a second.
__version__ = "0.1.0"
_PLACES = {
    "create": "moezoo.front.build",
    "list_models": "moezoo.front.catalogue",
    "load": "moezoo.front.build",
    "streamed": "moezoo.front.build",
}
__all__ = ["create", "list_models", "load", "streamed", "train"]


class _Trainer(ModuleType):
    """The package `moezoo.train`, which can also be called: it is the function of that name.

    Python binds a package to its parent's attribute whenever a part of it is imported, so a
    function called `train` beside it would be there at some times and not at others.
    """

    def __call__(self, config: Any, **changes: Any) -> Any:
        """See `moezoo.front.build.train`."""
        return import_module("moezoo.front.build").train(config, **changes)


sys.modules[_train.__name__].__class__ = _Trainer


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'moezoo' has no attribute '{name}'")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
