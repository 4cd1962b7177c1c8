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
SEEN = 0.1  # share of a chip's memory from which bars are seen beside the whole of it
TAKEN = {"products": "compute", "memory": "memory", "links in a slice": "ici", "network": "dcn"}


def picture(rows: Sequence[StepRow]) -> bytes:
    """PNG bytes: a bar of memory and one group of times for every mesh, the first on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.8 + 0.6 * len(rows)), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    places = [-at for at in range(len(rows))]
    left = [0.0] * len(rows)
    most = max(sum(getattr(row, name) for name in HELD.values()) for row in rows)
    unit, scale = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
    for label, name in HELD.items():
        sizes = [getattr(row, name) / scale for row in rows]
        memory.barh(places, sizes, left=left, label=label, height=0.6)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    chip = rows[0].chip_bytes
    # Beside the whole of a chip, bars of a small model would be nothing.
    if chip is not None and most > SEEN * chip:
        memory.axvline(chip / scale, color="black", linestyle="--", label="a chip has")
    known = "" if chip is None else f", which has {chip / 1e9:.4g} GB"
    memory.set_xlabel(f"{unit} a chip{known}")
    memory.set_yticks(places, [row.mesh or "1 chip" for row in rows])
    seconds = {k: [getattr(row.bound, name) or 0.0 for row in rows] for k, name in TAKEN.items()}
    unit, scale = ("ms", 1e-3) if max(map(max, seconds.values())) >= 1e-3 else ("µs", 1e-6)
    for number, (label, taken) in enumerate(seconds.items()):
        at = [place + 0.24 - 0.16 * number for place in places]
        if any(taken):  # what is not known, or nothing, is no entry of the legend
            widths = [one / scale for one in taken]
            time.barh(at, widths, label=label, height=0.15, color=f"C{number}")
    time.set_xlabel(f"{unit} at least, at published speeds")
    for panel in (memory, time):
        panel.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        panel.grid(alpha=0.3, axis="x")
    first = rows[0]
    figure.suptitle(f"{first.topology}, {first.step}, batch {first.batch:,} ({first.source})")
    return drawn(figure, 120)
