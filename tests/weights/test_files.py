"""Files of weights: their formats, and one sentence for whatever is wrong with one."""

from __future__ import annotations

import resource
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moezoo.errors import UserError
from moezoo.weights import files
from tests.weights import torch_files, vmoe_files


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
    elif path.suffix == ".safetensors":
        save_file(values, path)
    elif path.suffix == ".index":
        pieces = {name: vmoe_files.halves(a) for name, a in values.items()}
        vmoe_files.write(path.parent, values, pieces, path.stem)
    else:
        torch_files.write(path, values)
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
    path = tmp_path / "weights.h5"
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


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy(header: str, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    size = 2 if version == b"\x01\x00" else 4
    return b"\x93NUMPY" + version + len(text).to_bytes(size, "little") + text + data


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}"


def test_what_grows_out_of_all_proportion_is_not_unpacked(tmp_path: Path) -> None:
    """Half a megabyte that says 400 MB: told from the sizes in its directory."""
    header = FLOATS.replace("(4,)", "(100000000,)")
    bomb = zipped(tmp_path / "bomb.npz", {"a.npy": npy(header, bytes(400_000_000))})
    assert bomb.stat().st_size < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="0.4 MB would grow to 400 MB, which no weights do"):
        files.open_file(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    bz2 = zipped(tmp_path / "bz2.npz", {"a.npy": npy(FLOATS, bytes(16))}, zipfile.ZIP_BZIP2)
    with pytest.raises(UserError, match="packed by method 12, which is not read"):
        files.open_file(bz2)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (FLOATS.replace("(4,)", "(-4,)"), bytes(16)),
        (FLOATS.replace("(4,)", f"({2**70},)"), bytes(16)),
        (FLOATS.replace("(4,)", "(2.0, 2)"), bytes(16)),
        (FLOATS.replace("(4,)", "(True, 4)"), bytes(16)),
        (FLOATS.replace("(4,)", "(5,)"), bytes(16)),
        (FLOATS.replace("(4,)", "(3,)"), bytes(16)),
        (FLOATS.replace("<f4", "|V0"), b""),
        (FLOATS.replace("<f4", "|O"), bytes(32)),
        (FLOATS.replace("'<f4'", "[('a', '<f4')] * 9"), bytes(16)),
        (FLOATS.replace("'<f4'", "'" + "(" * 3000 + "'"), bytes(16)),
        ("(" * 9000, bytes(16)),
        ("{'descr': '<f4'}", bytes(16)),
        ("__import__('os').system('true')", bytes(16)),
        ("\x00\xff", b""),
    ],
)
def test_arrays_whose_headers_lie(header: str, data: bytes, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.npz", {"a.npy": npy(header, data)})
    with pytest.raises(UserError, match="cannot be read as .npz") as raised:
        files.open_file(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500 + len(str(path))


@pytest.mark.parametrize(
    "members",
    [
        {"a.npy": b""},
        {"a.npy": npy(FLOATS, bytes(16), b"\x09\x00")},
        {"a": npy(FLOATS, bytes(16))},
        {"../a.txt": b"x"},
    ],
)
def test_archives_of_something_else(members: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as .npz"):
        files.open_file(zipped(tmp_path / "x.npz", members))


def test_flipped_bits_in_deflated_data(tmp_path: Path) -> None:
    """Each is found: by the header, by zlib, or by the sum at the end."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=400).astype(np.float32).tobytes()
    header = FLOATS.replace("(4,)", "(400,)")
    path = zipped(tmp_path / "x.npz", {"a.npy": npy(header, data)})
    sound = path.read_bytes()
    for at in rng.integers(40, len(sound) - 90, 60):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1 :])
        with pytest.raises(UserError, match="cannot be read as .npz"):
            files.open_file(path).read("a")


def test_arrays_of_other_types(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, i=np.arange(3), t=np.array(["a"]), c=np.ones(2, complex), f=np.ones(2))
    opened = files.open_file(path)
    for name in "itc":
        with pytest.raises(UserError, match=f"{name} in .* holds no floats"):
            opened.read(name)
    assert opened.read("f").sum() == 2


def test_a_link_that_leads_nowhere_takes_a_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        files.check_new(tmp_path / "link")
    files.check_new(tmp_path / "new")
