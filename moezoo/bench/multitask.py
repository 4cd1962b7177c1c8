"""Adapters of many tasks at once on one frozen decoder: every system trained, scored and timed.

All systems learn the same nine generated instruction tasks from the same base, with the same
optimiser, steps and test examples. What was trained before is taken as it is. Their zero-shot
counterpart, routes over a library of single adapters, is `moezoo bench library`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo.backbones.generate import Settings
from moezoo.bench.claims import Claim, claim_lines, markdown, score_of
from moezoo.bench.steps import overrides, steps
from moezoo.command import parse
from moezoo.configs.text.smora_tiny import NEW
from moezoo.domains.text.adapter import language_model
from moezoo.domains.text.data.instruct import Instructions
from moezoo.domains.text.domain import LM
from moezoo.domains.text.generation import open_speaker
from moezoo.domains.text.inference import Speaker, asks_for_task, complete
from moezoo.domains.text.library import base_of, check_library_base, members_of, open_base
from moezoo.errors import UserError, unknown
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module, surgery
from moezoo.nn.injection import Adapted
from moezoo.ops.routing import dense_weights
from moezoo.timing import TimedCall, interleave, machine, versions
from moezoo.train import config as configs
from moezoo.train import start
from moezoo.train.config import Config
from moezoo.train.console import Console
from moezoo.train.log import NAME, read
from moezoo.train.loop import train
from moezoo.train.resume import check_same_run, finished, trained
from moezoo.weights import library as libraries
from moezoo.weights import library_start
from moezoo.weights.library import Library

MEMBERS = "members"  # the name of what is trained for a library
PROMPTS, NEW_TOKENS = 16, 16  # that are timed
MAY_CHANGE = frozenset({"checkpoint.every", "log.every"})  # of a run that is there


class MultitaskSystem(NamedTuple):
    """A system and the runs that make it, each a configuration with overrides as `bench steps`
    takes them; a run starts from the one before it, the first from the base.

    needs_library: whether it stands on the LoRAs of the single tasks.
    """

    runs: tuple[str, ...]
    needs_library: bool = False


SYSTEMS: dict[str, MultitaskSystem] = {
    "lora": MultitaskSystem(("text/smora_tiny model.update=lora model.ranks=8",)),
    "mixture": MultitaskSystem(("text/smora_tiny model.update=mixture model.top_k=2",)),
    "smora": MultitaskSystem(("text/smora_tiny",)),
    "meteora": MultitaskSystem(("text/meteora_tiny",), needs_library=True),
    "meteora_joint": MultitaskSystem(("text/meteora_tiny",)),
    "polytropon": MultitaskSystem(("text/polytropon_tiny",)),
    "mhr": MultitaskSystem(("text/polytropon_tiny model.heads=8",)),
    "mhr_mu": MultitaskSystem(("text/polytropon_tiny model.heads=8 model.trained=skills",)),
    "cpoly": MultitaskSystem(("text/cpoly_tiny",)),
    "mocle": MultitaskSystem(("text/mocle_tiny",)),
    "adapter_fusion": MultitaskSystem(
        (
            "text/adapter_fusion_adapters_tiny model.tasks=9",
            "text/adapter_fusion_tiny model.tasks=9",
        )
    ),
    "alter": MultitaskSystem(("text/alter_adapters_tiny", "text/alter_tiny")),
}
OWN = "own_lora"  # a LoRA of each task alone, the task told

CLAIMS = (
    Claim("SMoRA is better than a mixture of whole LoRAs", "smora", "mixture"),
    Claim("SMoRA is better than LoRA of its active ranks", "smora", "lora"),
    Claim("MeteoRA is as good as each task's own LoRA", "meteora", OWN, level=True),
    Claim("Polytropon is better than one LoRA that all tasks share", "polytropon", "lora"),
    Claim("MHR is better than Polytropon", "mhr", "polytropon"),
    Claim("even shares (MHR-mu) keep MHR's gain", "mhr_mu", "mhr", level=True),
    Claim("C-Poly is better than Polytropon", "cpoly", "polytropon"),
    Claim("C-Poly is better than MHR", "cpoly", "mhr"),
    Claim("MoCLE is better than one LoRA that all tasks share", "mocle", "lora"),
    Claim("AdapterFusion is better than learning all tasks at once", "adapter_fusion", "lora"),
)


@dataclass(frozen=True)
class MultitaskArguments:
    """Train every system of adapters on nine instruction tasks, from one frozen decoder, and
    compare them.

    Runs that are there are taken as they are, those that were interrupted go on. LoRAs of single
    tasks, on which MeteoRA stands, are trained first where no library is named.
    Example: moezoo bench multitask --out family --seeds 0 1 2
    """

    out: Path
    """Folder of all runs; the table goes to multitask.json and multitask.md in it."""
    base: Path | None = None
    """Folder of the run of the base; default: text/skills_tiny, trained first if necessary."""
    library: Path | None = None
    """Folder of a library with a LoRA of each of the nine tasks, for all seeds."""
    systems: tuple[str, ...] = ()
    """Systems to train; default: all."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initial parameters and of the order of examples."""
    steps: int | None = None
    """Training steps of each run; default: what its configuration says."""
    test: int = 1_300
    """Test examples, of all tasks together."""
    repeats: int = 5
    """Pairs of training steps that are timed; 0 times nothing."""
    trained: bool = False
    """Train nothing: only what is there."""


