"""Text to token ids and back: a model's own tokenizer, or plain bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moezoo.backbones.generate import Prompts, padded
from moezoo.errors import UserError
from moezoo.weights.hf_config import read_json

Special = Literal["bos", "eos", "pad"]
SPECIAL: tuple[Special, ...] = ("bos", "eos", "pad")


class Tokenizer:
    """What all tokenizers do.

    size: number of ids. special: ids of "bos", "eos" and "pad" as far as there are such tokens.
    name: what messages call it.
    """

    def __init__(self, size: int, special: dict[Special, int], name: str):
        self.size, self.special, self.name = size, special, name

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around it."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out."""
        raise NotImplementedError

    def id_of(self, token: Special) -> int:
        """The id of a special token; raises UserError where there is none."""
        if token not in self.special:
            raise UserError(
                f"{self.name} has no {token} token: name one of its tokens for it, "
                f'as in read_tokenizer(folder, {token}="</s>").'
            )
        return self.special[token]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        before: Sequence[Special] = (),
        after: Sequence[Special] = (),
        side: Literal["left", "right"] = "right",
        length: int | None = None,
    ) -> Prompts:
        """Texts of different lengths as one array, padded on one side.

        before, after: special tokens to put around every text. length: tokens per row, that of
        the longest where it is not given; of a longer text the end is cut off, `after` included.
        Raises UserError where a special token is missing that is needed.
        """
        head, tail = ([self.id_of(token) for token in names] for names in (before, after))
        rows = [[*head, *self.encode(text), *tail][:length] for text in texts]
        longest = max(map(len, rows), default=0) if length is None else length
        ragged = any(len(row) < longest for row in rows)
        return padded(rows, self.id_of("pad") if ragged else 0, side, longest)

    def decode_batch(self, tokens_BT: Any, lengths_B: Any = None) -> list[str]:
        """The text of every row, of its first `lengths_B` tokens where they are given."""
        rows = np.asarray(tokens_BT)
        lengths = [rows.shape[1]] * len(rows) if lengths_B is None else np.asarray(lengths_B)
        return [self.decode(row[:n].tolist()) for row, n in zip(rows, lengths, strict=True)]


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then bos, eos and pad: 259 ids, and no file is needed."""

    def __init__(self) -> None:
        super().__init__(259, {"bos": 256, "eos": 257, "pad": 258}, "The byte tokenizer")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        # A model may make bytes that are no UTF-8.
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class FileTokenizer(Tokenizer):
    """A `tokenizer.json`, read by the package `tokenizers`; see `read_tokenizer`."""

    def __init__(self, inner: Any, special: dict[Special, int], name: str):
        super().__init__(inner.get_vocab_size(), special, name)
        self.inner = inner

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)


def read_tokenizer(folder: Path | str, **tokens: str) -> FileTokenizer:
    """The tokenizer in a folder of Hugging Face's format.

    tokens: texts of special tokens, such as `pad="</s>"`, where the files name none or others.
    Raises UserError where the package `tokenizers` or a file is missing, a file is damaged, or a
    special token is not in the vocabulary.
    """
    try:
        from tokenizers import Tokenizer as Inner
    except ImportError as error:
        raise UserError(
            "Reading a tokenizer needs the package tokenizers: pip install 'moezoo[text]'."
        ) from error
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"There is no {path}: save the model's fast tokenizer there with transformers."
        )
    try:
        inner = Inner.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise UserError(f"{path} is no tokenizer ({error}); download it again.") from error
    inner.no_padding()
    inner.no_truncation()
    return FileTokenizer(inner, _special(inner, path, _named(Path(folder)) | tokens), str(path))


def _named(folder: Path) -> dict[str, str]:
    """The texts of special tokens that the files beside a tokenizer name."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        values = read_json(folder / file) if (folder / file).is_file() else {}
        for token in SPECIAL:
            value = values.get(f"{token}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[token] = text
    return found


def _special(inner: Any, path: Path, named: dict[str, str]) -> dict[Special, int]:
    special: dict[Special, int] = {}
    for token in SPECIAL:
        if token not in named:
            continue
        found = inner.token_to_id(named[token])
        if found is None:
            raise UserError(
                f"{path} has no token {named[token]!r}, which is to be its {token}: "
                "take all files of the same model."
            )
        special[token] = found
    return special
