"""Domains of text from the standard library."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.domains.text.data import corpus
from moezoo.domains.text.data.corpus import DOMAINS, clean, documents, split_of, words
from moezoo.errors import UserError
from tests.fixtures import ROOT

LIMIT = 40_000


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_clean_texts_of_limited_size(domain: str) -> None:
    for split in corpus.SPLITS:
        found = documents(domain, split, LIMIT)
        assert 0 < sum(len(d.text) for d in found) <= LIMIT
        assert len({d.name for d in found}) == len(found)
        for document in found:
            assert document.domain == domain
            assert document.text == clean(document.text)
            assert corpus.SHORTEST <= len(document.text) <= corpus.LONGEST
            assert "\t" not in document.text and "\r" not in document.text


def test_a_file_is_in_the_same_split_in_every_domain() -> None:
    of_files = ("code", "comments", "docstrings", "trees")
    names = {
        split: {d.name for domain in of_files for d in documents(domain, split, LIMIT)}
        for split in corpus.SPLITS
    }
    assert names["train"] and names["test"] and not names["train"] & names["test"]
    assert all(split_of(name) == split for split, found in names.items() for name in found)


def test_another_process_reads_the_same() -> None:
    code = "from moezoo.domains.text.data.corpus import documents\n"
    code += f"print([d.name for d in documents('docstrings', 'test', {LIMIT})])"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ast.literal_eval(said.stdout) == [d.name for d in documents("docstrings", "test", LIMIT)]


def test_a_source_is_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '''
        #!/usr/bin/env python
        """What the module
        is for."""

        # A comment that
        # goes on.
        # =====
        X = 1  # stays


        def f():
            """Only this."""

        class A:
            """Of a class."""

            text = """
        # no comment
        # at all
        """
            # alone
            def g(self): return f"{self}"
    '''
    (tmp_path / "m.py").write_text(textwrap.dedent(source).lstrip())
    (tmp_path / "bad.py").write_text("def f(:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text("x = 1")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus.files.cache_clear()
    corpus.parts.cache_clear()
    try:
        assert list(corpus.files()) == ["bad.py", "m.py"]
        parts, tree = corpus.parts("m.py"), corpus.tree("m.py", 10_000)
        broken = corpus.parts("bad.py")
    finally:
        corpus.files.cache_clear()
        corpus.parts.cache_clear()
    assert parts.docstrings == "What the module\nis for.\n\nOnly this.\n\nOf a class."
    assert parts.comments == "A comment that\ngoes on."
    assert "Only this" not in parts.code and "goes on" not in parts.code
    assert "    pass" in parts.code and "# no comment\n# at all" in parts.code
    kept = ast.parse(parts.code)
    assert [type(node).__name__ for node in kept.body] == ["Assign", "FunctionDef", "ClassDef"]
    assert "Only this" not in tree and "FunctionDef" in tree
    assert broken == ("", "", "")


@given(st.text(max_size=200))
def test_cleaning_is_idempotent(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert once.encode().decode() == once


def test_long_texts_end_with_a_line() -> None:
    line = "x" * 99
    text = clean("\n".join([line] * 1000))
    assert len(text) <= corpus.LONGEST and set(text.split("\n")) == {line}
    assert len(clean("y" * 10**5)) == corpus.LONGEST


def test_words_are_short_and_sorted() -> None:
    found = words("test", 4, 6, 50, LIMIT)
    assert len(found) == 50 and list(found) == sorted(set(found))
    assert all(4 <= len(w) <= 6 and w.isascii() and w.islower() for w in found)


def test_bad_names_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unknown text domain 'codes': did you mean code"):
        documents("codes", "train")
    with pytest.raises(UserError, match="Unknown split 'dev'"):
        documents("code", "dev")
    with pytest.raises(UserError, match="no train document within 10 characters"):
        documents("names", "train", 10)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus.files.cache_clear()
    with pytest.raises(UserError, match="no source files for its standard library"):
        documents("code", "train", 12345)
    corpus.files.cache_clear()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="lacks pydoc_data.topics"):
        documents("topics", "train", 12345)
