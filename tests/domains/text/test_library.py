"""Libraries of runs and PEFT folders, from the commands on; every route against its definition."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.generate import Settings
from moezoo.cli import generate, library
from moezoo.domains.text import adapter, lorahub
from moezoo.domains.text import library as collecting
from moezoo.domains.text.data.example import plain
from moezoo.domains.text.data.tokenizer import ByteTokenizer
from moezoo.domains.text.domain import TextDataConfig
from moezoo.domains.text.generation import open_speaker
from moezoo.domains.text.gradients import gradient_features
from moezoo.domains.text.inference import tokens_of
from moezoo.domains.text.library import BaseDecoder, members_of, open_base
from moezoo.domains.text.library_routes import (
    ROUTES,
    RouteOptions,
    StaticRoute,
    check_route,
    kind_of,
    member_of,
    route,
)
from moezoo.domains.text.lorahub import composed, searched
from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.context import Context
from moezoo.nn.injection import fold
from moezoo.weights import hf, peft
from moezoo.weights.library import LayerForm, Library, add, create, remove
from moezoo.weights.library_bank import attach_bank, attach_fresh, attach_merged, shares_routers
from tests.domains.text.conftest import PROMPTS
from tests.weights.libraries import CONFIG, decoder, member

TASKS = ["t2", "t0", "t1"]
SETTINGS = Settings(new=4)


def answers(base: BaseDecoder, held: Library, name: str, **options: Any) -> list[str]:
    chosen = route(name, base, held, RouteOptions(**options))
    return chosen.answers(PROMPTS, SETTINGS, tasks=TASKS if name == "oracle" else ())


@pytest.mark.slow
def test_routes_by_row_answer_as_the_member_that_they_choose(
    base: BaseDecoder, held: Library
) -> None:
    own = {f"t{i}": answers(base, held, f"task:t{i}") for i in range(3)}
    assert len({tuple(found) for found in own.values()}) == 3
    assert answers(base, held, "task:a1") == own["t1"]
    assert answers(base, held, "oracle") == [own[t][i] for i, t in enumerate(TASKS)]
    # Every prompt is the example of one member.
    nearest = [own[f"t{i}"][i] for i in range(3)]
    assert answers(base, held, "nearest") == nearest
    # As cold as this, the nearest member has the whole weight.
    assert answers(base, held, "mocle", temperature=1e-4) == nearest


def test_answers_of_routes_by_row_say_who_made_them(base: BaseDecoder, held: Library) -> None:
    short = Settings(new=1)

    def by(name: str) -> list[dict[str, float]]:
        tasks = TASKS if name == "oracle" else ()
        return [dict(a.by) for a in route(name, base, held).answered(PROMPTS, short, tasks=tasks)]

    assert by("nearest") == [{"a0": 1.0}, {"a1": 1.0}, {"a2": 1.0}]
    assert by("uniform") == by("tle") == [{}] * 3  # always the same, and another for every token
    for shares, first in zip(by("mocle"), ("a0", "a1", "a2"), strict=True):
        assert next(iter(shares)) == first and sum(shares.values()) == pytest.approx(1)


def test_a_library_asks_its_folder_as_it_is_asked_alone(
    folder: Path, base: BaseDecoder, held: Library, tmp_path: Path
) -> None:
    shutil.copytree(folder, named := tmp_path / "tiny")
    (named / "generation_config.json").write_text('{"eos_token_id": [5, 0, 7]}')
    for own, template in ((folder, None), (named, None), (named, "plain")):
        alone, opened = open_speaker(own, template), open_base(own, template)
        routed = route("uniform", opened, held).speaker(opened.model)
        assert routed.stop == alone.stop and routed.template is alone.template
        assert tokens_of(routed, "a b") == tokens_of(alone, "a b")
    assert open_base(named).stop == (5, 0, 7)
    # Examples that are shown still have an end.
    assert lorahub._document(base, "a", "b").tokens.tolist() == [1, 3, 4, base.tokenizer.eos]


def test_folding_what_a_route_gives_leaves_its_base_alone(base: BaseDecoder, held: Library) -> None:
    """The same command writes a merged folder and answers: not from what it wrote."""
    before = {p: np.asarray(a) for p, a in module.flatten(module.split(base.model).params).items()}
    fold(route("task:t1", base, held).model())
    after = module.flatten(module.split(base.model).params)
    for path, array in before.items():
        np.testing.assert_array_equal(after[path], array)


@pytest.mark.slow
def test_token_level_adaptation_weighs_all_text_so_far(base: BaseDecoder, held: Library) -> None:
    """By hand for one prompt: the weights of the text, then a token from those, and again."""
    chosen: Any = route("tle", base, held, RouteOptions(every=1))
    text = collecting.prompt_tokens(base, PROMPTS[0])
    start = len(text)
    vectors = [held.embedding(name) for name in held.names]
    for _ in range(SETTINGS.new):
        (own,) = collecting.embeddings(base, [text])
        like = np.array([own @ v / np.linalg.norm(own) / np.linalg.norm(v) for v in vectors])
        like[like.argmax()] *= 4
        weights = np.exp(like) / np.exp(like).sum()
        model = decoder()
        pairs = dict(zip(held.names, map(float, weights), strict=True))
        attach_merged(model, held, pairs, "downs")
        text.append(int(np.asarray(model(jnp.asarray([text])).logits_BTV)[0, -1].argmax()))
        if text[-1] in chosen.speaker(model).stop:
            break
    stop = chosen.speaker(base.model).stop
    wanted = base.tokenizer.decode(t for t in text[start:] if t not in stop)
    assert chosen.answers(PROMPTS[:1], SETTINGS) == [wanted]


@pytest.mark.slow
def test_elrea_adds_up_logits_of_the_base_and_of_members(base: BaseDecoder, held: Library) -> None:
    """By hand for one prompt: all answer alone, and the sum chooses each token."""
    chosen: Any = route("elrea", base, held)
    text = collecting.prompt_tokens(base, PROMPTS[2])
    start, stop = len(text), chosen.speaker(base.model).stop
    weights = chosen.weights([text])[0]
    own = gradient_features(base.model, held.layers, [text], base.tokenizer.pad)[0]
    like = np.array([own @ held.gradient(n) for n in held.names])  # all of length 1
    scores = np.exp((like - like.mean()) / like.std())
    np.testing.assert_allclose(weights, scores / scores.sum(), rtol=1e-4)
    assert weights.argmax() == 2 and like[2] > 0.999
    models = [decoder() for _ in range(4)]
    for name, model in zip(held.names, models[1:], strict=True):
        attach_merged(model, held, {name: 1.0})
    for _ in range(SETTINGS.new):
        logits = [np.asarray(m(jnp.asarray([text])).logits_BTV)[0, -1] for m in models]
        text.append(int(np.argmax(logits[0] + np.tensordot(weights, np.stack(logits[1:]), 1))))
        if text[-1] in stop:
            break
    wanted = base.tokenizer.decode(t for t in text[start:] if t not in stop)
    assert chosen.answers(PROMPTS, SETTINGS)[2] == wanted
    # Each prompt has weights of its own, and each weight is its member's.
    chosen.weights = lambda rows: 1e4 * np.eye(3)[[1, 2, 0]]
    own = [answers(base, held, f"task:{task}") for task in ("t1", "t2", "t0")]
    assert chosen.answers(PROMPTS, SETTINGS) == [own[i][i] for i in range(3)]


def test_a_prompt_that_is_like_all_members_gets_their_mean(
    base: BaseDecoder, held: Library
) -> None:
    gates: Callable = route("nearest", base, held).gates  # type: ignore[attr-defined]

    class Same:
        options = RouteOptions()

        def shares(self, rows: Any) -> np.ndarray:
            return np.zeros((len(rows), 3))

    np.testing.assert_allclose(gates(Same(), [[1]], ()), [[1 / 3] * 3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arrow", "mbc"])
def test_arrow_answers_the_same_batch_or_alone(base: BaseDecoder, held: Library, name: str) -> None:
    together = answers(base, held, name)
    chosen = route(name, base, held)
    assert [chosen.answers([p], SETTINGS)[0] for p in PROMPTS] == together
    with pytest.raises(UserError, match="mixes adapters anew"):
        chosen.model()


def test_uniform_leaves_as_a_peft_folder(
    base: BaseDecoder, folder: Path, held: Library, tmp_path: Path, capsys: Any
) -> None:
    for combination in ("outputs", "factors"):
        out = tmp_path / combination
        words = [str(folder), *PROMPTS, "--library", str(held.folder), "--route", "uniform"]
        words += ["--combine", combination, "--write-peft", str(out), "--new", "4"]
        generate.main(words, "moezoo generate")
        printed = capsys.readouterr().out
        assert printed.count("\n") == len(PROMPTS)  # answers only
        for prompt, answer in zip(
            PROMPTS, answers(base, held, "uniform", combination=combination), strict=True
        ):
            assert f"{prompt!r}: {answer}" in printed
        model = decoder()
        peft.attach(model, peft.read(out, model))
        merged: Any = route("uniform", base, held, RouteOptions(combination)).model()
        tokens = jnp.asarray([[1, 3, 4, 5]])
        np.testing.assert_allclose(
            model(tokens).logits_BTV, merged(tokens).logits_BTV, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("combination", ["outputs", "factors"])
@pytest.mark.parametrize("name", ["uniform", "task:t1"])
def test_static_routes_leave_as_a_merged_folder(
    base: BaseDecoder,
    folder: Path,
    held: Library,
    tmp_path: Path,
    capsys: Any,
    combination: str,
    name: str,
) -> None:
    """Against the routed bank under the same gates, and by hand: W + s A B."""
    out = tmp_path / "merged"
    words = [str(folder), "--library", str(held.folder), "--route", name]
    words += ["--combine", combination] if name == "uniform" else []
    words += ["--write-merged", str(out)]
    generate.main(words, "moezoo generate")
    said = capsys.readouterr()
    assert not said.out and "Wrote the merged decoder" in said.err and "No prompt" in said.err
    weights = np.full(3, 1 / 3) if name == "uniform" else np.eye(3)[1]
    tokens = np.array([[1, 3, 4, 5, 2, 7]])
    routed = decoder()
    attach_bank(routed, held, held.names, shares_routers(held.names), combination)
    context = Context(attributes_RA=jnp.asarray(weights[None], jnp.float32))
    wanted = routed(jnp.asarray(tokens), context=context).logits_BTV
    merged = open_base(out)
    found = merged.model(jnp.asarray(tokens)).logits_BTV
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    bare = np.asarray(base.model(jnp.asarray(tokens)).logits_BTV)
    assert np.abs(found - bare).max() > 0.01
    path = "layers/0/attn/q"
    members = [held.factors(n)[path] for n in held.names]
    own = np.asarray(surgery.get(base.model, path).kernel.get_value())
    if combination == "outputs":
        update = sum(w * one.down @ one.up for w, one in zip(weights, members, strict=True))
    else:
        pairs = [one[:2] for one in members]
        pair = [np.tensordot(weights, np.stack(a), 1) for a in zip(*pairs, strict=True)]
        update = pair[0] @ pair[1]
    kernel = surgery.get(merged.model, path).kernel.get_value()
    np.testing.assert_allclose(kernel, own + 2.0 * update, rtol=1e-4, atol=1e-5)
    # It is asked like its base.
    assert merged.tokenizer.encode("a b") == base.tokenizer.encode("a b")
    told = [json.loads((f / "config.json").read_text()) for f in (folder, out)]
    assert told[0]["architectures"] == told[1]["architectures"]
    with pytest.raises(UserError, match="exists already"):
        generate.main(words, "moezoo generate")


def test_a_merged_folder_of_a_run_on_bytes_has_their_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextDataConfig()
    monkeypatch.setattr(adapter, "language_data", lambda run: data)
    model = replace(CONFIG, vocabulary=ByteTokenizer().vocabulary).build(nnx.Rngs(0))
    attach_fresh(model, {"layers/0/attn/q": LayerForm(8, 8, 2, 1.0)})
    said = adapter.write_folded(tmp_path / "run", model, tmp_path / "out")
    assert said.startswith("Wrote the merged decoder")
    made = open_base(tmp_path / "out")
    assert made.tokenizer.encode("añ") == ByteTokenizer().encode("añ")
    assert hf.stop_tokens(tmp_path / "out") == (ByteTokenizer.eos,)
    assert made.template is plain  # as the run's prompts were written


def test_peft_folders_become_members_by_the_commands(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    donor = create(tmp_path / "donor", open_base(folder).told, [member("x", 1), member("y", 2)])
    for name in donor.names:
        model = decoder()
        attach_merged(model, donor, {name: 1.0})
        peft.save(tmp_path / name, model, "hub/tiny")
    examples = tmp_path / "prompts.txt"
    examples.write_text("a b\nc\n")
    out = str(tmp_path / "lib")
    words = ["build", str(tmp_path / "x"), "--base", str(folder), "--out", out]
    with pytest.raises(UserError, match="x came without examples"):
        library.main([*words, "--gradients"], "moezoo library")
    words += ["--tasks", "t", "--examples", str(examples), "--gradients"]
    library.main(words, "moezoo library")
    add_words = ["add", out, str(tmp_path / "y"), "--base", str(folder)]
    library.main(add_words, "moezoo library")
    library.main(["list", out], "moezoo library")
    printed = capsys.readouterr().out
    assert "  x: t\n" in printed and f"moezoo generate {folder} PROMPT --library {out}" in printed
    assert "2 adapters of tiny, on 7 linear layers, rank 2, scale" in printed
    assert "x       t              examples, gradient\n" in printed
    assert "y       no task named  -\n" in printed
    assert "task:NAME, arrow, uniform, oracle\n" in printed
    assert "Not nearest, mocle, tle: y has no examples\n" in printed
    held = Library(tmp_path / "lib")
    for path, factors in held.factors("x").items():
        np.testing.assert_allclose(
            factors.scale * factors.down @ factors.up,
            0.5 * donor.factors("x")[path].down @ donor.factors("x")[path].up,
            rtol=1e-5,
            atol=1e-6,
        )
    gradient = held.gradient("x")  # the mean of two vectors of length 1
    assert gradient.shape == (256,) and 0.05 < np.linalg.norm(gradient) < 1
    with pytest.raises(UserError, match="y .* has no gradient"):
        route("elrea", open_base(folder), held)
    with pytest.raises(UserError, match="y .* has no mean embedding"):
        route("nearest", open_base(folder), held).answers(PROMPTS, SETTINGS)
    library.main(["remove", out, "y"], "moezoo library")
    with pytest.raises(UserError, match="single adapter.*task:x"):
        route("arrow", open_base(folder), Library(tmp_path / "lib"))
    with pytest.raises(UserError, match="exists already"):
        library.main([*words], "moezoo library")
    for odd, said in ((["merge"], "action"), (["remove", out, "z"], "member of the library")):
        with pytest.raises(UserError, match=said):
            library.main(odd, "moezoo library")


def test_adapters_of_another_base_are_refused(folder: Path, tmp_path: Path) -> None:
    base = open_base(folder)
    donor = create(tmp_path / "donor", base.told, [member("x", 1)])
    model = decoder()
    attach_merged(model, donor, {"x": 1.0})
    peft.save(tmp_path / "other", model, "hub/another-model")
    with pytest.raises(UserError, match="trained on another-model, not on tiny"):
        members_of([tmp_path / "other"], base)
    with pytest.raises(UserError, match="name its folder by --base"):
        collecting.base_of([tmp_path / "other"], None)
    with pytest.raises(UserError, match="whose arrays are others"):
        route("task:x", base._replace(sha256="0" * 64), donor)
    with pytest.raises(UserError, match="leave --tasks"):
        members_of([folder], base, ["t"])
    with pytest.raises(UserError, match="route over a library"):
        route("arow", base, donor)
    with pytest.raises(UserError, match="task of the library"):
        route("task:z", base, add(donor, [member("y", 2)]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--route", "uniform"], "--route needs --library"),
        (["--library", "L"], "--library needs --route"),
        (["--library", "L", "--route", "arrow", "--tasks", "t0"], "--tasks is for route oracle"),
        (["--library", "L", "--route", "oracle"], "3 prompts need as many tasks"),
        (["--library", "L", "--route", "arrow", "--top-k", "0"], "at least one adapter"),
        (["--library", "L", "--route", "arrow", "--top-k", "4"], "arrow has 3 adapters"),
        (["--library", "L", "--route", "mbc", "--top-k", "3"], "mbc has 2 adapters"),
        (["--library", "L", "--route", "tle", "--top-k", "1"], "--top-k is 1, which route tle"),
        (["--library", "L", "--route", "elrea", "--combine", "downs"], "which route elrea"),
        (["--library", "L", "--route", "task:a0", "--combine", "downs"], "which route task:a0"),
        (["--library", "L", "--route", "oracle", "--tasks", "t0", "t1", "x"], "task of the libra"),
        (["--library", "L", "--route", "phatgoose"], "has no gate"),
        (["--top-k", "0"], "--top-k needs --library"),
        (
            ["--library", "L", "--route", "task:a0", "--write-peft", "X", "--write-merged", "./X"],
            "one path twice",
        ),
        (["--library", "L", "--route", "arrow", "--write-peft", "out"], "mixes adapters anew"),
        (["--library", "L", "--route", "arrow", "--write-merged", "out"], "mixes adapters anew"),
        (["--write-merged", "out"], "--write-merged needs --library"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(
    folder: Path,
    held: Library,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(held.folder) if word == "L" else word for word in words]
    with pytest.raises(UserError, match=said):
        generate.main([str(folder), *PROMPTS, *given], "moezoo generate")
    assert not list(tmp_path.iterdir())


def test_lorahub_finds_weights_that_lower_the_loss(base: BaseDecoder, held: Library) -> None:
    target = np.array([0.5, -1.0, 0.0])
    found = searched(lambda w: float(((w - target) ** 2).sum()), 3, np.random.default_rng(0), 300)
    np.testing.assert_allclose(found, target, atol=0.1)
    pairs = [("a b", "c d"), ("c", "e")]
    weights = composed(base, held, pairs, evaluations=12)
    assert set(weights) == set(held.names) and any(weights.values())
    assert weights == composed(base, held, pairs, evaluations=12)
    with pytest.raises(UserError, match="needs examples"):
        composed(base, held, [])
    with pytest.raises(UserError, match="evaluations is 0"):
        composed(base, held, pairs, evaluations=0)
    with pytest.raises(UserError, match="the loss is nan"):
        searched(lambda w: float("nan"), 3, np.random.default_rng(0), 3)


@pytest.mark.parametrize("combination", ["outputs", "factors", "downs"])
def test_static_weights_are_the_same_decoder_written_and_routed(
    base: BaseDecoder, held: Library, combination: str
) -> None:
    """Of some of the members: downs would add the others' second factors in a bank of all."""
    tokens = np.array([[1, 3, 4, 5, 2, 7]])

    def logits(speaker: Any) -> np.ndarray:
        context = speaker.context
        model = module.merge(*speaker.parts)
        return np.asarray(model(tokens, context=context).logits_BTV)

    for weights in ({"a1": 1.0}, {"a2": 0.7, "a0": -0.4}, {"a0": 0.0, "a1": 0.0}):
        chosen = StaticRoute(base, held, RouteOptions(combination), weights)
        written, routed = chosen.speaker(chosen.model()), chosen.asked(PROMPTS[:1])
        np.testing.assert_allclose(logits(written), logits(routed), rtol=1e-4, atol=1e-5)
        assert chosen.labels == tuple(weights)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({}, "No adapter has a weight"),
        ({"a0": float("nan")}, "weight of adapter a0 is nan"),
        ({"z": 1.0}, "member of the library"),
    ],
)
def test_weights_that_mean_nothing_are_refused(
    base: BaseDecoder, held: Library, weights: dict[str, float], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        StaticRoute(base, held, RouteOptions(), weights)


@pytest.mark.parametrize(
    "options",
    [{"best": 0}, {"temperature": 0.0}, {"temperature": float("nan")}, {"every": 0},
     {"combination": "sums"}],
)  # fmt: skip
def test_options_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="|".join([*options, "top-k"])):
        RouteOptions(**options)


