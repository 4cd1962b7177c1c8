"""The comparison of routes over a library: its groups of tasks, its rows and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moezoo.bench import library as bench
from moezoo.bench.library import CLAIMS, LORAHUB, MEMBERS, NEVER, OTHER, PAIRED, groups_of, run
from moezoo.domains.text.data.example import plain
from moezoo.domains.text.data.instruct import COMPOSED, RULES, TASKS, UNSEEN
from moezoo.domains.text.data.tokenizer import ByteTokenizer
from moezoo.domains.text.library import BaseDecoder
from moezoo.domains.text.library_routes import ROUTES
from moezoo.errors import UserError
from moezoo.weights.library import BaseModel, Library, create
from tests.weights.libraries import decoder, member, sha

HELD = ("double", "no_vowels", "sort")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Library:
    members = [member(f"a{i}", i, tasks=(task,)) for i, task in enumerate(HELD)]
    folder = tmp_path_factory.mktemp("library") / "lib"
    return create(folder, BaseModel("tiny", sha(decoder())), members)


def test_groups_are_what_members_know_and_what_nobody_does(held: Library) -> None:
    groups = groups_of(held)
    assert groups[MEMBERS] == HELD and groups[PAIRED] == ("double_then_no_vowels",)
    assert groups[NEVER] == tuple(UNSEEN) and set(groups[OTHER]) == set(TASKS) - set(HELD)
    both = COMPOSED["double_then_no_vowels"].answer
    assert both("kabo") == RULES["no_vowels"].answer(RULES["double"].answer("kabo")) == "kkbb"


class Knows:
    """A route that answers some tasks rightly."""

    def __init__(self, *tasks: str):
        self.tasks = tasks

    def answers(self, prompts: Any, settings: Any, seed: int, names: Any) -> list[str]:
        asked: dict[str, int] = {}
        found = []
        for prompt, name in zip(prompts, names, strict=True):
            example = bench.examples_of(name, "test", 2, seed)[asked.get(name, 0)]
            asked[name] = asked.get(name, 0) + 1
            assert bench.prompt_of(example) == prompt
            found.append(example.output if name in self.tasks else "?")
        return found


def test_rows_are_means_over_tasks_and_seeds(
    held: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "open_base", lambda path, template: SimpleNamespace())
    half = tuple(UNSEEN)[:2]
    routes = {"base alone": Knows("copy"), "oracle": Knows(*HELD), "arrow": Knows("sort", *half)}
    routes["uniform"] = Knows()
    monkeypatch.setattr(bench, "routes_of", lambda a, base, library, seed: routes)
    file = tmp_path / "found.json"
    words = [str(held.folder), "base", "--count", "2", "--seeds", "0", "1", "--json", str(file)]
    assert run(words) == 0
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if "route" in line)
    assert [word for word in header.split() if word.isalpha()] == [  # none is broken in two
        "route", "members", "pairs", "unseen", "other", "s",
    ]  # fmt: skip
    assert "arrow, seed 0: members 0.33, pairs 0.00, unseen 0.50, other 0.00; 0 s" in printed
    assert (
        "0.50±0." in printed
        and "members: tasks that a member was trained on; 3 tasks, 12 pro" in printed
    )
    told = json.loads(file.read_text())
    rows = {row["route"]: row for row in told["rows"]}
    groups = rows["arrow"]["groups"]
    assert groups[MEMBERS]["exact_match"] == pytest.approx(1 / 3)
    assert groups[NEVER]["exact_match"] == 0.5 and groups[PAIRED]["exact_match"] == 0
    assert rows["arrow"]["tasks"]["sort"] == 1 and rows["arrow"]["tasks"]["double"] == 0
    assert set(rows["oracle"]["groups"]) == {MEMBERS}
    assert rows["base alone"]["groups"][OTHER]["exact_match"] == pytest.approx(1 / 14)
    said = {claim["claim"]: claim["verdict"] for claim in told["claims"]}
    assert said["Arrow comes near the oracle on tasks seen"] == "does not hold"
    assert said["Arrow is better than even shares on unseen tasks"] == "holds"
    assert "MoCLE is better than even shares" not in said  # nobody measured it


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--count 0", "at least 1"),
        ("--seeds 2 2", "each once"),
        ("--routes arow", "route over a library 'arow'"),
    ],
)
def test_bad_words_are_one_sentence(words: str, says: str, held: Library) -> None:
    with pytest.raises(UserError, match=says):
        run([str(held.folder), "base", *words.split()])


def test_members_without_generated_tasks_have_no_oracle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what embeddings decide, where they came without examples: known in time."""
    made = decoder()
    told = BaseModel("tiny", sha(made))
    held = create(tmp_path / "lib", told, [member("x", 1, tasks=("a.b",)), member("y", 2)])
    base = BaseDecoder("tiny", made, ByteTokenizer(), plain, sha(made))
    chosen = bench.routes_of(bench.LibraryArguments(held.folder, tmp_path), base, held, 0)
    assert set(chosen) == {bench.BASE, LORAHUB, "arrow", "uniform"} | {
        "arrow, factors", "uniform, factors",
    }  # fmt: skip

    def opened(path: Path) -> Any:
        raise AssertionError("the base was read before")

    monkeypatch.setattr(bench, "open_base", opened)
    for name, says in (("oracle", "told tasks, but no member"), ("nearest", "no mean embedding")):
        with pytest.raises(UserError, match=says):
            run([str(held.folder), "base", "--routes", "uniform", name])


def test_claims_name_routes_that_are_there() -> None:
    named = {name for claims in CLAIMS.values() for c in claims for name in (c.one, c.other)}
    assert named <= {*ROUTES, LORAHUB, bench.BASE}