def configured(text: str, a: MultitaskArguments, name: str, seed: int, first: str) -> Config:
    """The configuration of one run of a system, which starts from `first`."""
    config_name, _, options = text.partition(" ")
    words = overrides(options.strip() or "as_is")
    words += ["--name", name, "--seed", str(seed), "--directory", str(a.out)]
    words += ["--start_from", first, "--data.test", str(a.test)]
    config = configs.load(config_name, words)
    if "data.only=" not in options:
        config = replace(config, data=replace(config.data, only=NEW))  # type: ignore[type-var]
    length = config.train.steps if a.steps is None else a.steps
    every = replace(config.checkpoint, every=length)
    return replace(config, train=replace(config.train, steps=length), checkpoint=every)


def done(config: Config, console: Console, a: MultitaskArguments) -> bool:
    """Whether the run is finished; trains it first unless nothing is to be trained.

    Raises UserError where the folder holds a run of another configuration.
    """
    folder = Path(config.directory) / config.name
    if (folder / "config.json").exists():
        check_same_run(config, folder, MAY_CHANGE)
    if not finished(folder, config.train.steps) and not a.trained:
        train(config, console)
    return finished(folder, config.train.steps)


def exact_matches(folder: Path, at: int) -> dict[str, float]:
    """Exact match of all test examples, under "", and by task, from a run's log."""
    row = next(r for r in reversed(read(folder / NAME)) if r["split"] == "test" and r["step"] == at)
    found = {"": row[f"{LM}/exact_match"]}
    suffix = "/exact_match"
    for name, value in row.items():
        if name.startswith(f"{LM}/") and name.endswith(suffix) and name.count("/") == 2:
            found[name.removeprefix(f"{LM}/").removesuffix(suffix)] = value
    return found


class Trained(NamedTuple):
    """A run of a system that is finished."""

    config: Config
    folder: Path
    scores: dict[str, float]


def trained_system(
    name: str, seed: int, a: MultitaskArguments, console: Console, first: str, library: Any
) -> Trained | None:
    """The last run of a system, trained where it was not; None where nothing is to be trained and
    it is not there."""
    runs, config = SYSTEMS[name].runs, None
    for number, text in enumerate(runs):
        last = number == len(runs) - 1
        folder = f"{name}_{seed}" if last else f"{name}_stage{number + 1}_{seed}"
        config = configured(text, a, folder, seed, first)
        if SYSTEMS[name].needs_library:
            config = over(config, library)
        if not done(config, console, a):
            return None
        first = str(Path(config.directory) / config.name)
    assert config is not None
    return Trained(config, Path(first), exact_matches(Path(first), config.train.steps))


def over(config: Config, library: Path) -> Config:
    """The configuration of a system that stands on a library."""
    model: Any = replace(config.model, library=str(library))  # type: ignore[type-var]
    return replace(config, model=model)


