"""Runs on text that begin with a pretrained decoder, the folder of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from moezoo.domains.text.data.tokenizer import tokenizer_at
from moezoo.domains.text.tasks import LM
from moezoo.errors import UserError
from moezoo.models.language.model import LanguageConfig
from moezoo.models.shared.config import traits
from moezoo.nn import module
from moezoo.nn.module import Tree, flatten, unflatten
from moezoo.nn.upcycle import BASE
from moezoo.train.domain import Classes, Pretrained
from moezoo.train.schema import Config
from moezoo.train.setup import Loaded, make_tasks
from moezoo.train.start import GROUPS, UPDATE
from moezoo.weights import hf, hf_files
from moezoo.weights.hf_config import FAMILIES


class Decoders(Pretrained):
    """Folders of the families in `FAMILIES`; their arrays go straight to their places.

    data: a `data` section of text.
    """

    what = "a language model"
    wanted = "that of a Hugging Face decoder"

    def __init__(self, data: Any):
        self.data = data

    def knows(self, path: Path) -> bool:
        """Folders whose `config.json` names a known family."""
        return path.is_dir() and hf_files.model_type(path) in FAMILIES

    def check(self, path: Path, config: Config) -> None:
        """UserError where sizes, or anything else that decides what weights compute, differ.

        Equal shapes are not enough: positions, heads and norms must be the same, too.
        """
        ours, theirs = traits(config.model).computes(), hf.read_config(path).computes()
        for name, value in theirs.items():
            own = ours[f"decoder.{name}"]
            if own != value:
                raise UserError(
                    f"model.decoder.{name} is {own}, but the model in {path} has {value}: "
                    "take its value, or another folder."
                )
        hf.check(path)

    def loaded(self, path: Path, **changes: Any) -> tuple[Loaded, Classes]:
        """The decoder of a folder, asked through its own tokenizer; `changes` as for `hf.load`."""
        published = hf.load(path, **changes)
        data = replace(self.data, tokenizer=str(path))
        config = Config(path.name, LanguageConfig(published.config), (LM,), data)
        # A vocabulary is often padded to a round size, so it may be larger than the tokenizer's.
        classes = Classes({LM: tokenizer_at(str(path)).vocabulary}, {}, (LM,))
        parts = module.abstract(lambda: config.model.build(classes.counts, (1, 1), nnx.Rngs(0)))
        model = module.merge(parts.definition, published.parts.params, published.parts.stats)
        return Loaded(config, make_tasks(config, classes), model, 0), classes

    def arrays(self, path: Path, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """None: a decoder may be too large to be there twice, see `place`."""
        return None

    def place(self, path: Path, state: Tree) -> Tree:
        """The state with every array of the folder in its place.

        Each goes straight to where the state's own lay, which is given up first, so that nothing is
        there twice. Raises UserError where the folder's arrays have other sizes than this one.
        """
        lie = {
            name.replace(BASE, "/"): (group, name, leaf)
            for group in GROUPS
            for name, leaf in flatten(state[group]).items()
            if UPDATE not in name
        }
        places = {name: leaf.sharding for name, (_, _, leaf) in lie.items()}
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, (_, _, leaf) in lie.items()
        }
        for _, _, leaf in lie.values():
            leaf.delete()
        loaded = hf.load_into(path, wanted, places.__getitem__)
        groups: dict[str, Any] = {group: flatten(state[group]) for group in GROUPS}
        for name, (group, own, _) in lie.items():
            groups[group][own] = loaded[name]
        return state | {group: unflatten(arrays) for group, arrays in groups.items()}
