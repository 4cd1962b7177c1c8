"""The command `moezoo bench pod`: its arguments, its table, its file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from moezoo.command import parse
from moezoo.errors import UserError, unknown
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.planning import layer as pod
from moezoo.timing import machine, versions
from moezoo.train.schema import MeshConfig


@dataclass(frozen=True)
class PodArguments:
    """Compile one MoE layer, forward and backward in bfloat16, for a TPU pod that is not there.

    Says what a chip would hold, compute and send, and the least it could send. A layer takes
    one to two minutes. Needs the extra `pod` (libtpu). The layer's default sizes are V-MoE-H/14's.

    Example: moezoo bench pod --topology v5p:8x8x8 --json pod.json
    """

    json: Path
    """File for the rows, the versions and the machine."""
    topology: str = "v5p:8x8x8"
    """The pod, for example v5p:8x8x8 or v6e:16x16."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(fsdp=8, expert=8))
    """How its chips are divided."""
    batch: int = 4096
    """Images of the global batch."""
    dispatch: tuple[str, ...] = ("all_to_all", "gather")
    """How tokens travel: all_to_all, gather, ragged_all_to_all, or per_device (experts copied)."""
    layer: pod.PlannedLayer = field(default_factory=pod.PlannedLayer)
    """Sizes of the layer."""


def run(words: list[str]) -> int:
    """Compile, print one line per dispatch, write the file."""
    arguments = parse(PodArguments, words, prog="moezoo bench pod")
    for name in arguments.dispatch:
        if name not in pod.DISPATCHES:
            raise unknown("dispatch", name, list(pod.DISPATCHES))
    if not arguments.dispatch:
        raise UserError("--dispatch is empty.")
    check_file(arguments.json)
    rows = []
    for name in arguments.dispatch:
        row = pod.measure(
            arguments.topology, arguments.mesh, name, arguments.batch, arguments.layer
        )
        rows.append(row)
        print(line(row), flush=True)
    settings = asdict(arguments) | {"json": str(arguments.json)}
    result = {
        "benchmark": "pod",
        "settings": settings,
        "rows": [row._asdict() for row in rows],
        "machine": machine(),
        "versions": versions("jax", "jaxlib", "libtpu", "flax"),
    }
    write_atomically(arguments.json, json_text(result, 1))
    print(f"wrote {arguments.json}")
    return 0


def line(row: pod.LayerRow) -> str:
    """One compiled layer in one line."""
    return (
        f"{row.topology} ({row.mesh}) {row.dispatch}: {row.memory_bytes / 1e9:.2f} GB per chip, "
        f"{row.flops / 1e12:.2f} TFLOP ({row.useful_flops / 1e12:.2f} useful), tokens "
        f"{row.token_bytes / 1e6:.1f} MB ({row.token_ratio:.2f} of the least), weights "
        f"{row.weight_bytes / 1e6:.0f} MB, compiled in {row.compile_seconds:.0f} s"
    )
