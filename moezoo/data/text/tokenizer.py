"""Text to token ids and back: bytes, or the tokenizer of a local Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from moezoo.errors import UserError


class Tokenizer(Protocol):
    """Token ids below `vocabulary`.

    `bos` begins a document, None where documents begin without a mark; `eos` ends one; `pad` fills
    rows and is never learned. `encode` adds none of them. `mark` is the one token that a word such
    as <|im_end|> is wherever it is written; UserError where the tokenizer would spell it out.
    """

    @property
    def vocabulary(self) -> int: ...

    @property
    def bos(self) -> int | None: ...

    @property
    def eos(self) -> int: ...

    @property
    def pad(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def mark(self, word: str) -> int: ...


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, then pad, bos and eos."""

    vocabulary = 259
    pad, bos, eos = 256, 257, 258

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes among the ids; broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def mark(self, word: str) -> int:
        """Bytes have no such token."""
        raise _spelled_out(word, "Tokens are bytes, which")


class HFTokenizer:
    """The tokenizer of a Hugging Face folder: `tokenizer.json` and the names of its special tokens.

    `eos`, `pad` and `bos` are those of tokenizer_config.json, else of special_tokens_map.json.
    `bos` is None where the folder's tokenizer does not itself put it in front of a text; without a
    pad token `eos` stands in, which is sound because padding is masked. Special tokens written out
    in a text are recognised as such.

    Raises UserError for a folder without tokenizer.json, JSON that cannot be read, no end token,
    and where the package `tokenizers` is absent.
    """

    def __init__(self, folder: str | Path):
        self._folder = folder = Path(folder).expanduser()
        self._marks: dict[str, int] = {}
        self._tokenizer = _load(folder)
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(self._ids.values(), default=-1) + 1
        names = {
            **_optional(folder / "special_tokens_map.json"),
            **{
                k: v
                for k, v in _optional(folder / "tokenizer_config.json").items()
                if v is not None
            },
        }
        eos = self._special(folder, names, "eos_token")
        if eos is None:
            raise UserError(
                f'{folder} names no end token: add "eos_token" to its tokenizer_config.json.'
            )
        self.eos = eos
        pad = self._special(folder, names, "pad_token")
        self.pad = eos if pad is None else pad
        bos = self._special(folder, names, "bos_token")
        self.bos = bos if names.get("add_bos_token", self._begins_with(bos)) else None

    def _special(self, folder: Path, names: Mapping[str, Any], which: str) -> int | None:
        given = names.get(which)
        text = given.get("content") if isinstance(given, dict) else given
        if text is None:
            return None
        if not isinstance(text, str) or text not in self._ids:
            raise UserError(
                f"{folder} names {text!r} as {which}, which its tokenizer.json does not contain."
            )
        return self._ids[text]

    def _begins_with(self, bos: int | None) -> bool:
        return self._tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos]

    def encode(self, text: str) -> list[int]:
        """The token ids of the text, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def mark(self, word: str) -> int:
        """The token of a word that is one wherever it is written; UserError where it is not."""
        if word not in self._marks:
            number = self._ids.get(word)
            if number is None or self.encode(f"a{word}a").count(number) != 1:
                raise _spelled_out(word, f"The tokenizer in {self._folder}")
            self._marks[word] = number
        return self._marks[word]


def _spelled_out(word: str, whose: str) -> UserError:
    return UserError(
        f"{whose} would spell out the template's mark {word}: take --data.template plain, or the "
        "tokenizer of a model that was made for chats (--data.tokenizer)."
    )


def _load(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no tokenizer.json: name the folder of a Hugging Face model with a fast "
            "tokenizer, or save one there with transformers' save_pretrained."
        )
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"Reading {path} needs the package tokenizers: pip install 'moezoo[text]'."
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises nothing narrower
        _json(path)  # says it better where the file is no JSON at all
        raise UserError(
            f"{path} is no tokenizer that the tokenizers package reads: {error}"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _optional(path: Path) -> dict[str, Any]:
    return _json(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object.")
    return value