def test_a_route_refuses_options_that_it_does_not_read(held: Library) -> None:
    given = {"combination": "downs", "best": 2, "temperature": 1.0, "every": 1}
    for name in (*ROUTES, "task:a0"):
        for option, value in given.items():
            options = RouteOptions(**{option: value})
            if option in kind_of(name).reads:
                if name != "phatgoose":  # these members have no gates
                    check_route(name, held, options)
            else:
                with pytest.raises(UserError, match=f"which route {name} does not read"):
                    check_route(name, held, options)


def test_a_members_own_name_means_that_member(base: BaseDecoder, tmp_path: Path) -> None:
    members = [member("one", 1, tasks=("two",)), member("two", 2, tasks=("sort",))]
    members += [member("three", 3, tasks=("sort", "shift")), member("four", 4, tasks=("two",))]
    made = create(tmp_path / "lib", base.told, members)
    named = {"one": "one", "two": "two", "shift": "three"}
    assert {name: member_of(made, name) for name in named} == named
    with pytest.raises(UserError, match=r"2 members trained on sort \(two, three\).*task:two"):
        check_route("task:sort", made, RouteOptions())
    remove(made, ["two"])
    with pytest.raises(UserError, match="one, four"):
        member_of(Library(made.folder), "two")


def test_numbers_that_overflow_are_no_answer(base: BaseDecoder, tmp_path: Path) -> None:
    one = member("big", 1)
    huge = {p: f._replace(up=1e18 * f.up, down=1e18 * f.down) for p, f in one.layers.items()}
    made = create(tmp_path / "lib", base.told, [one._replace(layers=huge), member("c", 2)])
    with pytest.raises(UserError, match="logits of prompt 0 are not finite"):
        route("uniform", base, made).answers(["a"], Settings(new=2))


