"""The command `moezoo plan`: a configuration, a topology, and what a chip would have to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moezoo.errors import UserError
from moezoo.json_text import json_text
from moezoo.ops.grouped import speak_of_choices
from moezoo.planning import layer as pod
from moezoo.planning import step as pod_step
from moezoo.timing import machine, versions
from moezoo.train import config as configs
from moezoo.train.config import Config
from moezoo.train.config_json import to_json
from moezoo.train.files import check_file, write_atomically

USAGE = """usage: moezoo plan CONFIG --topology NAME [--json PATH] [--section.option VALUE ...]

Compile the configuration's training step for a TPU pod and say what one chip holds, computes and
sends, and whether it fits. Nothing runs and no TPU is needed, only the extra `pod` (libtpu). Large
models take minutes. All options of train.py can be given (python train.py CONFIG --help).

  CONFIG            a configuration, for example rooms/m3vit_tiny
  --topology NAME   the pod, for example v5p:8x8x8 or v6e:16x16
  --json PATH       also write the numbers to this file

Example: moezoo plan rooms/m3vit_tiny --topology v5e:2x4 --mesh.expert 4"""


def run(words: list[str]) -> int:
    """Compile, print, write; 0, or 1 where the step does not fit into a chip."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name.startswith("-"):
        raise UserError("Name a configuration first, for example: moezoo plan rooms/m3vit_tiny.")
    topology, rest = take(rest, "--topology")
    file, rest = take(rest, "--json")
    if topology is None:
        raise UserError("--topology is missing, for example: --topology v5p:8x8x8.")
    check_file(file)
    speak_of_choices()
    config = configs.load(name, rest)
    row = pod_step.measure(config, topology, pod.devices_of(topology))
    print("\n".join(lines(row)))
    if file is not None:
        write(Path(file), config, row)
        print(f"wrote {file}")
    return 1 if row.fits is False else 0


def take(words: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value after `option`, and the words without both; UserError where it has none."""
    words = [part for word in words for part in _parted(word, option)]
    if option not in words:
        return None, words
    at = words.index(option)
    if at + 1 == len(words) or words[at + 1].startswith("--"):
        raise UserError(f"{option} needs a value.")
    return words[at + 1], words[:at] + words[at + 2 :]


def _parted(word: str, option: str) -> list[str]:
    """`--option=value` as two words."""
    return word.split("=", 1) if word.startswith(f"{option}=") else [word]


def lines(row: pod_step.StepRow) -> Iterator[str]:
    """What the compiler said, for people."""
    yield (
        f"{row.topology} ({row.mesh}): {row.parameters:,} parameters, batch {row.batch:,}, "
        f"compiled in {row.compile_seconds:.0f} s"
    )
    room = "" if row.chip_bytes is None else f" of {row.chip_bytes / 1e9:.0f}"
    yield (
        f"a chip holds {row.memory_bytes / 1e9:.2f}{room} GB: state {row.state_bytes / 1e9:.2f}, "
        f"temporaries {row.temporary_bytes / 1e9:.2f}"
    )
    yield f"a chip computes {row.flops / 1e12:.3g} TFLOP of matrix products in a step"
    if row.token_ratio is not None:
        yield (
            f"each of {row.moe_layers} MoE layers sends {row.token_bytes / 1e6:.1f} MB for tokens, "
            f"{row.token_ratio:.2f} times the least"
        )
    yield f"everything else sends {row.weight_bytes / 1e9:.2f} GB in a step"
    if row.fits is not None:
        yield "it fits" if row.fits else "it DOES NOT FIT"


def write(file: Path, config: Config, row: pod_step.StepRow) -> None:
    """The numbers, the configuration, the versions and the machine."""
    result = {
        "benchmark": "plan",
        "config": json.loads(to_json(config)),
        "row": row._asdict(),
        "machine": machine(),
        "versions": versions("jax", "jaxlib", "libtpu", "flax"),
    }
    write_atomically(file, json_text(result, 1))
