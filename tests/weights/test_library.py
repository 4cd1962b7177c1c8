"""Libraries of adapters in a folder: what is kept, what does not fit, damaged files."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.nn import surgery
from moezoo.weights import library as libraries
from moezoo.weights import library_manifest
from moezoo.weights.library import (
    MANIFEST,
    BaseModel,
    LayerForm,
    Library,
    Member,
    add,
    create,
    remove,
)
from moezoo.weights.library_files import write_arrays
from moezoo.weights.tensor_file import TensorFile
from tests.weights.libraries import decoder, library, member, sha


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 3)
    new = member("a1", 1)
    assert held.names == ("a0", "a1", "a2")
    assert held.of_task("t2") == ("a2",) and held.of_task("a2") == ("a2",)
    for path, factors in held.factors("a1").items():
        np.testing.assert_array_equal(factors.down, new.layers[path].down)
        np.testing.assert_array_equal(factors.up, new.layers[path].up)
        # The prototype is the direction that the update makes longest.
        delta = factors.down @ factors.up
        length = np.linalg.norm(held.prototypes("a1")[path] @ delta)
        np.testing.assert_allclose(length, np.linalg.svd(delta)[1][0], rtol=1e-4)
    assert held.embedding("a1")[1] == 1 and held.layers["layers/0/attn/q"].rank == 2


def test_adding_and_removing(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    held = add(held, [member("other", 7)])
    assert Library(held.folder).names == ("a0", "a1", "other")
    with pytest.raises(UserError, match="other.* has no mean embedding"):
        held.embedding("other")
    with pytest.raises(UserError, match="a0 already: remove it first .moezoo library rem"):
        add(held, [member("a0", 8)])
    held = remove(held, ["a0"])
    assert held.names == ("a1", "other")
    assert not (held.folder / "members" / "a0.safetensors").exists()
    with pytest.raises(UserError, match="would be empty"):
        remove(held, ["a1", "other"])
    with pytest.raises(UserError, match="member of the library"):
        remove(held, ["a0"])


def test_alike_adapters_are_in_one_group(tmp_path: Path) -> None:
    def near(name: str, seed: int, shift: int) -> Any:
        one, noise = member(name, seed), member("noise", 100 + shift)
        layers = {
            p: f._replace(down=f.down + 0.01 * noise.layers[p].down) for p, f in one.layers.items()
        }
        return one._replace(layers=layers)

    members = [near("a", 1, 0), near("b", 1, 1), near("c", 2, 2), near("d", 2, 3)]
    held = create(tmp_path / "lib", BaseModel("tiny", sha(decoder())), members, clusters=2)
    assert sorted(held.clusters.values()) == [("a", "b"), ("c", "d")]
    # Every cluster has a member, after a removal too.
    # A further member is grouped with those that are there.
    further = add(held, [member("e", 5, tasks=("t",))])
    assert sorted(name for group in further.clusters.values() for name in group) == list("abcde")
    held = remove(further, ["e"])
    assert sorted(held.clusters.values()) == [("a", "b"), ("c", "d")]
    assert all(remove(held, ["a", "b", "c"]).clusters.values())
    with pytest.raises(UserError, match="clusters that all have an example"):
        create(tmp_path / "all", held.base, [member("x", 1), member("y", 1)], clusters=2)
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"rank": 3}, "has rank 3 .* have 2"), ({"scale": 0.25}, "has scale 0.25 .* have 0.5")],
)
def test_another_rank_or_scale_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    held = library(tmp_path / "lib", 2)
    with pytest.raises(UserError, match=said):
        add(held, [member("odd", 9, **changes)])
    assert Library(held.folder).names == ("a0", "a1")
    assert len(list((held.folder / "members").iterdir())) == 2


def test_other_targets_and_sizes_are_refused(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    odd = member("odd", 9)
    fewer = dict(odd.layers)
    path, factors = fewer.popitem()
    with pytest.raises(UserError, match=f"does not adapt {path}"):
        add(held, [odd._replace(layers=fewer)])
    wide = {path: factors._replace(down=np.zeros((9, 2), np.float32))}
    with pytest.raises(UserError, match="made for another base"):
        add(held, [odd._replace(layers=fewer | wide)])
    with pytest.raises(UserError, match="cannot name a member"):
        add(held, [member("../up", 9)])


def _change(folder: Path, change: Any) -> None:
    path = folder / MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


HOSTILE = {
    "a name that is a path": lambda v: v["members"][0].update(name="../../etc/passwd"),
    "a member twice": lambda v: v["members"].append(v["members"][0]),
    "no layers": lambda v: v.update(layers={}),
    "a huge rank": lambda v: v["layers"]["layers/0/attn/q"].update(rank=10**9),
    "a scale that is no number": lambda v: v["layers"]["layers/0/attn/q"].update(scale="x"),
    "another format": lambda v: v.update(format=2),
    "no base": lambda v: v.pop("base"),
    "a terminal's characters": lambda v: v["members"][0].update(tasks=["\x1b[2J"]),
    "no members": lambda v: v.update(members=[]),
    "an unknown entry": lambda v: v.update(general={"x": 1}),
    "an unknown entry of a member": lambda v: v["members"][0].update(note="x"),
    "an unknown entry of the base": lambda v: v["base"].update(revision="x"),
    "an unknown entry of a layer": lambda v: v["layers"]["layers/0/attn/q"].update(bias=1),
    "an embedding of another width": lambda v: v["members"][1].update(embedding=5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_one_sentence(tmp_path: Path, name: str) -> None:
    held = library(tmp_path / "lib", 2)
    _change(held.folder, HOSTILE[name])
    with pytest.raises(UserError, match="build the library again") as error:
        Library(held.folder)
    assert "\n" not in str(error.value)


def test_unknown_entries_are_named(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    _change(held.folder, lambda v: v["members"][1].update(note="x"))
    with pytest.raises(UserError, match=r"members\[1\].note is not known"):
        Library(held.folder)


def test_further_arrays_of_a_member_are_refused(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    path = held.folder / "members" / "a0.safetensors"
    file = TensorFile(path)
    arrays = {name: file.read(name, np.array) for name in file.entries}
    write_arrays(path, arrays | {"layers/0/attn/q.bias": np.ones(8, np.float32)})
    with pytest.raises(UserError, match=r"holds layers/0/attn/q\.bias, of which .* says nothing"):
        held.factors("a0")
    assert held.factors("a1")


def test_writers_of_one_library_keep_what_others_wrote(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    one, other, third = (Library(held.folder) for _ in range(3))
    add(one, [member("e", 5)])
    assert add(other, [member("f", 6)]).names == ("a0", "a1", "e", "f")
    before = Library(held.folder).factors("e")["layers/0/attn/q"].down
    with pytest.raises(UserError, match="has a member called e already"):
        add(third, [member("e", 8)])
    after = Library(held.folder).factors("e")["layers/0/attn/q"].down
    np.testing.assert_array_equal(after, before)
    assert remove(held, ["a0"]).names == ("a1", "e", "f")
    with pytest.raises(UserError, match="member of the library"):
        remove(one, ["a0"])


def test_threads_change_a_library_in_turn(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 1)
    new = [member(f"b{i}", i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda one: add(Library(held.folder), [one]), new))
    names = Library(held.folder).names
    assert sorted(names) == ["a0", *(f"b{i}" for i in range(6))]
    assert sorted(p.stem for p in (held.folder / "members").iterdir()) == sorted(names)


def test_a_library_that_was_exchanged_is_not_changed(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    _change(held.folder, lambda v: v["base"].update(sha256="0" * 64))
    with pytest.raises(UserError, match="another library meanwhile"):
        add(held, [member("e", 5)])


def _files(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which is empty."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.name: p.read_bytes() for p in found}


def test_an_add_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = library(tmp_path / "lib", 2)
    before = _files(held.folder)
    with pytest.raises(UserError, match="printable"):
        add(held, [member("d", 4, tasks=("x\ny",))])
    with monkeypatch.context() as patch:
        patch.setattr(library_manifest, "LARGEST", 10_000)
        with pytest.raises(UserError, match="name fewer tasks"):
            add(held, [member("d", 4, tasks=tuple(f"task {i}" for i in range(2000)))])
    assert _files(held.folder) == before

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = libraries.write_atomically
    for error in (full, lambda *given: kept(*given) or 1 / 0):
        with monkeypatch.context() as patch:
            patch.setattr(libraries, "write_atomically", error)
            with pytest.raises((OSError, ZeroDivisionError)):
                add(held, [member("d", 4)])
        if error is full:
            assert _files(held.folder) == before
    # What is in the manifest already when an interrupt comes keeps its file.
    assert Library(held.folder).factors("d")


def test_a_manifest_holds_as_many_members_as_it_may(tmp_path: Path) -> None:
    many = [Member(f"adapter_{i:06}", (f"task_{i:06}",), f"adapter_{i:06}", 7) for i in range(2000)]
    text = library_manifest.manifest_text(
        library_manifest.LibraryManifest(
            BaseModel("b", "0" * 64), {"a": LayerForm(1, 1, 1, 1.0)}, tuple(many)
        )
    )
    assert len(text) / 2000 * 200_000 < library_manifest.LARGEST


def test_a_folder_that_takes_no_files_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = library(tmp_path / "lib", 2)
    before, write = _files(held.folder), Path.write_bytes

    def refuse(path: Path, content: bytes) -> int:
        if path.parent.name == "members":
            raise PermissionError(errno.EACCES, "Permission denied")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    for change in (lambda: remove(held, ["a0"]), lambda: add(held, [member("z", 3)])):
        with pytest.raises(UserError, match="members: Permission denied; check the permissions"):
            change()
        assert _files(held.folder) == before


def test_a_member_whose_file_stays_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    held = library(tmp_path / "lib", 2)
    unlink = Path.unlink

    def refuse(path: Path, *given: Any, **options: Any) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, *given, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="a0 left the library .* could not be deleted"):
        remove(held, ["a0"])
    assert Library(held.folder).names == ("a1",)


def test_what_killed_writers_left_is_cleared_away(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    old, new = (held.folder / "members" / f".{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    remove(held, ["a0"])
    assert new.exists() and not old.exists()


BAD = {
    "layers/0/attn/q": lambda m: m.layers["layers/0/attn/q"].down.__setitem__((0, 0), np.nan),
    "the gate of layers/0/attn/q": lambda m: m.gates["layers/0/attn/q"].__setitem__(0, np.inf),
    "its mean embedding": lambda m: m.embedding_M.__setitem__(0, np.nan),
    "its mean gradient": lambda m: m.gradient_M.__setitem__(0, -np.inf),
}


@pytest.mark.parametrize("place", BAD)
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, place: str) -> None:
    new = member("n", 1, embedding_M=np.ones(8, np.float32))
    gates = {path: np.ones(f.down.shape[0], np.float32) for path, f in new.layers.items()}
    new = new._replace(gates=gates, gradient_M=np.ones(4, np.float32))
    BAD[place](new)
    with pytest.raises(UserError, match=f"n has numbers in {place} that are not finite"):
        create(tmp_path / "lib", BaseModel("tiny", "0" * 64), [new])
    assert not (tmp_path / "lib").exists()


def test_an_update_that_overflows_is_refused(tmp_path: Path) -> None:
    held, new = library(tmp_path / "lib", 2), member("n", 1)
    for factors in new.layers.values():
        factors.down[:], factors.up[:] = 3e38, 3e38
    with pytest.raises(UserError, match="product is not finite"):
        add(held, [new])


def test_an_update_of_zeros_has_a_prototype_of_zeros(tmp_path: Path) -> None:
    held, new = library(tmp_path / "lib", 2), member("n", 1)
    new.layers["layers/0/attn/q"].up[:] = 0
    prototypes = add(held, [new]).prototypes("n")
    lengths = {path: np.linalg.norm(vector) for path, vector in prototypes.items()}
    assert lengths.pop("layers/0/attn/q") == 0
    np.testing.assert_allclose(list(lengths.values()), 1.0, rtol=1e-5)


def test_widths_and_gates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    wide = member("wide", 1, embedding_M=np.ones(5, np.float32))
    with pytest.raises(UserError, match="wide has a mean embedding of 5 numbers, .* a0 has 8"):
        add(held, [wide])
    partly = member("p", 1)._replace(gates={"layers/0/attn/q": np.ones(8, np.float32)})
    with pytest.raises(UserError, match="p has no gate of layers/0/attn/k that fits"):
        add(held, [partly])


def test_names_that_differ_in_capitals_are_refused(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    with pytest.raises(UserError, match="called a0, whose file would be that of A0"):
        add(held, [member("A0", 3)])
    with pytest.raises(UserError, match="Two of the adapters are called B, capitals apart"):
        add(held, [member("b", 3), member("B", 4)])


def test_alike_members_that_are_left_make_fewer_groups(tmp_path: Path) -> None:
    twins = [member("p", 1), member("q", 1), member("r", 2)]
    held = create(tmp_path / "lib", BaseModel("tiny", "0" * 64), twins, clusters=2)
    assert remove(held, ["r"]).clusters == {0: ("p", "q")}


def test_unknown_tasks_are_told_with_tasks_and_members(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    with pytest.raises(UserError, match="no member; its tasks: t0, t1; its members: a0"):
        held.of_task("z")
    with pytest.raises(UserError, match="'t00' is no task and no member, perhaps t"):
        held.of_task("t00")


def test_damaged_members_are_one_sentence(tmp_path: Path) -> None:
    held = library(tmp_path / "lib", 2)
    file = held.folder / "members" / "a0.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(UserError, match="truncated"):
        held.factors("a0")
    _change(held.folder, lambda v: v["layers"]["layers/0/attn/q"].update(rank=1))
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"has in shape \[8, 2\]"):
        Library(held.folder).factors("a0")
    file.unlink()
    with pytest.raises(UserError, match="There is no"):
        held.factors("a0")
    (held.folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Library(held.folder)
    with pytest.raises(UserError, match="name a library's folder"):
        Library(tmp_path / "nowhere")


def test_the_fingerprint_is_of_every_number() -> None:
    one, other = decoder(), decoder()
    assert sha(one) == sha(other)
    kernel = surgery.get(other, "layers/0/mlp/up").kernel
    kernel.set_value(kernel.get_value() + np.float32(1e-3))
    assert sha(one) != sha(other)
    assert libraries.fingerprint({"a": np.zeros(4)}) != libraries.fingerprint({"b": np.zeros(4)})
