"""A folder of files, one for each rank: read as one, and refused where they are not of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.weights import ranks
from tests.weights import torch_files

Arrays = dict[str, np.ndarray]
RNG = np.random.default_rng(0)
UP, DOWN = "blocks.1.mlp.experts.htoh4.weight", "blocks.1.mlp.experts.h4toh.bias"
ROUTERS = [f"blocks.1.mlp.gate.{task}.w_gate" for task in range(2)]


def whole() -> Arrays:
    """An encoder's arrays: six experts, two routers, and something else."""
    made: Arrays = {"cls_token": RNG.normal(size=(1, 1, 4)).astype("f")}
    made |= {UP: RNG.normal(size=(6, 5, 4)).astype("f"), DOWN: RNG.normal(size=(6, 4)).astype("f")}
    return made | {name: RNG.normal(size=(4, 6)).astype("f") for name in ROUTERS}


def files_of(state: Arrays, count: int) -> list[Arrays]:
    """What each rank keeps: the first everything and its experts, the others theirs alone."""
    split = {name: np.split(a, count) for name, a in state.items() if ranks.EXPERTS.fullmatch(name)}
    rest = {name: array for name, array in state.items() if name not in split}
    own = [{name: parts[rank] for name, parts in split.items()} for rank in range(count)]
    # In the order of the model, as a state dictionary has it.
    first = {name: (own[0] | rest)[name] for name in state}
    return [first, *own[1:]]


def write(folder: Path, files: list[Arrays]) -> Path:
    folder.mkdir(exist_ok=True)
    for rank, arrays in enumerate(files):
        torch_files.write(folder / f"{rank}.pth", arrays, "state_dict", "module.")
    return folder


def ranks_of(state: Arrays, folder: Path, count: int) -> Path:
    return write(folder, files_of(state, count))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_experts_of_all_ranks_stand_behind_each_other(count: int, tmp_path: Path) -> None:
    state = whole()
    found = ranks.Ranks(ranks_of(state, tmp_path / "checkpoint.pth.tar", count))
    assert list(found.stored) == list(state)
    for name, array in state.items():
        assert found.stored[name].shape == array.shape
        np.testing.assert_array_equal(found.read(name), array)


def test_ranks_beyond_nine_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    state = {UP: np.arange(24, dtype=np.float32).reshape(12, 2, 1)}
    found = ranks.Ranks(ranks_of(state, tmp_path / "many", 12))
    np.testing.assert_array_equal(found.read(UP), state[UP])


def test_what_others_have_too_must_be_the_same(tmp_path: Path) -> None:
    state = whole()
    files = files_of(state, 2)
    files[1] |= {"cls_token": state["cls_token"], "counter": np.array(3, np.int64)}
    files[0] |= {"counter": np.array(3, np.int64)}
    np.testing.assert_array_equal(ranks.Ranks(write(tmp_path / "a", files)).read(UP), state[UP])
    files[1]["cls_token"] = state["cls_token"] + 1
    with pytest.raises(UserError, match=r"0.pth' and '.*1.pth' contradict each other: cls_token"):
        ranks.Ranks(write(tmp_path / "a", files))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda files: files[1].pop(DOWN), f"0.pth' has experts called {DOWN}, but '.*1.pth' has"),
        (lambda files: files[0].pop(DOWN), f"1.pth' has experts called {DOWN}, but '.*0.pth' has"),
        (lambda files: files[1].update({UP: files[1][UP][:, :2]}), rf"{UP} is \[2, 5, 4\] float32"),
        (
            lambda files: files[1].update({UP: files[1][UP].astype("f2")}),
            r"but \[2, 5, 4\] float16",
        ),
        (lambda files: files[1].update(stray=np.ones(3, "f")), "1.pth' has stray, which '.*0.pth'"),
        (lambda files: files.pop(), r"has 4 experts in its 2 files, but .*w_gate chooses among 6"),
        (lambda files: files.append(files[1]), "has 8 experts in its 4 files, but .* among 6"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_by_name(
    change: Callable[[list[Arrays]], object], sentence: str, tmp_path: Path
) -> None:
    files = files_of(whole(), 3)
    change(files)
    with pytest.raises(UserError, match=sentence):
        ranks.Ranks(write(tmp_path / "checkpoint.pth.tar", files))


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = ranks_of(whole(), tmp_path / "checkpoint.pth.tar", 3)
    (folder / "1.pth").unlink()
    with pytest.raises(UserError, match="has 0.pth, 2.pth, but no 1.pth: put the files of all"):
        ranks.Ranks(folder)
    (folder / "0.pth").unlink()
    with pytest.raises(UserError, match="has 2.pth, but no 0.pth"):
        ranks.Ranks(folder)


def test_other_folders_are_none_of_ranks(tmp_path: Path) -> None:
    assert not ranks.is_folder(tmp_path) and not ranks.is_folder(tmp_path / "none")
    for name in ("model.pth", "01.pth", "0.pt"):
        (tmp_path / name).write_bytes(b"")
    assert not ranks.is_folder(tmp_path)
    assert ranks.is_folder(ranks_of(whole(), tmp_path / "a", 1))
