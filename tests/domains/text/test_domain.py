"""Text by configuration: options that go together, and rows of every template and loss mask."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.domains.text.domain import TEMPLATES, TRAINED, TextDataConfig, check, open_text
from moezoo.errors import UserError
from tests.domains.text.data.samples import chat_folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"template": "chatml"}, "Tokens are bytes, which would spell out the template's mark"),
        (
            {"name": "corpus", "template": "chatml"},
            "data.template is chatml, but data.name is corp",
        ),
        ({"name": "corpus", "arrangement": "padded"}, "data.arrangement is padded, but data.name"),
        ({"name": "jsonl"}, "data.train_file and data.test_file are needed"),
        ({"train_file": "a"}, "data.train_file needs data.name jsonl"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(TextDataConfig(**changes))


def test_the_tokenizer_is_checked_before_files_are_read(tmp_path: Path) -> None:
    chat_folder(tmp_path, [])
    absent = str(tmp_path / "none.jsonl")
    config = TextDataConfig("jsonl", train_file=absent, test_file=absent, tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="none.jsonl"):
        open_text(config, "train")
    config = TextDataConfig(
        "jsonl", train_file=absent, test_file=absent, tokenizer=str(tmp_path), template="chatml"
    )
    with pytest.raises(UserError, match=f"The tokenizer in {tmp_path} would spell out"):
        open_text(config, "train")


@pytest.mark.parametrize("arrangement", ["packed", "padded"])
def test_rows_of_every_template_and_loss_mask(tmp_path: Path, arrangement: Any) -> None:
    """The last target of every example is the token at which generation stops."""
    chat_folder(tmp_path)
    file = tmp_path / "a.jsonl"
    lines = [{"instruction": f"Ask {i}", "output": "yes" * (i + 1)} for i in range(5)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    for template, trained, folder in itertools.product(TEMPLATES, TRAINED, (None, str(tmp_path))):
        if template == "chatml" and folder is None:
            continue
        config = TextDataConfig(
            *("jsonl", 128),
            **{"train_file": str(file), "test_file": str(file), "tokenizer": folder},
            **{"template": template, "trained": trained, "arrangement": arrangement},
        )
        source = open_text(config, "train")
        stop, found = 260 if template == "chatml" else 258, 0
        for row in (source[i] for i in range(len(source))):
            for segment in range(1, row["segments"].max() + 1):
                targets = row["targets"][row["segments"] == segment]
                learned = targets[targets >= 0]
                assert learned[-1] == stop and targets[-1] == stop
                assert (len(learned) == len(targets)) == (trained == "everything")
                found += 1
            assert (row["targets"][row["segments"] == 0] == -1).all()
        assert found == 5
        assert np.all(source[0]["tokens"] < source.info.vocabulary)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, r"\d+ test rows \(40 examples\)"),
        ({"arrangement": "padded"}, "40 test rows"),
        ({"name": "corpus", "only": ("topics",)}, r"\d+ test rows"),
    ],
)
def test_an_amount_of_text_is_rows_and_says_how_many_examples_they_hold(
    changes: dict[str, Any], says: str
) -> None:
    data = TextDataConfig(**{"test": 40, "only": ("copy",)} | changes)
    assert re.fullmatch(says, data.domain.amount(open_text(data, "test"), "test"))
