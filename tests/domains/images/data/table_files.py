"""Tables of small images and labels: Parquet, and folders as the package `datasets` saves them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.domains.images.data import folders

WORDS = ("dry", "wet")
COUNT = {"train": 6, "test": 2}


def png(values: np.ndarray) -> dict[str, Any]:
    written = io.BytesIO()
    Image.fromarray(values).save(written, "PNG")
    return {"bytes": written.getvalue(), "path": None}


def table(count: int, start: int = 0, **changes: Any) -> Any:
    """A table of so many scenes; changes: other columns by name, None for none."""
    import pyarrow as pa

    scenes = [folders.scene(i) for i in range(start, start + count)]
    columns: dict[str, Any] = {
        "image": [png(scene["images"]) for scene in scenes],
        "mask": [png(scene["semseg"]) for scene in scenes],
        "edge": [png(scene["edge"]) for scene in scenes],
        "scene": [i % 2 for i in range(start, start + count)],
        "note": ["a note"] * count,
    }
    columns = {name: value for name, value in (columns | changes).items() if value is not None}
    names = {"names": list(WORDS), "_type": "ClassLabel"}
    noted = {"info": {"features": {"image": {"_type": "Image"}, "scene": names}}}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(noted)})


def parquet(root: Path, **changes: Any) -> Path:
    """As the Hub has it: a file, or several, of each split."""
    import pyarrow.parquet as pq

    (root / "data").mkdir(parents=True)
    pq.write_table(table(4, **changes), root / "data/train-00000-of-00002.parquet")
    pq.write_table(table(2, 4), root / "data/train-00001-of-00002.parquet")
    pq.write_table(table(2, 6), root / "data/test-00000-of-00001.parquet")
    return root


def saved(root: Path) -> Path:
    """As `save_to_disk` of a dictionary of data sets writes it."""
    import pyarrow as pa

    root.mkdir()
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(COUNT)}))
    for split, count in COUNT.items():
        (root / split).mkdir()
        made, name = table(count, 6 * (split == "test")), "data-00000-of-00001.arrow"
        with pa.ipc.new_stream(str(root / split / name), made.schema) as stream:
            stream.write_table(made)
        state = {"_data_files": [{"filename": name}], "_split": split}
        (root / split / "state.json").write_text(json.dumps(state))
    return root