def library_of(a: MultitaskArguments, seed: int, console: Console, first: str) -> Path | None:
    """The library of LoRAs of single tasks; None where it is not there and nothing is trained.

    Raises UserError where one is there that is not that of these runs and this base.
    """
    if a.library is not None:
        return a.library
    folder = a.out / f"library_{seed}"
    texts = {f"{MEMBERS}_{task}_{seed}": f"text/library_member data.only={task}" for task in NEW}
    members = [configured(text, a, name, seed, first) for name, text in texts.items()]
    if folder.exists():
        check_members(Library(folder), members, first)
        return folder
    if not all(done(config, console, a) for config in members):
        return None
    runs = [Path(config.directory) / config.name for config in members]
    base = base_of(runs, Path(first))
    libraries.create(folder, base.told, members_of(runs, base))
    return folder


def check_members(held: Library, members: Sequence[Config], first: str) -> None:
    """Raise UserError where a library is not that of these runs, as far as they are still there."""
    again = f"delete {held.folder}, so that it is built again, or name another --out"
    names = tuple(config.name for config in members)
    if held.names != names:
        raise UserError(f"{held.folder} has other members than {', '.join(names)}: {again}.")
    check_library_base(held, open_base(Path(first)))
    for config in members:
        run = Path(config.directory) / config.name
        if not trained(run):
            continue
        check_same_run(config, run, MAY_CHANGE)
        if not finished(run, config.train.steps):
            raise UserError(
                f"{run} is not finished after {config.train.steps} steps, but {held.folder} was "
                f"built of it before: {again}."
            )
        layers, factors = surgery.find(language_model(run)[0], Adapted), held.factors(config.name)
        own = {path: np.asarray(layer.update.down.get_value()) for path, layer in layers.items()}
        same = (np.array_equal(own.get(path, ()), f.down) for path, f in factors.items())
        if own.keys() != factors.keys() or not all(same):
            raise UserError(f"{held.folder} was built of {run} before it was trained on: {again}.")


def own_loras(first: str, library: Path, count: int) -> dict[str, float]:
    """Exact match of each task's own LoRA, the task told, on the test examples of all systems."""
    from moezoo.domains.text.library_routes import route

    chosen = route("oracle", open_base(Path(first)), Library(library))
    made = Instructions(count, 0, "test", NEW)
    examples = [made[i] for i in range(count)]
    tasks = [e.task for e in examples]
    prompts = [e.turns[0].content for e in examples]
    answers = chosen.answers(prompts, Settings(new=24), tasks=tasks)
    right = np.array([a == e.output for a, e in zip(answers, examples, strict=True)])
    by_task = {t: float(right[[name == t for name in tasks]].mean()) for t in NEW}
    return {"": float(right.mean()), **by_task}


class WhatWorks(NamedTuple):
    """Numbers beside the base: trained, all, and those that one token's answer needs.

    active is None for systems whose adapters are no low-rank updates.
    """

    trained: int
    held: int
    active: float | None


def sizes(folder: Path, prompts: Sequence[str]) -> WhatWorks:
    """Of a run; the active ones by the gates that are not 0 for tokens of the prompts."""
    speaker = _asked(folder)
    model: Any = module.merge(*speaker.parts)
    updates = surgery.find(model, Adapted)
    trained = module.count(speaker.parts.params)
    if not updates:
        return WhatWorks(trained, trained, None)
    rows = [speaker.tokenizer.encode(prompt) for prompt in prompts]
    context = replace(speaker.context, train=False)
    model.features(np.asarray([row[: min(map(len, rows))] for row in rows]), context)
    active, held = 0.0, 0
    for path, layer in updates.items():
        bank = layer.update.down.get_value().size + layer.update.up.get_value().size
        parts = module.split(layer.update)
        both = module.count(parts.params) + module.count(parts.stats)
        held += both
        if layer.router is None:
            active += both
            continue
        record = context.records[path]
        gates_NE = np.asarray(dense_weights(record.routing, layer.update.gates))
        # A decision by the task reads one row of its table, whatever the token; even shares none.
        table = layer.router.decision in ("constant", "task")
        router = min(layer.update.gates, both - bank) if table else both - bank
        active += router + bank * float((gates_NE != 0).mean())
    return WhatWorks(trained, held, active)


def _asked(folder: Path) -> Speaker:
    """The run's decoder, asked for its first task where tasks decide."""
    model, _ = language_model(folder)
    return open_speaker(folder, task=NEW[0] if asks_for_task(model) else None)


