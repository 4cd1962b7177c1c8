"""A picture of a plan: what a chip's memory holds, and what a step's time is made of at least."""

from __future__ import annotations

from collections.abc import Sequence

from moezoo.planning.step import StepRow
from moezoo.train.pictures import drawn

HELD = {
    "parameters": "parameter_bytes",
    "optimiser": "optimiser_bytes",
    "activations, gradients, buffers": "temporary_bytes",
    "batch": "batch_bytes",
}
TAKEN = {"products": "compute", "memory": "memory", "links in a slice": "ici", "network": "dcn"}


def picture(rows: Sequence[StepRow]) -> bytes:
    """PNG bytes: a bar of memory and one group of times for every mesh, the first on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.8 + 0.6 * len(rows)), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    places = [-at for at in range(len(rows))]
    left = [0.0] * len(rows)
    for label, name in HELD.items():
        sizes = [getattr(row, name) / 1e9 for row in rows]
        memory.barh(places, sizes, left=left, label=label, height=0.6)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    if rows[0].chip_bytes is not None:
        memory.axvline(rows[0].chip_bytes / 1e9, color="black", linestyle="--", label="a chip has")
    memory.set_xlabel("GB a chip")
    memory.set_yticks(places, [row.mesh or "1 chip" for row in rows])
    for number, (label, name) in enumerate(TAKEN.items()):
        seconds = [getattr(row.bound, name) for row in rows]
        at = [place + 0.24 - 0.16 * number for place in places]
        milliseconds = [0.0 if s is None else s * 1e3 for s in seconds]
        time.barh(at, milliseconds, label=label, height=0.15)
    time.set_xlabel("ms at least, at published speeds")
    for panel in (memory, time):
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3, axis="x")
    first = rows[0]
    figure.suptitle(f"{first.topology}, {first.step}, batch {first.batch:,} ({first.source})")
    return drawn(figure, 120)
