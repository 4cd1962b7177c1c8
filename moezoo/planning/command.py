"""The command `moezoo plan`: a configuration, a topology, and what a chip would have to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moezoo.errors import UserError, unknown
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.ops.grouped import speak_of_choices
from moezoo.planning import layer as pod
from moezoo.planning import shapes
from moezoo.planning import step as pod_step
from moezoo.planning.picture import picture
from moezoo.planning.step import STEPS, StepRow
from moezoo.timing import machine, versions
from moezoo.train import chips
from moezoo.train import config as configs
from moezoo.train.config import Config
from moezoo.train.config_json import to_json

USAGE = """usage: moezoo plan CONFIG --topology NAME [--step train|evaluation]
                   [--source compiled|shapes] [--search] [--json PATH] [--picture PATH]
                   [--section.option VALUE ...]

Say what one chip of a pod holds, computes and sends in a step of the configuration, whether it
fits, and how fast it can be at most. Nothing runs. For a TPU pod the step is compiled, which needs
no TPU, only the extra `pod` (libtpu); large models take minutes. For GPUs, and to rank meshes, it
is reckoned from the shapes of all arrays. All options of train.py can be given (python train.py
CONFIG --help).

  CONFIG            a configuration, for example rooms/m3vit_tiny
  --topology NAME   the pod, for example v5p:8x8x8 or v6e:16x16; of each slice, if --mesh.slices is
                    given. Or GPUs: a100-40gb:8, a100-80gb:8, h100:8, h200:8
  --step NAME       train, which is the default, or evaluation
  --source NAME     compiled, which is the default for TPUs, or shapes, which takes seconds
  --search          rank all sizes of data, fsdp and expert, from shapes
  --json PATH       also write the numbers to this file
  --picture PATH    also draw memory and times, a PNG

Example: moezoo plan rooms/m3vit_tiny --topology v5e:2x4 --mesh.expert 4"""
SHOWN = 12  # meshes of a search that are printed; the file has all


def run(words: list[str]) -> int:
    """Reckon, print, write; 0, or 1 where the step does not fit into a chip."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name.startswith("-"):
        raise UserError("Name a configuration first, for example: moezoo plan rooms/m3vit_tiny.")
    topology, rest = take(rest, "--topology")
    file, rest = take(rest, "--json")
    drawing, rest = take(rest, "--picture")
    kind, rest = take(rest, "--step")
    source, rest = take(rest, "--source")
    searched, rest = "--search" in rest, [word for word in rest if word != "--search"]
    if topology is None:
        raise UserError("--topology is missing, for example: --topology v5p:8x8x8.")
    if kind is not None and kind not in STEPS:
        raise unknown("step", kind, list(STEPS))
    if source is not None and source not in SOURCES:
        raise unknown("source", source, list(SOURCES))
    if source == "compiled" and (searched or is_card(topology)):
        raise UserError("--source compiled is for one mesh of a TPU pod: leave it out.")
    for path in (file, drawing):
        check_file(path)
    speak_of_choices()
    config = configs.load(name, rest)
    default = "shapes" if is_card(topology) else "compiled"
    rows = rank if searched else SOURCES[source or default]
    found = rows(config, topology, kind or "train")
    print("\n".join(ranking(found) if searched else lines(found[0])))
    if file is not None:
        write(Path(file), config, found)
        print(f"wrote {file}")
    if drawing is not None:
        write_atomically(Path(drawing), picture(found[:SHOWN]))
        print(f"wrote {drawing}")
    return 1 if found[0].fits is False else 0


def is_card(topology: str) -> bool:
    """Whether it is made of GPUs."""
    return topology.partition(":")[0] in chips.CARDS


def compiled(config: Config, topology: str, kind: str) -> list[StepRow]:
    """The mesh of the configuration, as the compiler has it."""
    devices = pod.devices_of(topology, config.mesh.slices)
    return [pod_step.measure(config, topology, devices, kind)]


def reckoned(config: Config, topology: str, kind: str) -> list[StepRow]:
    """The mesh of the configuration, from shapes."""
    count = shapes.count_of(topology, config)
    configs.validate(config, count)
    return [shapes.estimate(config, topology, count, shapes.look(config, kind))]


SOURCES = {"compiled": compiled, "shapes": reckoned}


def rank(config: Config, topology: str, kind: str) -> list[StepRow]:
    """All meshes, from shapes, the best first."""
    count = shapes.count_of(topology, config)
    return shapes.search(config, topology, count, shapes.look(config, kind))


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


