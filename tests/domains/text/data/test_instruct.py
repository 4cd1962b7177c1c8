"""Procedural instruction tasks: rules by slow oracles, splits, determinism."""

from __future__ import annotations

import string
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.domains.text.data.example import Turn
from moezoo.domains.text.data.instruct import (
    COMPOSED,
    KNOWN,
    LONGEST,
    RULES,
    TASKS,
    UNSEEN,
    Instructions,
    numbers,
    phrase,
    phrases_of,
    split_of,
)
from moezoo.errors import UserError
from tests.fixtures import ROOT

ABC = string.ascii_lowercase


def listed(text: str) -> list[str]:
    return [character for character in text]


def oracle(task: str, text: str) -> str:
    """The answers once more, a letter at a time."""
    letters = listed(text)
    if task in ("add", "subtract", "larger", "compare"):
        a, b = (int(part) for part in text.split(" "))
        if task == "compare":
            return {-1: "<", 0: "=", 1: ">"}[(a > b) - (a < b)]
        return str({"add": a + b, "subtract": a - b, "larger": a if a > b else b}[task])
    after = dict(zip(ABC, ABC[1:] + ABC[0], strict=True)) | {" ": " "}
    before = {v: k for k, v in after.items()}
    half = len(letters) - len(letters) // 2
    answers = {
        "copy": lambda: letters,
        "count_a": lambda: [str(sum(1 for c in letters if c == "a"))],
        "double": lambda: [c for c in letters for _ in range(1 if c == " " else 2)],
        "initials": lambda: [c for i, c in enumerate(letters) if i == 0 or letters[i - 1] == " "],
        "last_word": lambda: letters[text.rfind(" ") + 1 :],
        "next": lambda: [after[c] for c in letters],
        "no_vowels": lambda: [c for c in letters if c not in "aeiou"],
        "previous": lambda: [before[c] for c in letters],
        "reverse": lambda: list(reversed(letters)),
        "sort": lambda: [c for letter in ABC for c in letters if c == letter],
        "swap_halves": lambda: letters[half:] + letters[:half],
        "upper": lambda: [c if c == " " else string.ascii_uppercase[ABC.index(c)] for c in letters],
        "vowels": lambda: [c for c in letters if c in "aeiou"],
    }
    return "".join(answers[task]())


PHRASES = st.lists(st.text(ABC, min_size=1, max_size=5), min_size=1, max_size=3).map(" ".join)