def answering(folder: Path, prompts: Sequence[str]) -> TimedCall:
    """A call that makes `NEW_TOKENS` tokens for every prompt; reading the prompts is in it."""
    speaker = _asked(folder)._replace(stop=())  # nobody ends early
    return lambda: complete(speaker, prompts, Settings(new=NEW_TOKENS))


def paired(
    makes: Mapping[str, Callable[[], TimedCall]], repeats: int, console: Console, what: str
) -> dict[str, dict[str, float]]:
    """By system the median milliseconds of a call, and its ratio to the first system's.

    makes: what compiles each system's call.
    """
    if not repeats or not makes:
        return {}
    base, *others = makes
    first = makes[base]()
    found: dict[str, dict[str, float]] = {base: {"ratio": 1.0}}
    for name in others:  # one after the other: all programs at once would need all memories
        *_, last = interleave(first, {name: makes[name]()}, repeats)
        times = last[name]
        found[name] = {
            "milliseconds": 1e3 * float(np.median(times.case)),
            "ratio": float(np.median(times.ratios)),
        }
        found[base].setdefault("milliseconds", 1e3 * float(np.median(times.base)))
        console.say(f"{name}: {found[name]['ratio']:.2f} times {base} for {what}")
    return found


def _step(config: Config) -> TimedCall:
    return steps(config).run


def run(words: list[str]) -> int:
    """Train, score, time; write and print the table with the papers' claims."""
    a, console = parse(MultitaskArguments, words, prog="moezoo bench multitask"), Console()
    _check(a)
    chosen = a.systems or tuple(SYSTEMS)
    first = str(a.base) if a.base is not None else _base(a, console)
    if a.library is not None:
        check_library_base(Library(a.library), open_base(Path(first)))
    runs: dict[str, dict[int, Trained]] = {name: {} for name in chosen}
    own: dict[int, dict[str, float]] = {}
    for seed in a.seeds:
        for name in chosen:
            library = library_of(a, seed, console, first) if SYSTEMS[name].needs_library else None
            if SYSTEMS[name].needs_library and library is None:
                continue
            found = trained_system(name, seed, a, console, first, library)
            if found is not None:
                runs[name][seed] = found
            if library is not None and seed not in own:
                own[seed] = own_loras(first, library, a.test)
    _write(a, console, _rows(a, runs, own, console))
    return 0


def _check(a: MultitaskArguments) -> None:
    for name in a.systems:
        if name not in SYSTEMS:
            raise unknown("system of adapters", name, list(SYSTEMS))
    if not a.seeds or len(set(a.seeds)) < len(a.seeds):
        raise UserError(f"--seeds are {a.seeds}: give at least one, each once.")
    for name, least in (("test", len(NEW)), ("repeats", 0)):
        if getattr(a, name) < least:
            raise UserError(f"--{name} is {getattr(a, name)}: at least {least} is needed.")
    if a.steps is not None and a.steps < 1:
        raise UserError(f"--steps is {a.steps}: at least 1 is needed.")
    if a.library is not None:
        _check_library(a, a.library)
    check_file(a.out / "multitask.json")


def _check_library(a: MultitaskArguments, folder: Path) -> None:
    """Raise UserError where a library is not what the systems that stand on one ask for."""
    above = [name for name in a.systems or SYSTEMS if SYSTEMS[name].needs_library]
    if not above:
        raise UserError(
            f"--library is given, but none of {', '.join(a.systems)} stands on one: leave it out."
        )
    held = Library(folder)
    library_start.ordered(held, NEW)
    for name in above:
        first = str(a.base or a.out / "skills_tiny")
        config = over(configured(SYSTEMS[name].runs[-1], a, name, a.seeds[0], first), folder)
        start.check_bank(config, first)


def _base(a: MultitaskArguments, console: Console) -> str:
    """The folder of `text/skills_tiny`, trained where it was not."""
    config = replace(configs.load("text/skills_tiny", []), directory=str(a.out))
    if not done(config, console, a):
        raise UserError(f"{a.out} has no finished run of text/skills_tiny: name one by --base.")
    start.check(a.out / config.name, config)
    return str(a.out / config.name)


