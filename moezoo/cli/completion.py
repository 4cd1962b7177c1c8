"""Print a script that completes `moezoo ...` with the tab key, for bash or zsh.

Example: moezoo completion bash > ~/.local/share/bash-completion/completions/moezoo
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, Union, get_args, get_type_hints

from moezoo.cli.entry import COMMANDS, summary
from moezoo.command import CONFIGURATIONS, WITH_WEIGHTS, Positional, parse

# The script of tyro holds what it knows as one literal, and one function that looks words up in it.
KNOWN = re.compile(r"^COMPLETION_SPEC = (.*)$", re.M)
LOOKUP = re.compile(r"^def get_completions\(", re.M)
FILES = "__TYRO_COMPLETE_FILES__"
# What a script returns for a word that nothing is known of: bash itself then completes files.
ELSE = {"bash": [], "zsh": [FILES]}
ADDED = """
OFFERED = {offered!r}
for path, names in OFFERED.items():
    node = COMPLETION_SPEC
    for command in path.split():
        node = node["subcommands"][command]
    alone = {{**node, "description": "model", "subcommands": {{}}}}
    node["subcommands"] = {{name: alone for name in names}}


def get_completions(words, at, spec):
    found = tyro_completions(words, at, spec)
    if at < len(words) and words[at].startswith("-"):
        return found
    # No options before a dash is typed: they would hide files.
    return [one for one in found if one[:1] != "-" and one != {files!r}] or {other!r}
"""

Node = dict[str, Any]


@dataclass(frozen=True)
class CompletionCommand:
    """Print a script that completes `moezoo ...` with the tab key.

    Example: moezoo completion bash > ~/.local/share/bash-completion/completions/moezoo
    """

    shell: Annotated[Literal["bash", "zsh"], Positional]
    """The shell that will read it."""


def main(words: list[str], prog: str) -> None:
    """Print the script."""
    given = parse(CompletionCommand, words, prog=prog)
    # Subcommands of subcommands have a prefix in tyro, which is not how they are typed.
    kinds = {name: kind for name in COMMANDS if (kind := _kind(name)) is not None} | _below()
    written = _by_tyro(kinds, given)
    found = KNOWN.search(written)
    assert found is not None, "tyro writes its scripts in another form now"
    known = _arranged(ast.literal_eval(found[1]))
    script = written.replace(found[0], f"COMPLETION_SPEC = {known!r}")
    added = ADDED.format(offered=_offered(kinds), files=FILES, other=ELSE[given.shell])
    script = LOOKUP.sub("def tyro_completions(", script)
    script = re.sub(r"^def main\(", lambda m: f"{added}\n\n{m[0]}", script, flags=re.M)
    # Where there is nothing to offer, files are completed as ever.
    print(re.sub(r"^complete -F", "complete -o bashdefault -o default -F", script, flags=re.M))


def _by_tyro(kinds: Mapping[str, Any], given: CompletionCommand) -> str:
    """The script that tyro writes for these commands."""
    import tyro

    from moezoo.train.overrides import MARKERS

    named = tuple(
        Annotated[type(kind), tyro.conf.subcommand(name, default=kind)]
        if not isinstance(kind, type)
        else Annotated[kind, tyro.conf.subcommand(name)]
        for name, kind in kinds.items()
    )
    every: Any = Union[named]  # noqa: UP007 - of what is only known now
    asked, written = ["--tyro-print-completion", given.shell], io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(every, args=asked, prog="moezoo", use_underscores=True, config=MARKERS)
    return written.getvalue()


def _kind(command: str) -> Any:
    """The class of what a command takes, or an example of it; None where a word decides it."""
    module = import_module(f"moezoo.cli.{COMMANDS[command]}")
    if command == "train":
        # The options of the default configuration: others' differ in those of their own system.
        from moezoo.train.config_file import load
        from moezoo.train.overrides import shown

        return shown(load(module.DEFAULT))
    if command == "plan":
        return module.PlanOptions
    return getattr(module, f"{COMMANDS[command].capitalize()}Command", None)


def _below() -> dict[str, type]:
    """The classes of arguments by two words: `bench NAME`, `launch NAME` and `library NAME`."""
    from moezoo.cli import library
    from moezoo.cli.bench import ARGUMENTS
    from moezoo.launch.command import BACK_ENDS

    return {
        f"bench {name}": getattr(import_module(f"moezoo.bench.{name}"), kind)
        for name, kind in ARGUMENTS.items()
    } | {
        f"{parent} {name}": kind
        for parent, kinds in (("launch", BACK_ENDS), ("library", library.ARGUMENTS))
        for name, kind in kinds.items()
    }


def _arranged(known: Node) -> Node:
    """tyro's tree with benchmarks below `bench`, and the options of `train` where they go on."""
    commands: Node = known["subcommands"]
    for parent in ("bench", "launch", "library"):
        below = [name for name in commands if name.startswith(f"{parent} ")]
        own = {
            name.partition(" ")[2]: {**commands.pop(name), "description": name} for name in below
        }
        commands[parent] = {**commands["list"], "options": commands["list"]["options"][:1]}
        commands[parent]["subcommands"] = own
    train = commands["train"]["options"]
    for node in (commands["plan"], *commands["launch"]["subcommands"].values()):
        node["options"] += [one for one in train if one not in node["options"]]
    for name in COMMANDS:
        commands[name]["description"] = summary(name)
    known["subcommands"] = {name: commands[name] for name in COMMANDS}
    return known


def _offered(kinds: Mapping[str, Any]) -> dict[str, list[str]]:
    """By command the names of models that its first word may be."""
    from moezoo.front import catalogue

    names = {
        CONFIGURATIONS: catalogue.list_models(),
        WITH_WEIGHTS: catalogue.list_models(pretrained=True),
    }
    found = {"train": names[CONFIGURATIONS]}
    for command, kind in kinds.items():
        hints = get_type_hints(kind if isinstance(kind, type) else type(kind), include_extras=True)
        for mark in (mark for hint in hints.values() for mark in get_args(hint)[1:]):
            if isinstance(mark, str) and mark in names:
                found[command] = names[mark]
    return found
