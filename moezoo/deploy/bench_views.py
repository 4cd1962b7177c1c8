"""What a benchmark of MoE layers shows: a table, sentences about growth, a picture."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure
from rich.table import Table

from moezoo.deploy.bench_moe import MODES, Growth, Row
from moezoo.train.pictures import drawn

SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd"}


def table(rows: list[Row]) -> Table:
    """Every row."""
    columns = ("N", "K", "type", "backend", "E", "mode", "ms", "dense", "ratio", "quartiles")
    made = Table(*columns, "compile s", "temporary MB")
    for row in rows:
        seconds = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}"
        made.add_row(
            *(str(row.tokens), str(row.k), row.dtype, row.backend, str(row.experts)),
            *(SHORT[row.mode], f"{row.median_ms:.1f}", f"{row.dense_median_ms:.1f}"),
            *(f"{row.ratio:.2f}", f"{row.ratio_low:.2f} .. {row.ratio_high:.2f}"),
            *(seconds, memory(row)),
        )
    return made


def memory(row: Row) -> str:
    """Temporary bytes, and how many times the dense network's they are."""
    if row.temporary_bytes is None:
        return ""
    times = row.temporary_bytes / row.dense_temporary_bytes if row.dense_temporary_bytes else 0.0
    return f"{row.temporary_bytes / 1e6:.0f} (x {times:.1f})"


def lines(rows: list[Row], growth: list[Growth]) -> Iterator[str]:
    """What more experts cost, and what more tokens cost, in sentences."""
    for g in growth:
        yield (
            f"{g.backend} {g.mode}, N={g.tokens} K={g.k} {g.dtype}: E={g.experts_from} to "
            f"{g.experts_to} takes {g.ratio:.2f} times as long"
        )
    kinds = dict.fromkeys((r.backend, r.mode, r.experts, r.k, r.dtype) for r in rows)
    for backend, mode, experts, k, dtype in kinds:
        kind = (backend, mode, experts, k, dtype)
        own = [r for r in rows if (r.backend, r.mode, r.experts, r.k, r.dtype) == kind]
        own = sorted(own, key=lambda row: row.tokens)
        few, many = own[0], own[-1]
        if many.tokens > few.tokens:
            times = many.median_ms / few.median_ms
            yield (
                f"{backend} {mode}, E={experts} K={k} {dtype}: N={few.tokens} to {many.tokens} "
                f"({many.tokens / few.tokens:g} times) takes {times:.2f} times as long"
            )


def picture(rows: list[Row]) -> bytes:
    """Ratios over the number of experts, PNG bytes: a column per mode, a row per dense network."""
    groups = list(dict.fromkeys((r.tokens, r.k, r.dtype) for r in rows))
    figure = Figure(figsize=(9, 0.6 + 3.0 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), len(MODES), sharey="row", squeeze=False)
    for line, group in zip(panels, groups, strict=True):
        for panel, mode in zip(line, MODES, strict=True):
            own = [r for r in rows if (r.tokens, r.k, r.dtype) == group and r.mode == mode]
            draw(panel, own)
            panel.set_title(f"{mode}: N={group[0]}, K={group[1]}, {group[2]}", fontsize=10)
        line[0].set_ylabel("time / dense")
        line[0].set_ylim(bottom=0.0)
    panels[0, 0].legend()
    figure.suptitle(
        f"MoE layer against the dense FFN of equal active FLOPs, D={rows[0].width}, "
        f"F={rows[0].hidden}"
    )
    return drawn(figure, 120)


def draw(panel, rows: list[Row]) -> None:
    """One curve per backend, quartiles as bars."""
    for backend in dict.fromkeys(row.backend for row in rows):
        own = sorted((r for r in rows if r.backend == backend), key=lambda row: row.experts)
        x, y = [r.experts for r in own], [r.ratio for r in own]
        errors = [[r.ratio - r.ratio_low for r in own], [r.ratio_high - r.ratio for r in own]]
        panel.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=backend)
    experts = sorted({row.experts for row in rows})
    panel.axhline(1.0, color="grey", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_xticks(experts, [str(e) for e in experts])
    panel.set_xlabel("experts E")
    panel.grid(alpha=0.3)
