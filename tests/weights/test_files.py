"""Files of weights: two formats, and one sentence for whatever is wrong with one."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moezoo.errors import UserError
from moezoo.weights import files


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a/kernel": rng.normal(size=(2, 3)).astype(np.float32),
        "b": rng.normal(size=4).astype(np.float16),
        "c": rng.normal(size=(5, 1)).astype(ml_dtypes.bfloat16),
    }


def write(path: Path, values: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, **values)  # type: ignore[arg-type]
    else:
        save_file(values, path)
    return path


@pytest.mark.parametrize("suffix", sorted(files.FORMATS))
def test_names_and_arrays(suffix: str, tmp_path: Path) -> None:
    wanted = arrays()
    path = write(tmp_path / f"weights{suffix}", wanted)
    found = files.open_file(path)
    assert found.stored.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found.stored[name].shape == array.shape
        assert found.read(name).dtype == array.dtype
        np.testing.assert_array_equal(found.read(name), array)


@pytest.mark.parametrize("suffix", sorted(files.FORMATS))
def test_files_that_cannot_be_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(UserError, match="There is no file '.*': name a file of weights"):
        files.open_file(path)
    for content in (b"", b"no weights at all", bytes(300)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as .* download it again"):
            files.open_file(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="is a folder, not a file"):
        files.open_file(path)


@pytest.mark.parametrize("suffix", sorted(files.FORMATS))
def test_half_a_file(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"weights{suffix}", arrays())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="download it again"):
        files.open_file(path)


def test_other_kinds_of_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="no file of weights that can be read here: name an .npz"):
        files.open_file(path)
    single = tmp_path / "one.npz"
    with single.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(UserError, match="cannot be read as .npz"):
        files.open_file(single)
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, a=np.array([{}], object))
    with pytest.raises(UserError, match="cannot be read as .npz"):
        files.open_file(pickled)
