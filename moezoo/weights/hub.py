"""Models on the Hugging Face Hub as folders on this disk: `hf:owner/name` or `hf:owner/name@v1.0`.

What is downloaded lies in the cache of the library `huggingface_hub`, where it is found again
without a network. Only files of arrays, settings and tokenizers: no pickles and no programs.
"""

from __future__ import annotations

import re
from pathlib import Path

from moezoo import storage
from moezoo.errors import UserError

MARK = "hf:"
NAME = re.compile(r"hf:(?P<model>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
FILES = ["*.safetensors", "*.npz", "*.json", "*.jinja", "*.model"]
FILES += ["tokenizer*", "vocab*", "merges*"]


def is_hub(name: Path | str) -> bool:
    """Whether a name means a model on the Hub, and not a path."""
    return str(name).startswith(MARK)


def folder(name: Path | str) -> Path:
    """The folder of a model, downloaded where it is not there yet; a path as it is.

    Raises UserError for a name of another form, without the library, and where it cannot be had.
    """
    if not is_hub(name):
        return storage.place(name)
    found = NAME.fullmatch(str(name))
    if found is None:
        raise UserError(
            f"'{name}' names no model on the Hub: write hf:owner/name or hf:owner/name@revision."
        )
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"'{name}' is on the Hugging Face Hub, which needs huggingface_hub: pip install "
            "'moezoo[hub]', or name a folder."
        ) from error
    try:
        place = snapshot_download(found["model"], revision=found["revision"], allow_patterns=FILES)
    except Exception as error:  # the library's own, and those of what it connects through
        raise UserError(f"'{name}' cannot be had ({_said(error)}): {_advice(error)}.") from error
    return Path(place)


def _said(error: Exception) -> str:
    line = next((one.strip() for one in str(error).splitlines() if one.strip()), "")
    return (line or type(error).__name__).rstrip(".:")[:200]


def _advice(error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "accept its licence on the Hub and log in with `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return "it has no such revision; leave it out for the newest"
    if "RepositoryNotFoundError" in kinds:
        return "check the name, and `hf auth login` if it is private"
    if "LocalEntryNotFoundError" in kinds or isinstance(error, OSError):
        return "there is no network here; download it elsewhere, and name its folder"
    return "check the name"
