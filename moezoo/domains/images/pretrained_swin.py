"""Runs on images that start from a pretrained Swin transformer: does it fit, and what would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moezoo.domains.images.pretrained import OURS, model_shapes, words
from moezoo.errors import UserError
from moezoo.train.domain import Pretrained
from moezoo.train.schema import Config
from moezoo.weights import swin
from moezoo.weights.swin import SwinSource

HEADS = "heads/"


class SwinTransformers(Pretrained):
    """Files of timm and of Microsoft's code, and folders of transformers and timm."""

    what = wanted = "a pretrained Swin transformer"
    has_options = True

    def knows(self, path: Path) -> bool:
        """Files and folders with one's arrays; a damaged file is nobody's here."""
        try:
            return swin.is_swin(path)
        except UserError:
            return False

    def look(self, path: Path) -> None:
        """Raise UserError for files of another form, and for damaged ones."""
        swin.source(path)

    def check(self, path: Path, config: Config) -> None:
        """Raise UserError if weights and model do not fit together, with the options that help."""
        source = swin.source(path)
        if config.start_heads is not None:
            raise UserError("start_heads is for vision transformers: a Swin's arrays tell its own.")
        wrong = swin.misfits(source, _trunk(model_shapes(config)), config.start_without)
        if wrong:
            raise UserError(
                f"'{path}' does not fit the model: {swin.told(wrong)}{_way(source, config)}"
            )

    def shapes(self, path: Path) -> Mapping[str, tuple[int, ...]]:
        """Those of the trunk's parameters."""
        return swin.source(path).shapes

    def arrays(
        self, path: Path, config: Config, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """The trunk's parameters for a model whose parameters have these shapes."""
        return swin.read(swin.source(path), _trunk(shapes), OURS, config.start_without)

    def left_behind(self, path: Path, config: Config) -> str:
        """What in the weights is not part of the trunk, as an extra sentence; "" for nothing."""
        source, without = swin.source(path), config.start_without
        parts = sorted({name.rpartition(".")[0] or name for name in source.beyond})
        told = [f"used only in pre-training, and ignored: {', '.join(parts)}"] if parts else []
        told += [f"left out as asked: {', '.join(without)}"] if without else []
        if source.pixels is None:
            told.append(
                "their normalisation of pixels is not told: ImageNet's mean and deviation are used"
            )
        return f" Its weights: {'; '.join(told)}." if told else ""


def _trunk(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {path: shape for path, shape in shapes.items() if not path.startswith(HEADS)}


def _way(source: SwinSource, config: Config) -> str:
    """The end of the sentence: the options that make it fit, if there are any."""
    model: Any = config.model
    theirs = swin.options(source)
    changes = {name: value for name, value in theirs.items() if getattr(model, name) != value}
    if not changes:
        return "; name what is to be left out in start_without, or take another file."
    said = words({f"model.{name}": value for name, value in changes.items()})
    try:
        better = replace(config, model=replace(model, **changes))
        left = swin.misfits(source, _trunk(model_shapes(better)), config.start_without)
    except UserError as error:
        return f"; with its sizes ({said}) there is another problem: {error}"
    if left:
        return f"; with its sizes ({said}) there is another problem: {swin.told(left)}."
    return f": add {said}."