def test_a_run_with_its_own_updates_says_that_they_take_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data = TextDataConfig()
    model = replace(CONFIG, vocabulary=ByteTokenizer().vocabulary).build(nnx.Rngs(0))
    monkeypatch.setattr(collecting, "language_model", lambda run: (collecting.copied(model), data))
    bare = open_base(tmp_path)
    assert not bare.left_out
    held = create(tmp_path / "lib", bare.told, [member("x", 1), member("y", 2)])
    attach_fresh(model, {"layers/0/attn/q": LayerForm(8, 8, 2, 1.0)})
    words = [str(tmp_path), "a", "--new", "1", "--library", str(held.folder)]
    generate.main([*words, "--route", "task:x"], "moezoo generate")
    assert "trained updates of 1 layers, which take no part" in capsys.readouterr().err


def test_the_list_knows_what_routes_need(
    base: BaseDecoder, held: Library, tmp_path: Path, capsys: Any
) -> None:
    library.main(["list", str(held.folder)], "moezoo library")
    printed = capsys.readouterr().out
    assert "task:NAME, arrow, mbc, uniform, oracle, nearest, mocle, tle, elrea\n" in printed
    assert "Not phatgoose: a0 has no gate\n" in printed and "numbers them anew" in printed
    with pytest.raises(UserError, match="Member a0 of .* has no gate: .*library remove"):
        route("phatgoose", base, held)
    create(tmp_path / "one", base.told, [member("x", 1)])
    library.main(["list", str(tmp_path / "one")], "moezoo library")
    assert "Not arrow, mbc, phatgoose, uniform" in capsys.readouterr().out