@given(text=PHRASES, pair=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_rules_are_those_of_the_oracle(text: str, pair: tuple[int, int]) -> None:
    for task, rule in RULES.items():
        given_text = text if rule.inputs == "words" else f"{pair[0]} {pair[1]}"
        assert rule.answer(given_text) == oracle(task, given_text), task


def test_the_rules_conflict() -> None:
    words = [name for name, rule in RULES.items() if rule.inputs == "words"]
    assert len({RULES[name].answer("kabo tide") for name in words}) == len(words) >= 10
    sums = [name for name, rule in RULES.items() if rule.inputs == "numbers"]
    assert len({RULES[name].answer("23 45") for name in sums}) == len(sums) == 4


@pytest.mark.parametrize("split", ("train", "test"))
def test_examples_are_short_exact_and_of_their_split(split: str) -> None:
    examples = Instructions(1700, 3, split)
    assert examples.tasks == TASKS == tuple(sorted(RULES)) and len(TASKS) >= 10
    for index in range(len(examples)):
        example = examples[index]
        rule = RULES[example.task]
        assert example.task == TASKS[index % len(TASKS)]
        assert example.instruction in rule.wordings
        assert example.output == rule.answer(example.input) and example.output
        assert split_of(example.input) == split
        assert len(example.input) <= LONGEST
        assert len(f"{example.instruction}\n{example.input}\n{example.output}") <= 48


def test_every_wording_is_used_and_says_one_task() -> None:
    used = {
        (e.task, e.instruction)
        for e in map(Instructions(3400, 0, "train").__getitem__, range(3400))
    }
    assert used == {(name, wording) for name, rule in RULES.items() for wording in rule.wordings}
    assert len({wording for _, wording in used}) == len(used) == 3 * len(RULES)


def test_unseen_tasks_and_pairs_are_generated_where_they_are_named() -> None:
    assert not (UNSEEN.keys() | COMPOSED.keys()) & set(TASKS)
    made = Instructions(60, 0, "test", (*UNSEEN, *COMPOSED))
    for example in map(made.__getitem__, range(60)):
        assert split_of(example.input) == "test" and example.output
        if example.task in UNSEEN:
            assert example.output == UNSEEN[example.task].answer(example.input)
            continue
        first, second = example.task.split("_then_")
        assert example.output == RULES[second].answer(RULES[first].answer(example.input))
        one, other = example.instruction.split(" then ")
        assert one in RULES[first].wordings and other in RULES[second].wordings
    # A wording says one task, whoever it belongs to.
    every = [w for rule in KNOWN.values() for w in rule.wordings]
    assert len(set(every)) == len(every)


def test_test_inputs_never_occur_in_training() -> None:
    inputs = {
        split: {Instructions(2000, seed, split)[i].input for seed in (0, 1) for i in range(2000)}
        for split in ("train", "test")
    }
    assert not inputs["train"] & inputs["test"]
    share = len(inputs["test"]) / sum(map(len, inputs.values()))
    assert 0.4 < share < 0.6  # as many are drawn in either split


def test_examples_depend_on_seed_split_and_index_alone() -> None:
    short, long = Instructions(10, 5, "train"), Instructions(500, 5, "train")
    assert [short[i] for i in (9, 3)] == [long[9], long[3]]
    assert [Instructions(10, 6, "train")[i] for i in range(10)] != [short[i] for i in range(10)]
    code = "from moezoo.domains.text.data.instruct import Instructions\n"
    code += "print([Instructions(10, 5, 'train')[i].input for i in range(10)])"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert said.stdout.strip() == str([short[i].input for i in range(10)])


def test_the_same_examples_on_every_machine() -> None:
    """Recorded once; Python promises the sequence of `Random.random` in all versions."""
    found = [Instructions(4, 0, "test", ("copy", "add"))[i] for i in range(4)]
    assert [(e.instruction, e.input, e.output) for e in found] == RECORDED


RECORDED = [
    ("plus", "60 14", "74"),
    ("copy", "siwo", "siwo"),
    ("plus", "50 98", "148"),
    ("repeat", "kelo bo", "kelo bo"),
]


def test_an_instruction_is_a_conversation() -> None:
    example = Instructions(1, 0, "train", ("copy",))[0]
    question, answer = example.turns
    assert question == Turn("user", f"{example.instruction}\n{example.input}")
    assert answer == Turn("assistant", example.input)


@given(st.integers(0, 10**6))
def test_inputs_are_within_their_limits(seed: int) -> None:
    rng = Random(seed)
    text = phrase(rng)
    assert 0 < len(text) <= LONGEST and text == text.strip() and set(text) <= {*ABC, " "}
    assert all(0 <= int(n) <= 99 and str(int(n)) == n for n in numbers(rng).split(" "))
    own = phrases_of(("alpha", "be"))(rng)
    assert len(own) <= LONGEST and all("alpha".startswith(w) or w == "be" for w in own.split())


def test_words_of_a_list() -> None:
    examples = Instructions(300, 0, "train", ("vowels", "copy"), phrases_of(("try", "sky", "into")))
    assert all(examples[i].output for i in range(300))
    impossible = Instructions(1, 0, "train", ("vowels",), phrases_of(("try",)))
    with pytest.raises(UserError, match="None of 10000 drawn inputs .* task vowels"):
        impossible[0]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(
        UserError, match="Unknown instruction task 'reversed': did you mean reverse"
    ):
        Instructions(5, 0, "train", ("reversed",))
    with pytest.raises(UserError, match="Unknown split 'dev'"):
        Instructions(5, 0, "dev")
    with pytest.raises(UserError, match="0 examples"):
        Instructions(0, 0, "train")
    with pytest.raises(UserError, match="of 0 tasks"):
        Instructions(5, 0, "train", ())
    with pytest.raises(IndexError):
        Instructions(5, 0, "train")[5]
