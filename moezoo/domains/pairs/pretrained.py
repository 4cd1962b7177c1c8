"""Runs on pairs that start from what a run on images has learned, or from Uni-Perceiver's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moezoo.domains.images.pretrained import words
from moezoo.errors import UserError
from moezoo.models.shared.config import traits
from moezoo.nn import module
from moezoo.nn.embed import grid_of
from moezoo.train.domain import Pretrained
from moezoo.train.schema import Config
from moezoo.train.start import parts_of
from moezoo.weights import uniperceiver
from moezoo.weights.uniperceiver import EncoderSource
from moezoo.weights.uniperceiver_names import TABLE
from moezoo.weights.vit import named

# Where the parameters of a vision transformer belong in a conditional encoder.
PLACES = {
    "blocks/": "encoder/blocks/",
    "norm/": "encoder/norm/",
    "patch_embed/": "tokens/patch_embed/",
}
POSITIONS, CLASS = "pos_embed", "cls_token"
WORDS = "tokens/embed"
FEATURES_OF_A_HEAD = 64  # in the published sizes


def from_vit(params: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: array}` of a vision transformer under the paths of a conditional encoder.

    Its class token becomes the special token, with its position added; parameters without a
    counterpart keep their names.
    """
    made = {}
    for path, array in params.items():
        start = next((old for old in PLACES if path.startswith(old)), None)
        made[path if start is None else PLACES[start] + path[len(start) :]] = array
    if POSITIONS in made and CLASS in made:
        positions_1PD = made.pop(POSITIONS)
        made["tokens/special"] = made.pop(CLASS)[0] + positions_1PD[0, :1]
        made["tokens/image_positions"] = positions_1PD[0, 1:]
    return made


class ConditionalEncoders(Pretrained):
    """Checkpoints of Uni-Perceiver's code; and runs on images, whose trunk reads the images."""

    what = "a checkpoint of Uni-Perceiver's code"
    wanted = "that of a run with a vision transformer, or a checkpoint of Uni-Perceiver's code"
    has_options = True
    runs_on = ("images",)

    def knows(self, path: Path) -> bool:
        """Files with the names of Uni-Perceiver's arrays; a damaged file is nobody's here."""
        try:
            return uniperceiver.is_uni_perceiver(path)
        except UserError:
            return False

    def look(self, path: Path) -> None:
        """Raise UserError for a file that is damaged or holds another model."""
        uniperceiver.source(path)

    def check(self, path: Path, config: Config) -> None:
        """Raise UserError if the file and the configured model do not fit together.

        Names the options that make them fit, after trying them.
        """
        source, model = uniperceiver.source(path), traits(config.model)
        theirs, wrong = uniperceiver.options(source), []
        width: Any = theirs["width"]
        heads = config.start_heads or max(1, width // FEATURES_OF_A_HEAD)
        if config.start_heads is None:
            wrong.append("it does not tell its attention heads, you have to (start_heads)")
        elif model.heads != heads:
            wrong.append(f"it has {heads} attention heads, as start_heads says, the model another")
        arrays = uniperceiver.misfits(source, _shapes(config), config.start_without)
        # What no array shows, and the model would compute otherwise.
        for name in ("epsilon", "gate_activation"):
            if name in theirs and getattr(model, name) != theirs[name]:
                wrong.append(f"it was trained with {name} {theirs[name]}")
        if wrong := wrong + arrays:
            told = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if wrong[4:] else "")
            raise UserError(f"'{path}' does not fit the model: {told}{_way(source, config, heads)}")

    def arrays(
        self, path: Path, config: Config, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """The encoder's parameters for a model whose parameters have these shapes."""
        model: Any = config.model
        grid = grid_of(config.data.domain.size(config), model.patch)
        return uniperceiver.read(uniperceiver.source(path), shapes, grid, config.start_without)

    def left_behind(self, path: Path, config: Config) -> str:
        """What of the file was not taken."""
        beyond = uniperceiver.source(path).beyond
        parts = sorted({name.removeprefix("module.").rpartition(".")[0] for name in beyond})
        told = [f"used only in training, or never, and ignored: {', '.join(parts)}"]
        told += [f"left out as asked: {', '.join(config.start_without)}"] * bool(
            config.start_without
        )
        return f" Its weights: {'; '.join(told)}."

    def of_run(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters of a vision transformer under the paths of a conditional encoder."""
        return from_vit(params)


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    parts = parts_of(config)
    return {path: tuple(leaf.shape) for path, leaf in module.flatten(parts.params).items()}


def _way(source: EncoderSource, config: Config, heads: int) -> str:
    """The end of the sentence: the options that make it fit, if there are any."""
    model: Any = config.model
    wanted = uniperceiver.options(source) | {"heads": heads}
    # The data decide about words and the length of texts: other words are left out of the file.
    other_words = wanted.pop("vocabulary") != model.vocabulary
    if wanted["text_length"] >= model.text_length:
        wanted.pop("text_length")
    fields = {name: value for name, value in wanted.items() if getattr(model, name) != value}
    changes: dict[str, Any] = {f"model.{name}": value for name, value in fields.items()}
    without = config.start_without
    if other_words and not named(TABLE, without):
        changes["start_without"] = without = (*without, WORDS)
    if config.start_heads is None:
        changes = {"start_heads": heads} | changes
    said = words(changes)
    try:
        better = replace(config, start_heads=heads, model=replace(model, **fields))
        left = uniperceiver.misfits(source, _shapes(better), without)
    except UserError as error:
        return f"; with its sizes ({said}) there is another problem: {error}"
    if left:
        return f"; the model cannot take it whatever its options: {left[0]}. Use another file."
    guess = f" (heads of {FEATURES_OF_A_HEAD} features are a guess)"
    return f": add {said}{guess if config.start_heads is None else ''}."
