"""Runs on clips that start from a pretrained Audio Spectrogram Transformer (AST)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moezoo.domains.audio.data import fbank
from moezoo.train.domain import Pretrained
from moezoo.train.schema import Config
from moezoo.weights import ast, hf_files
from moezoo.weights.fold import Normalisation

# What models of clips read here; other input scales of a file are folded into its first matrix.
OURS = Normalisation((fbank.MEAN,), (2 * fbank.STD,))


class Spectrograms(Pretrained):
    """Folders of Hugging Face ASTs."""

    what = "an Audio Spectrogram Transformer"
    wanted = "the folder of a Hugging Face AST"

    def knows(self, path: Path) -> bool:
        """Folders that contain one."""
        return path.is_dir() and hf_files.holds_model(path) and ast.is_ast(path)

    def check(self, path: Path, config: Config) -> None:
        """Raise UserError if sizes, arrays or the clips' features do not fit the model."""
        model: Any = config.model
        ast.check_fits(path, model.ast)
        ast.check(path)
        data: Any = config.data
        ast.check_preprocessor(path, data.rate, data.mel)

    def arrays(
        self, path: Path, config: Config, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """All of its arrays under our paths."""
        return ast.load(path, OURS)
