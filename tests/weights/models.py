"""A tiny decoder in a folder, and ways to spoil it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moezoo.backbones.decoder import DecoderConfig
from moezoo.weights import hf
from tests.backbones.test_decoder import random_parts

CONFIG = DecoderConfig(
    vocabulary=10, width=8, depth=2, heads=2, groups=1, hidden=6, head_width=4, qkv_bias=True
)
PARTS = random_parts(CONFIG)


def write(folder: Path, **options: Any) -> Path:
    """The model as one file, or in shards of `shard_bytes`."""
    hf.save(folder, CONFIG, PARTS.params, **options)
    return folder


def edit_json(path: Path, change: Callable[[dict], Any]) -> None:
    """Change the object in a JSON file in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