def _rows(
    a: MultitaskArguments,
    runs: Mapping[str, Mapping[int, Trained]],
    own: Mapping[int, Mapping[str, float]],
    console: Console,
) -> list[dict[str, Any]]:
    """A row of the table for every system of which there is a run."""
    there = {name: by_seed for name, by_seed in runs.items() if by_seed}
    one = {name: next(iter(by_seed.values())) for name, by_seed in there.items()}
    made = Instructions(PROMPTS, 0, "test", NEW[:1])
    prompts = [made[i].turns[0].content for i in range(PROMPTS)]
    every = {name: partial(_step, r.config) for name, r in one.items()}
    steps_of = paired(every, a.repeats, console, "a training step")
    asked = {name: partial(answering, r.folder, prompts) for name, r in one.items()}
    tokens = paired(asked, a.repeats, console, f"{NEW_TOKENS} tokens")
    rows: list[dict[str, Any]] = (
        [_scored(OWN, {seed: dict(s) for seed, s in own.items()}, a.test)] if own else []
    )
    for name, by_seed in there.items():
        row = _scored(name, {seed: r.scores for seed, r in by_seed.items()}, a.test)
        row |= {"steps": one[name].config.train.steps, **sizes(one[name].folder, prompts)._asdict()}
        row |= {"step": steps_of.get(name), "tokens": tokens.get(name)}
        rows.append(row)
    return rows


def _scored(name: str, by_seed: Mapping[int, Mapping[str, float]], test: int) -> dict[str, Any]:
    mean, error = score_of([scores[""] for scores in by_seed.values()], test)
    tasks = {t: float(np.mean([s[t] for s in by_seed.values()])) for t in NEW}
    seeds = {str(seed): scores[""] for seed, scores in by_seed.items()}
    return {"system": name, "exact_match": mean, "error": error, "seeds": seeds, "tasks": tasks}


HEADER = ("system", "exact match", "seeds", "steps", "trained", "active", "step", "tokens")


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(name: str, form: Callable[[Any], str]) -> str:
        return "-" if row.get(name) is None else form(row[name])

    return (
        row["system"],
        f"{row['exact_match']:.3f} ± {row['error']:.3f}",
        str(len(row["seeds"])),
        number("steps", str),
        number("trained", "{:,}".format),
        number("active", "{:,.0f}".format),
        number("step", lambda step: f"{step['ratio']:.2f}"),
        number("tokens", lambda made: f"{made['ratio']:.2f}"),
    )


def _write(a: MultitaskArguments, console: Console, rows: list[dict[str, Any]]) -> None:
    if not rows:
        raise UserError(f"{a.out} has no finished run of these systems: train them first.")
    scores = {row["system"]: (row["exact_match"], row["error"]) for row in rows}
    claims = claim_lines(CLAIMS, scores, min(len(row["seeds"]) for row in rows))
    title = f"Nine instruction tasks at once, {a.test} test examples"
    lines = [_line(row) for row in rows]
    console.table(title, HEADER, lines)
    text = [f"# {title}", "", markdown(HEADER, lines), "", _note(a), ""]
    by_task = [(row["system"], *(f"{row['tasks'][t]:.2f}" for t in NEW)) for row in rows]
    text += [markdown(("exact match", *NEW), by_task), ""]
    if claims:
        text += [markdown(("claim", "difference", "here"), claims), ""]
    facts = {"machine": machine(), "versions": versions("jax", "jaxlib")}
    told = [{"claim": c, "difference": d, "verdict": v} for c, d, v in claims]
    content = json_text(facts | {"rows": rows, "claims": told}, 2)
    write_atomically(a.out / "multitask.json", content)
    write_atomically(a.out / "multitask.md", "\n".join(text))
    console.say(f"Wrote {a.out / 'multitask.json'} and multitask.md.")


def _note(a: MultitaskArguments) -> str:
    return (
        "Exact match: mean of the seeds, and its standard error (of one seed that of the test "
        "examples alone). trained, active: parameters beside the base; active: those whose gate "
        "is not 0 for a token. step, tokens: the time of a training "
        f"step, and of {NEW_TOKENS} tokens for {PROMPTS} prompts at once, over the first system's."
    )