def lines(row: StepRow) -> Iterator[str]:
    """What a chip holds, computes, sends, and takes at least, for people."""
    how = f"compiled in {row.compile_seconds:.0f} s" if row.source == "compiled" else "from shapes"
    yield (
        f"{row.topology} ({row.mesh}), {row.step}: {row.parameters:,} parameters, batch "
        f"{row.batch:,}, {how}"
    )
    room = "" if row.chip_bytes is None else f" of {row.chip_bytes / 1e9:.0f}"
    yield (
        f"a chip holds {row.memory_bytes / 1e9:.2f}{room} GB: parameters "
        f"{row.parameter_bytes / 1e9:.2f}, optimiser {row.optimiser_bytes / 1e9:.2f}, activations, "
        f"gradients and buffers {row.temporary_bytes / 1e9:.2f}, batch {row.batch_bytes / 1e9:.2f}"
    )
    yield f"a chip computes {row.flops / 1e12:.3g} TFLOP of matrix products in a step"
    if row.token_ratio is not None:
        yield (
            f"each of {row.moe_layers} MoE layers sends {row.token_bytes / 1e6:.1f} MB for tokens, "
            f"{row.token_ratio:.2f} times the least"
        )
    yield f"everything else sends {row.weight_bytes / 1e9:.2f} GB in a step"
    yield from traffic_lines(row)
    yield from bound_lines(row)
    for one in row.balance:
        yield (
            f"of {one.experts} experts each has {one.choices:,.0f} choices in the mean; by chance "
            f"the busiest has {one.expert:.2f} times that, and the busiest device of the expert "
            f"axis {one.device:.2f} times its mean"
        )
    if row.fits is not None:
        yield "it fits" if row.fits else "it DOES NOT FIT"


def traffic_lines(row: StepRow) -> Iterator[str]:
    """A table of what is sent, one line per kind of operation and axes."""
    if not row.traffic:
        return
    yield f"  {'operation':<18} {'axes':<18} {'times':>6} {'in a slice':>20} {'between slices':>20}"
    for one in row.traffic:
        inside = _sent(one.ici_bytes, one.ici_seconds)
        outside = _sent(one.dcn_bytes, one.dcn_seconds)
        yield f"  {one.kind:<18} {one.axes:<18} {one.count:>6} {inside:>20} {outside:>20}"


def _sent(amount: float, seconds: float | None) -> str:
    if not amount:
        return "-"
    return f"{amount / 1e6:,.1f} MB" + ("" if seconds is None else f" {seconds * 1e3:,.2f} ms")


def bound_lines(row: StepRow) -> Iterator[str]:
    """How fast the step can be at most."""
    found = row.bound
    parts = {
        "products": found.compute,
        "memory": found.memory,
        "links in a slice": found.ici,
        "network": found.dcn,
    }
    said = ", ".join(f"{what} {s * 1e3:.2f}" for what, s in parts.items() if s is not None)
    if said:
        yield f"milliseconds at published speeds: {said}"
    if found.seconds is not None and found.mfu is not None:
        yield (
            f"a step takes at least {found.seconds * 1e3:.2f} ms ({found.by}), so its MFU is at "
            f"most {100 * found.mfu:.0f} %"
        )


def ranking(rows: list[StepRow]) -> Iterator[str]:
    """The best meshes of a search, one a line, and how the first is looked at more closely."""
    first = rows[0]
    yield (
        f"{first.topology}, {first.step}, batch {first.batch:,}: {len(rows)} meshes, from shapes; "
        "the least time and the highest MFU at published speeds"
    )
    yield f"  {'mesh':<32} {'GB a chip':>10} {'fits':>5} {'ms':>9} {'by':>8} {'MFU':>6}"
    for row in rows[:SHOWN]:
        fits = {True: "yes", False: "no", None: "?"}[row.fits]
        found = row.bound
        least = "?" if found.seconds is None else f"{found.seconds * 1e3:,.3g}"
        share = "?" if found.mfu is None else f"{100 * found.mfu:.0f} %"
        mesh = row.mesh or "1 chip"
        memory = f"{row.memory_bytes / 1e9:.2f}"
        yield f"  {mesh:<32} {memory:>10} {fits:>5} {least:>9} {found.by or '?':>8} {share:>6}"


def write(file: Path, config: Config, rows: list[StepRow]) -> None:
    """The numbers, the configuration, the versions and the machine."""
    result = {
        "benchmark": "plan",
        "config": json.loads(to_json(config)),
        "row": rows[0].asdict(),
        "rows": [row.asdict() for row in rows],
        "machine": machine(),
        "versions": versions("jax", "jaxlib", "libtpu", "flax")
        if rows[0].source == "compiled"
        else versions("jax", "jaxlib", "flax"),
    }
    write_atomically(file, json_text(result, 1))
