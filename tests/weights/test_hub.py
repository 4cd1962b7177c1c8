"""Names of models on the Hugging Face Hub: what is asked of the library, and what is said of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import moezoo
from moezoo.errors import UserError
from moezoo.train import start
from moezoo.train.config_file import load
from moezoo.train.console import Console
from moezoo.weights import hub


class GatedRepoError(Exception): ...


class LocalEntryNotFoundError(FileNotFoundError): ...


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A library that knows every model as one folder; what it was asked for."""
    found: list[Any] = []
    library = ModuleType("huggingface_hub")

    def snapshot_download(name: str, **options: Any) -> str:
        found.append((name, options["revision"]))
        assert not {"*", "*.bin", "*.py", "*.pt"} & set(options["allow_patterns"])
        if name == "owner/gated":
            raise GatedRepoError("Access to it is restricted.\nMore lines.")
        if name == "owner/away":
            raise LocalEntryNotFoundError("An error happened.")
        return str(tmp_path)

    library.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    return found


def test_names_and_revisions(asked: list[Any], tmp_path: Path) -> None:
    assert hub.folder("hf:owner/name") == tmp_path
    assert hub.folder(Path("hf:gpt2@v1.0/x")) == tmp_path
    assert asked == [("owner/name", None), ("gpt2", "v1.0/x")]
    assert hub.folder("a/folder") == Path("a/folder") and len(asked) == 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("hf:", "names no model on the Hub: write hf:owner/name"),
        ("hf:a/b/c", "names no model on the Hub"),
        ("hf:owner/na me", "names no model on the Hub"),
        ("hf:owner/gated", "Access to it is restricted.: accept its licence on the Hub"),
        ("hf:owner/away", "there is no network here; download it elsewhere"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(name: str, sentence: str, asked: list[Any]) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        hub.folder(name)
    assert "\n" not in str(error.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'moezoo\[hub\]', or name a folder"):
        moezoo.load("hf:owner/name")


def test_runs_and_models_begin_with_them(asked: list[Any], tmp_path: Path) -> None:
    config = load("rooms/m3vit_tiny", ["--start_from", "hf:owner/name@v1"])
    begun = start.with_start(config, Console(), lambda *a, **k: None)
    assert begun.start_from == str(tmp_path) and asked == [("owner/name", "v1")]
    with pytest.raises(UserError, match="is not an exported folder, a run"):
        moezoo.load("hf:owner/name")
    with pytest.raises(UserError, match="No checkpoint"):
        moezoo.create("rooms/m3vit_tiny", pretrained="hf:owner/name")
