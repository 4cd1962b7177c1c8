"""The pretrained networks on images, by what a model says that it begins with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moezoo.domains.images.pretrained import VisionTransformers
from moezoo.domains.images.pretrained_swin import SwinTransformers
from moezoo.errors import UserError
from moezoo.models.shared.config import traits
from moezoo.train.domain import Pretrained
from moezoo.train.schema import Config

# By the names of `ModelTraits.begins_with`. The first that knows a path has it; files that are
# nobody's else are the last one's, which says what is wrong with them.
KINDS: dict[str, Pretrained] = {"swin": SwinTransformers(), "vit": VisionTransformers()}


class ImageTransformers(Pretrained):
    """Vision transformers and Swin transformers, each read by its own kind."""

    what = wanted = "a pretrained vision transformer"
    has_options = True
    last_resort = True

    def knows(self, path: Path) -> bool:
        """What one of the kinds knows."""
        return any(kind.knows(path) for kind in KINDS.values())

    def look(self, path: Path) -> None:
        """See `Pretrained`."""
        _kind(path).look(path)

    def check(self, path: Path, config: Config) -> None:
        """Raise UserError where it does not fit, or the model begins with another kind."""
        kind, wanted = _kind(path), KINDS[traits(config.model).begins_with]
        if kind is not wanted:
            kind.look(path)  # whatever is wrong with the file itself comes first
            raise UserError(
                f"start_from is {path}, {kind.what}, but {config.name} can begin with "
                f"{wanted.wanted}: name another one, or take a model of that kind."
            )
        kind.check(path, config)

    def shapes(self, path: Path) -> Mapping[str, tuple[int, ...]]:
        """See `Pretrained`."""
        return _kind(path).shapes(path)

    def arrays(
        self, path: Path, config: Config, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any] | None:
        """See `Pretrained`."""
        return _kind(path).arrays(path, config, shapes)

    def left_behind(self, path: Path, config: Config) -> str:
        """See `Pretrained`."""
        return _kind(path).left_behind(path, config)


def _kind(path: Path) -> Pretrained:
    return next((kind for kind in KINDS.values() if kind.knows(path)), KINDS["vit"])
