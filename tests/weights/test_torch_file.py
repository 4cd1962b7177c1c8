"""Checkpoints of PyTorch: their arrays without running anything, and one sentence for the rest."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.weights import files, pickled, torch_file, vit
from tests.weights import torch_files, vit_files
from tests.weights.test_vit_forms import target
from tests.weights.torch_files import archive, number, row, table, tensor, text


def refusal(path: Path, name: str | None = None) -> str:
    """The sentence for a file, or for one of its arrays."""
    with pytest.raises(UserError) as raised:
        opened = files.open_file(path)
        if name is not None:
            opened.read(name)
    sentence = str(raised.value)
    assert str(path) in sentence and "\n" not in sentence
    assert len(sentence) < 700 + len(str(path)) and sentence.endswith(".")
    return sentence


# --- By hand -----------------------------------------------------------------------------------


def test_arrays_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=5).astype(np.float16),
        "c": rng.normal(size=(2, 1, 2)).astype(ml_dtypes.bfloat16),
        "d": rng.normal(size=()).astype(np.float64),
        "e": np.zeros((0, 3), np.float32),
    }
    opened = files.open_file(torch_files.write(tmp_path / "x.pth", arrays))
    assert opened.note == ""
    assert list(opened.stored) == list(arrays)
    for name, array in arrays.items():
        assert opened.stored[name] == (array.shape, array.dtype)
        np.testing.assert_array_equal(opened.read(name), array)
        assert opened.read(name).flags.c_contiguous


def test_views_of_one_storage(tmp_path: Path) -> None:
    flat = np.arange(24, dtype=np.float32)
    made = {
        "whole": tensor("0", (4, 6), count=24),
        "turned": tensor("0", (6, 4), (1, 6), count=24),
        "every_third": tensor("0", (3,), (3,), 5, 24),
        "corner": tensor("0", (2, 2), (6, 1), 16, 24),
        "spread": tensor("0", (2, 3), (0, 1), 20, 24),
        "one": tensor("0", (1,), (2**70,), 23, 24),
    }
    opened = files.open_file(archive(tmp_path / "x.pt", table(made), {"0": flat.tobytes()}))
    whole = flat.reshape(4, 6)
    wanted = {
        "whole": whole, "turned": whole.T, "every_third": flat[5:14:3], "one": flat[23:],
        "corner": whole[2:, 4:], "spread": np.stack([flat[20:23]] * 2),
    }  # fmt: skip
    for name, array in wanted.items():
        np.testing.assert_array_equal(opened.read(name), array, err_msg=name)


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict"])
def test_checkpoints_of_programs(entry: str, tmp_path: Path) -> None:
    arrays = {"a": np.ones(2, np.float32), "b.c": np.ones((1, 2), np.float32)}
    path = torch_files.write(tmp_path / "x.pth", arrays, entry, "module.")
    opened = files.open_file(path)
    assert opened.stored.keys() == arrays.keys()
    assert f"entry '{entry}'" in opened.note and "module." in opened.note


def test_entries_that_are_not_chosen(tmp_path: Path) -> None:
    one = tensor("0", (1,))
    storages = {"0": bytes(4)}
    made = table({"teacher": table({"a": one}), "student": table({"a": one})})
    path = archive(tmp_path / "x.pth", made, storages)
    assert "its arrays lie in an entry 'teacher', which is none of" in refusal(path)
    for value, words in [
        (table({}), "it holds no arrays, but nothing"),
        (table({"lr": number(3), "epoch": number(4)}), "no arrays, but 'lr', 'epoch'"),
        (one, "a single array without a name"),
        (number(3), "it is a int, no table"),
        (b"}(" + number(1) + one + b"u", "an entry 1, which is no name"),
        (b"}(" + text("a") + one + text("a") + one + b"u", "it has 'a' twice"),
        (b"}(" + number(1) + b"\x85" + one + b"u", "a tuple for a name"),
    ]:
        assert words in refusal(archive(path, value, storages))
    names = table({"module.a": one, "b": one})  # only where all names begin so
    assert list(files.open_file(archive(path, names, storages)).stored) == ["module.a", "b"]


def test_a_vision_transformer(tmp_path: Path) -> None:
    """The same parameters as from a file of safetensors."""
    arrays = vit_files.timm()
    wanted = vit.trunk(vit_files.write(tmp_path / "vit.safetensors", arrays), target())
    for suffix in (".pth", ".pt", ".bin"):
        path = torch_files.write(tmp_path / f"vit{suffix}", arrays, "model")
        found = vit.trunk(path, target())
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)


# --- By PyTorch --------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_what_torch_saves(packed: bool, protocol: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 6)
    state = collections.OrderedDict(
        {
            f"{kind}".removeprefix("torch."): torch.randn(3, 2).to(kind)
            for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        }
        | {"turned": base.t(), "part": base[1:, ::2], "whole": base, "row": base[2]}
        | {"parameter": torch.nn.Parameter(torch.randn(2)), "none": torch.zeros(0, 2)}
        | {"number": torch.tensor(2.5), "count": torch.tensor(7)}
    )
    state["grown"] = torch.randn(1, 3).expand(1, 3)
    options = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    value = {"epoch": 3, "best": np.float64(0.5), "state_dict": state, "optimizer": options}
    path = tmp_path / "x.pth"
    torch.save(value, path, _use_new_zipfile_serialization=packed, pickle_protocol=protocol)
    opened = files.open_file(path)
    assert list(opened.stored) == list(state)
    for name, wanted in state.items():
        if name == "count":
            assert "holds no floats but int64" in refusal(path, name)
            continue
        found = opened.read(name)
        assert str(found.dtype) == str(wanted.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found.astype(float), wanted.detach().double().numpy())


@pytest.mark.parametrize("packed", [True, False])
def test_half_of_what_torch_saves(packed: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    torch.save({"a": torch.randn(300)}, path, _use_new_zipfile_serialization=packed)
    whole = path.read_bytes()
    for length in (10, 100, 300, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        assert "it is damaged" in refusal(path, "a")


def test_a_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(torch.nn.Linear(2, 2), path)
    sentence = refusal(path)
    assert "asks for torch.nn.modules.linear.Linear, which no weights need" in sentence
    assert "state_dict()" in sentence


# --- Malice ------------------------------------------------------------------------------------


class Reduced:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *given: Any):
        self.call = function, given

    def __reduce__(self) -> Any:
        return self.call


class Evil:
    """Pickles as an object whose state is set."""

    def __setstate__(self, state: Any) -> None:
        Path(state["marker"]).touch()

    def __getstate__(self) -> Any:
        return {"marker": self.marker}

    marker = ""


def programs(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that leave a file where they are run, and the name that each asks for first."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    evil = Evil()
    evil.marker = str(marker)
    shell = f"{os.system.__module__}.system"
    dumped = {
        "system": (Reduced(os.system, command), shell),
        "eval": (Reduced(eval, code), "eval"),
        "exec": (Reduced(exec, code), "exec"),
        "getattr": (Reduced(getattr, Reduced(__import__, "os"), "system"), "getattr"),
        "again": (Reduced(pickle.loads, pickle.dumps(Reduced(os.system, command))), "loads"),
        "state": (evil, "Evil"),
    }
    old = {"state0": "_reconstructor"}
    made = {
        f"{name}{protocol}": (
            pickle.dumps(value, protocol),
            old.get(f"{name}{protocol}", asked),
        )
        for name, (value, asked) in dumped.items()
        for protocol in (0, 2, 4)
    }
    word = text(command)
    made |= {
        "stack_global": (
            b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + word + b"\x85R.", "posix.system"
        ),
        "inst": (b"(" + word + b"iposix\nsystem\n.", "posix.system"),
        "obj": (b"(cposix\nsystem\n" + word + b"o.", "posix.system"),
        "dotted": (
            b"\x80\x04\x8c\x0ctorch._utils\x8c\x09os.system\x93" + word + b"\x85R.",
            "torch._utils.os.system",
        ),
        "extension": (b"\x80\x02\x82\x01.", "EXT1"),
        "by_name": (b"Pposix.system\n.", "PERSID"),
        "dtype": (b"\x80\x02ctorch\nload\n" + word + b"\x85R.", "torch.load"),
        "storage": (b"\x80\x02ctorch\nFloatStorage\n" + word + b"\x85R.", "torch.FloatStorage"),
        "spaces": (b"cposix system\nx\n.", "posix.system"),
        "ends": (b"c\x1b[2Jos\nsystem\n.", "os.system"),
    }  # fmt: skip
    return made


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_is_run(packed: bool, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name, (content, asked) in programs(marker).items():
        path = tmp_path / "x.pth"
        if packed:
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("archive/data.pkl", content)
        else:
            head = [torch_file.MAGIC, torch_file.VERSION, {"little_endian": True}]
            path.write_bytes(b"".join(pickle.dumps(one, 2) for one in head) + content)
        sentence = refusal(path)
        assert asked.rpartition(".")[2] in sentence, (name, sentence)
        assert "nothing of it was run" in sentence and sentence.isprintable(), name
        assert not marker.exists(), name


def test_the_programs_do_run_elsewhere(tmp_path: Path) -> None:
    """Or the test above would show nothing."""
    marker = tmp_path / "ran"
    made = programs(marker)
    for name in ("system2", "eval2", "again4", "state2", "stack_global", "inst"):
        pickle.loads(made[name][0])
        assert marker.exists(), name
        marker.unlink()


def test_harmless_things_stay_without_content() -> None:
    value = {
        "args": argparse.Namespace(lr=0.1, path=Path("x")), "best": np.float64(3), "s": {1, (2, 3)},
        "array": np.arange(3), "bytes": b"abc", "d": collections.defaultdict(list, a=[1]),
    }  # fmt: skip
    for protocol in (2, 3, 4):
        found, _ = pickled.read(pickle.dumps(value, protocol))
        assert found.keys() == value.keys()
        assert found["args"] == pickled.Inert("argparse.Namespace")
        for name in ("best", "s", "array", "d"):
            assert isinstance(found[name], pickled.Inert), name


# --- Damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (tensor("7", (2,)), "a.b lies in storage '7', which is not there"),
        (tensor("0", (9,)), "a.b lies in a storage of 36 bytes, which has 16"),
        (tensor("0", (2,), kind="Double", count=3), "a storage of 24 bytes, which has 16"),
        (tensor("0", (2,), (-1,), 3, 4), "a.b has shape .2,., strides .-1,. and offset 3, none of"),
        (tensor("0", (2,), (1,), -1, 4), "offset -1, none of which may be negative"),
        (tensor("0", (-2, -2), count=4), "a.b has shape .-2, -2."),
        (tensor("0", (4,), (1,), 1, 4), "which reach beyond the 4 elements of its storage"),
        (tensor("0", (2, 2), (3, 1), 0, 4), "which reach beyond the 4 elements"),
        (tensor("0", (2, 2), (2**64, 1), 0, 4), "which reach beyond the 4 elements"),
        (tensor("0", (10**12,), (0,), 0, 4), "a.b has shape .1000000000000,., strides .0,."),
        (tensor("0", (10**12, 10**12), (0, 0), 0, 4), "which reach beyond the 4 elements"),
        (tensor("0", (2**70,)), "a.b lies in a storage of"),
        (tensor("0", (2,), (1, 1), 0, 4), "a.b has 1 axes and 2 strides"),
        (tensor("0", (1,) * 33), "a.b has 33 axes"),
        (tensor("0", (2,), count=-1), "its storage '0' has -1 elements"),
        (tensor("0", (2,)).replace(b"Float", b"Quantised"), "asks for torch.QuantisedStorage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "argument"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))tR", "has no storage"),
        (tensor("0", (2,)).replace(text("storage"), text("module")), "that is no storage"),
        (b"(" + text("x") + b"tQ", "that is no storage"),
        (b"ctorch._utils\n_rebuild_qtensor\n)R", "asks for torch._utils._rebuild_qtensor"),
    ],
)
def test_arrays_that_are_not_in_their_storage(made: bytes, words: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", table({"a.b": made}), {"0": bytes(16)})
    sentence = refusal(path)
    with pytest.raises(UserError, match=words):
        raise UserError(sentence)


@pytest.mark.parametrize(
    "steps",
    [
        b"", b"t", b"0", b"a", b"s", b"R", b"b", b"Q", b"2", b"h\x05", b"q\x00", b"(", b"1",
        b"}K\x01a", b"]K\x01K\x02s", b"}(K\x01u", b"K\x01)R", b"K\x01}b", b"(((", b"NNR",
        b"ccollections\nOrderedDict\nK\x01\x85R", b"ccollections\nOrderedDict\n]K\x01a\x85R",
        b"X\xff\xff\xff\xffa", b"\x8b\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"\x97", b"\xfe",
        b"I12x\n", b"L" + b"9" * 9000 + b"L\n", b"c\xff\n\xff\n", b"}]K\x01s", b"NQ", b"}}K\x01s",
    ],
)  # fmt: skip
def test_pickles_that_are_none(steps: bytes, tmp_path: Path) -> None:
    refusal(archive(tmp_path / "x.pth", steps, {}))


@pytest.mark.parametrize("step", [b"(", b"]", b"\x85", b"(t", b"}", b"N\x85"])
def test_what_is_nested_deep(step: bytes, tmp_path: Path) -> None:
    deep = 100_000
    refusal(archive(tmp_path / "x.pth", b")" + step * deep, {}))
    inside = {b"]": b"]" * deep + b"a" * (deep - 1), b"\x85": b")" + b"\x85" * deep}.get(step)
    if inside is not None:
        made = table({"deep": inside, "a": tensor("0", (1,))})
        opened = files.open_file(archive(tmp_path / "y.pth", made, {"0": bytes(4)}))
        assert list(opened.stored) == ["a"]


def test_programs_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "MOST_STEPS", 5000)
    path = archive(tmp_path / "x.pth", b"N0" * 5000, {})
    assert "it takes more than 5,000 steps" in refusal(path)
    monkeypatch.setattr(pickled, "MOST_MARKS", 100)
    assert "leaves more than 100 marks open" in refusal(archive(path, b"(" * 101, {}))
    # A list that is given to a function again and again.
    again = b"](" + b"N" * 1000 + b"eq\x00" + b"ctorch\nSize\nh\x00\x85R0" * 9
    assert "it takes more than 5,000 steps" in refusal(archive(path, again, {}))


def test_archives_that_are_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    made, storages = table({"a": tensor("0", (1,))}), {"0": bytes(4)}
    assert "a program of TorchScript" in refusal(
        archive(path, made, storages, more={"constants.pkl": b""})
    )
    assert "big-endian" in refusal(archive(path, made, storages, more={"byteorder": b"big"}))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as file:
        for _ in range(2):
            file.writestr("archive/data.pkl", b"N.")
    assert "it has 'archive/data.pkl' twice" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights.npy", b"")
    assert "it has 0 parts data.pkl" in refusal(path)
    assert "packed by method 12" in refusal(archive(path, made, storages, zipfile.ZIP_BZIP2))
    monkeypatch.setattr(torch_file, "MOST_PICKLE", 20)
    assert "its data.pkl has" in refusal(archive(path, made, storages))


def test_what_grows_out_of_all_proportion(tmp_path: Path) -> None:
    size = 100_000_000
    made = table({"a": tensor("0", (size // 4,))})
    path = archive(tmp_path / "x.pth", made, {"0": bytes(size)}, zipfile.ZIP_DEFLATED)
    assert "would grow to 100 MB" in refusal(path)
    many = {f"a{i}": tensor("0", (10**6,)) for i in range(40)}  # each is the whole storage
    path = archive(tmp_path / "y.pth", table(many), {"0": bytes(4 * 10**6)})
    assert "4.0 MB would grow to 160 MB" in refusal(path)


def test_flipped_bits(tmp_path: Path) -> None:
    """In storages each is found by the sum behind them."""
    path = torch_files.write(tmp_path / "x.pth", {"a": np.ones(100, np.float32)})
    sound = path.read_bytes()
    at = sound.index(np.ones(100, np.float32).tobytes())
    path.write_bytes(sound[: at + 50] + b"\x00" + sound[at + 51 :])
    assert "Bad CRC-32" in refusal(path, "a")


def test_checkpoints_from_before_the_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    made = table({"a": tensor("1", (2,)), "b": tensor("2", (2,), kind="Double")})
    content = np.arange(2, dtype="f4").tobytes(), np.arange(2.0).tobytes()
    count = (2).to_bytes(8, "little")
    behind = count + content[1] + count + content[0]
    path.write_bytes(row(made, ["2", "1"], behind))
    opened = files.open_file(path)
    for name in "ab":
        np.testing.assert_array_equal(opened.read(name), [0, 1])
    for keys, rest, words in [
        (["2", "1"], behind[:-1], "storage '1' ends early"),
        (["2", "1"], b"", "ends early"),
        (["2", "1"], b"\xff" * 40, "ends early"),
        (["2", "2"], behind, "its storage '2' is double"),
        (["2", "3"], behind, "its storage '3' is double, or of no array"),
        (["2", 1], behind, "its storage 1 is double, or"),
        (["2"], behind, "a lies in storage '1', which is not there"),
        (3, behind, "does not tell the order"),
    ]:
        path.write_bytes(row(made, keys, rest))
        assert words in refusal(path)
    path.write_bytes(row(made, ["2", "1"], behind, False))
    assert "big-endian" in refusal(path)
    for value, words in [(3, "nor marked as a checkpoint"), ("x" * 9999, "nor marked")]:
        path.write_bytes(pickle.dumps(value))
        assert words in refusal(path)
    path.write_bytes(bytes(257) + b"ustar" + bytes(250))
    assert "is a tar archive" in refusal(path)