def test_names_are_refused_before_anything_is_read(held: Library, tmp_path: Path) -> None:
    twice = [str(tmp_path / place / "x") for place in ("here", "there")]
    with pytest.raises(UserError, match="Two of the adapters are called x"):
        library.main(["build", *twice, "--out", str(tmp_path / "lib")], "moezoo library")
    with pytest.raises(UserError, match="has a member called a1 already: remove it first"):
        library.main(["add", str(held.folder), str(tmp_path / "a1")], "moezoo library")


def test_the_help_has_a_line_for_each_action(capsys: Any) -> None:
    library.main(["--help"], "moezoo library")
    printed = capsys.readouterr().out
    assert "\n  remove    Take members out of a library." in printed
    assert all(f"\n  {name}" in printed for name in library.ACTIONS)


def test_a_data_set_counts_once(folder: Path, held: Library, tmp_path: Path) -> None:
    words = ["retrieve", str(held.folder), str(folder), "a", "--documents", "d", "--examples"]
    with pytest.raises(UserError, match="names a.jsonl twice"):
        library.main([*words, "a.jsonl", "./a.jsonl"], "moezoo library")


def test_every_route_is_tried_here() -> None:
    tried = {"arrow", "mbc", "uniform", "oracle", "nearest", "mocle", "tle", "phatgoose"}
    tried |= {"elrea"}
    assert tried == set(ROUTES)
