"""Text to token ids and back: bytes, or the tokenizer of a local Hugging Face folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moezoo import regular, structured
from moezoo.errors import UserError
from moezoo.schema_check import FormatFault, either, first_line, flag, maybe, parse, table, text

T = TypeVar("T")
LARGEST = 256 * regular.MB  # of a tokenizer.json; files with 256,000 tokens have 34
MOST = 1 << 24  # tokens
AGAIN = "save the tokenizer again with transformers' save_pretrained"
# A word, or an object about it as older versions of transformers write it.
WORD = maybe(either(table({"content": text()}, ("content",)), text()))
FORM = table(
    {"eos_token": WORD, "pad_token": WORD, "bos_token": WORD, "add_bos_token": maybe(flag)}
)


class Tokenizer(Protocol):
    """Token ids below `vocabulary`.

    `bos` begins a document, None if documents begin without a mark; `eos` ends one; `pad` fills
    rows and is never learned. `encode` adds none of them. `mark` is the single token of a word such
    as <|im_end|> wherever it is written; UserError if the tokenizer would spell it out.
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

    `eos`, `pad` and `bos` are those in tokenizer_config.json, else in special_tokens_map.json.
    `bos` is None if the folder's tokenizer does not itself put it before a text; without a pad
    token, `eos` is used, which is safe because padding is masked. Special tokens written out
    in a text are recognised as such.

    Raises UserError for a folder without tokenizer.json, files that cannot be read or are not what
    they should be, a missing end token, and if the package `tokenizers` is absent.
    """

    def __init__(self, folder: str | Path):
        self._folder = folder = Path(folder).expanduser()
        self._marks: dict[str, int] = {}
        self._tokenizer = _load(folder)
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(self._ids.values(), default=-1) + 1
        if not 0 < self.vocabulary <= MOST:
            raise UserError(
                f"{folder / 'tokenizer.json'} has token {self.vocabulary - 1}, but only 0 to "
                f"{MOST - 1} are read: {AGAIN}."
            )
        own = _optional(folder / "tokenizer_config.json")
        given = {name: value for name, value in own.items() if value is not None}
        names = {**_optional(folder / "special_tokens_map.json"), **given}
        eos = self._special(names, "eos_token")
        if eos is None:
            raise UserError(
                f'{folder} names no end token: add "eos_token" to its tokenizer_config.json.'
            )
        self.eos = eos
        pad = self._special(names, "pad_token")
        self.pad = eos if pad is None else pad
        bos = self._special(names, "bos_token")
        begins = names.get("add_bos_token")
        self.bos = bos if (self._begins_with(bos) if begins is None else begins) else None

    def _special(self, names: Mapping[str, Any], which: str) -> int | None:
        given = names.get(which)
        word = given["content"] if isinstance(given, dict) else given
        if word is None:
            return None
        if word not in self._ids:
            raise UserError(
                f"{self._folder} names {word!r} as {which}, which its tokenizer.json does not "
                "contain."
            )
        return self._ids[word]

    def _begins_with(self, bos: int | None) -> bool:
        return self._asked(lambda: self._tokenizer.encode("a").ids)[:1] == [bos]

    def encode(self, text: str) -> list[int]:
        """The token ids of the text, with nothing added."""
        return self._asked(lambda: self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without special tokens."""
        given = [int(i) for i in ids]
        return self._asked(lambda: self._tokenizer.decode(given, skip_special_tokens=True))

    def _asked(self, ask: Callable[[], T]) -> T:
        """What the tokenizer answers; its Rust side panics if parts of its file contradict."""
        try:
            return ask()
        except BaseException as error:
            if not _is_of_tokenizers(error):
                raise
            raise UserError(
                f"{self._folder / 'tokenizer.json'} contradicts itself ({first_line(error)}): "
                f"{AGAIN}."
            ) from None

    def mark(self, word: str) -> int:
        """The token of a word that is one token wherever it is written; UserError otherwise."""
        if word not in self._marks:
            number = self._ids.get(word)
            if number is None or self.encode(f"a{word}a").count(number) != 1:
                raise _spelled_out(word, f"The tokenizer in {self._folder}")
            self._marks[word] = number
        return self._marks[word]


def _spelled_out(word: str, whose: str) -> UserError:
    return UserError(
        f"{whose} would spell out the template's mark {word}: use --data.template plain, or the "
        "tokenizer of a chat model (--data.tokenizer)."
    )


def _is_of_tokenizers(error: BaseException) -> bool:
    """Whether an error is the package's own: a plain Exception, or a panic, which is not even that.

    The panic's class cannot be imported.
    """
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _load(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        raise UserError(
            f"{folder} has no tokenizer.json: name the folder of a Hugging Face model with a fast "
            "tokenizer, or save one there with transformers' save_pretrained."
        )
    content = regular.read(path, LARGEST, UserError, AGAIN)
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"Reading {path} needs the package tokenizers: pip install 'moezoo[text]'."
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        if not _is_of_tokenizers(error) and not isinstance(error, ValueError):
            raise
        raise UserError(f"{path}: {_reason(content, error)}; {AGAIN}.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _reason(content: bytes, error: BaseException) -> str:
    try:
        parse(content)  # says it better where the file is no JSON at all
    except FormatFault as unfit:
        return str(unfit)
    return f"the tokenizers package cannot read it ({first_line(error)})"


def _optional(path: Path) -> dict[str, Any]:
    return structured.read_object(path, FORM, again=AGAIN) if os.path.lexists(path) else {}


SAMPLES = (
    "The quick brown fox, 0123456789 times as lazy.\nalphabetic\nkasu",
    "Größe, naïve café, Ωμέγα, снег, 東京, 🙂",
    "def f(x): return {x: [1.5e-3]}  # ?!\t\\\n\n",
)


def identity(tokenizer: Tokenizer) -> str:
    """What tells a tokenizer from others: a hash of its marks and of sample texts' tokens, hex.

    Not of its files: bytes as a Hugging Face tokenizer writes them are the same tokens.
    """
    told = [tokenizer.bos, tokenizer.eos, *(tokenizer.encode(sample) for sample in SAMPLES)]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def tokenizer_at(folder: str | None) -> Tokenizer:
    """The tokenizer of a folder, or of bytes without one; UserError if it cannot be read."""
    return HFTokenizer(folder) if folder else ByteTokenizer()
