"""Libraries of adapters in a folder: what is kept, what does not fit, damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.nn import surgery
from moezoo.weights import library as libraries
from moezoo.weights.library import MANIFEST, BaseModel, Library, add, create, remove
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
    with pytest.raises(UserError, match="two members called a0"):
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
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_one_sentence(tmp_path: Path, name: str) -> None:
    held = library(tmp_path / "lib", 2)
    _change(held.folder, HOSTILE[name])
    with pytest.raises(UserError, match="build the library again") as error:
        Library(held.folder)
    assert "\n" not in str(error.value)


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
