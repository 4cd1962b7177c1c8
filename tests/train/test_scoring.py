"""Sizes of the evaluation's batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moezoo.train.config import EvaluateConfig
from moezoo.train.scoring import size_of
from tests.train import tiny


@pytest.mark.parametrize(
    ("batch", "shards", "count", "size"),
    [
        (4, 1, 10, 4),
        (2**20, 1, 10, 10),  # the batch was made in full, of which 10 rows are examples
        (2**20, 8, 10, 16),
        (6, 4, 100, 8),
        (None, 1, 1, 1),
    ],
)
def test_batches_hold_no_more_than_there_is(
    tmp_path: Path, batch: int | None, shards: int, count: int, size: int
) -> None:
    config = replace(tiny.config(tmp_path), evaluate=EvaluateConfig(batch=batch))
    assert size_of(config, shards, count) == size
