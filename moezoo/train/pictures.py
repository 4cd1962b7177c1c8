"""Pictures of a run: predictions beside truth, expert-by-task usage, confusions."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo.files import write_atomically
from moezoo.tasks.base import Task
from moezoo.tasks.painting import Key, Scale

RIGHT, WRONG = "#1a7f37", "#c0392b"
MOST_WRITTEN = 16  # classes or experts whose shares are written as numbers, too


def figure_of(
    rows: int, columns: int, size: tuple[float, float], widths: Sequence[float] | None = None
) -> tuple[Any, np.ndarray]:
    """A figure of `size` inches and its axes [rows, columns], whose columns have these widths."""
    figure = empty_figure(size)
    return figure, figure.subplots(rows, columns, squeeze=False, width_ratios=widths)


def empty_figure(size: tuple[float, float]) -> Any:
    """A figure of `size` inches without axes."""
    # Imported here: matplotlib takes half a second that commands without pictures need not pay.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, drawn(figure))


def drawn(figure: Any, dots: int = 110) -> bytes:
    """A figure as PNG bytes, so many dots per inch; every text in it is shown as it is.

    Names of people's own may have dollar signs, which matplotlib would read as mathematics; powers
    of ten, which it would write as such, are plain numbers.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if axis.get_scale() == "log" and axis.isDefault_majfmt:
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            low, high = axis.get_view_interval()
            # Where no two powers are in view, the numbers between say the scale.
            between = "{:g}" if high < 10 * low else ""
            axis.set_minor_formatter(lambda value, _, form=between: form.format(value))
    buffer = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # for those that are made when it is drawn
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        figure.savefig(buffer, format="png", dpi=dots)
    return buffer.getvalue()


class Column(NamedTuple):
    """What stands side by side for one task: pictures uint8 [H,W,3] by title, and their key."""

    shown: Mapping[str, Sequence[np.ndarray]]
    key: Key | None


def predictions_of(
    task: Task, truths: Sequence[np.ndarray], predicted: Mapping[str, Sequence[np.ndarray]]
) -> Column:
    """A task's column: its truths, then predictions by title, all on the truths' scale."""
    truths = [np.asarray(truth) for truth in truths]
    paint = task.picture.fitted(truths)
    shown = {f"{task.name}\ntruth": [paint.label(truth) for truth in truths]}
    for title, ones in predicted.items():
        shown[f"{task.name}\n{title}"] = [paint(one) for one in ones]
    return Column(
        shown, paint.key([*truths, *(one for ones in predicted.values() for one in ones)])
    )


def predictions(
    path: Path, columns: Sequence[Column], notes: Mapping[str, Sequence[str]] | None = None
) -> None:
    """One row per image: all columns beside each other, what their colours mean below them.

    notes: a word about each row, by the last line of a title.
    """
    titles = [title for column in columns for title in column.shown]
    rows = [list(column.shown.values()) for column in columns]
    drawn = [pictures for column in rows for pictures in column]
    count = max(map(len, drawn))
    keys = max((_lines_of(column.key, len(column.shown)) for column in columns), default=0)
    heights = [1.75 * count + 0.3, 0.17 * keys + 0.15]
    figure = empty_figure((1.65 * len(titles), sum(heights)))
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    axes = above.subplots(count, len(titles), squeeze=False)
    for place, (title, pictures) in enumerate(zip(titles, drawn, strict=True)):
        words = (notes or {}).get(title.rpartition("\n")[2], [""] * count)
        for axis, picture, word in zip(axes[:, place], pictures, words, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(word, fontsize=7)
            axis.set_frame_on(False)
        axes[0, place].set_title(title, fontsize=9)
    widths = [len(column.shown) for column in columns]
    places = below.subplots(1, len(columns), squeeze=False, width_ratios=widths)[0]
    for axis, column in zip(places, columns, strict=True):
        _draw_key(axis, column.key, len(column.shown))
    save(figure, path)


def _lines_of(key: Key | None, width: int) -> int:
    return 0 if key is None else 3 if isinstance(key, Scale) else -(-len(key.names) // width)


def _draw_key(axis: Any, key: Key | None, width: int) -> None:
    """A bar with its range and unit, or a list of names with their colours, `width` abreast."""
    from matplotlib.patches import Patch

    axis.set_axis_off()
    if isinstance(key, Scale):
        bar = axis.inset_axes((0.1, 0.75, 0.8, 0.2))
        bar.imshow(key.colours[None], aspect="auto", extent=(key.low, key.high, 0, 1))
        bar.set_yticks([])
        bar.set_xticks([key.low, (key.low + key.high) / 2, key.high])
        bar.tick_params(labelsize=7)
        bar.set_xlabel(key.unit, fontsize=7)
    elif key is not None:
        patches = [
            Patch(color=c / 255, label=n) for n, c in zip(key.names, key.colours, strict=True)
        ]
        axis.legend(handles=patches, ncols=width, fontsize=7, loc="upper center", frameon=False,
                    borderaxespad=0, handlelength=1, columnspacing=1)  # fmt: skip


def usage(path: Path, layers: Mapping[str, np.ndarray], tasks: Sequence[str]) -> None:
    """Expert-by-task heatmap per MoE layer; `layers[name]` holds shares [J, E].

    Shares of the task's choices, or of its weights where every expert is mixed; rows sum to 1.
    """
    if not layers:
        return
    experts = max(table.shape[1] for table in layers.values())
    width = min(16.0, 2.2 + 0.38 * experts)
    figure, axes = figure_of(len(layers), 1, (width, 1.1 + (0.5 + 0.28 * len(tasks)) * len(layers)))
    for axis, (name, table_JE) in zip(axes[:, 0], layers.items(), strict=True):
        # A common scale from 0 to twice the even share makes layers comparable at a glance.
        top = max(2.0 / table_JE.shape[1], float(table_JE.max()))
        drawn = axis.imshow(table_JE, aspect="auto", cmap="viridis", vmin=0.0, vmax=top)
        axis.set_yticks(range(len(table_JE)), list(tasks)[: len(table_JE)], fontsize=8)
        axis.set_xticks(range(table_JE.shape[1]))
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(f"{name}: share of the task's choices, %", fontsize=9)
        figure.colorbar(drawn, ax=axis, format=lambda v, _: f"{100 * v:.0f} %")
        if table_JE.shape[1] <= MOST_WRITTEN:
            for (row, column), share in np.ndenumerate(table_JE):
                ink = "white" if share < top / 2 else "black"
                axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center",
                          color=ink, fontsize=6)  # fmt: skip
    axes[-1, 0].set_xlabel("expert")
    save(figure, path)


def usage_grid(path: Path, layers: Mapping[str, np.ndarray], tasks: Sequence[str]) -> None:
    """Expert-by-task heatmaps in a grid: a row per layer, a column per place in it.

    `layers["layers/3/attn/q"]` holds shares [J, E] whose rows sum to 1. All panels have one scale,
    in multiples of an even share, so that white means "as if nothing decided".
    """
    split = [name.rsplit("/", 2) for name in layers]
    rows = list(dict.fromkeys(parts[0] for parts in split))
    columns = list(dict.fromkeys("/".join(parts[1:]) for parts in split))
    height = 0.6 + (0.25 + 0.13 * len(tasks)) * len(rows)
    figure, axes = figure_of(len(rows), len(columns), (1.6 + 2.0 * len(columns), height))
    drawn = None
    for axis in axes.ravel():
        axis.set_axis_off()
    for name, table_JE in layers.items():
        row, _, column = name.rpartition("/")
        row, kind = row.rpartition("/")[0], f"{row.rpartition('/')[2]}/{column}"
        axis = axes[rows.index(row), columns.index(kind)]
        axis.set_axis_on()
        relative = np.log2(np.maximum(table_JE * table_JE.shape[1], 1e-3))
        drawn = axis.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3)
        axis.set_xticks([])
        axis.set_yticks([])
        if kind == columns[0]:
            axis.set_yticks(range(len(tasks)), list(tasks), fontsize=6)
            axis.set_ylabel(row, fontsize=8)
        if row == rows[0]:
            axis.set_title(kind, fontsize=9)
        if row == rows[-1]:
            axis.set_xlabel(f"{table_JE.shape[1]} experts", fontsize=7)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=axes, fraction=0.02, ticks=[-3, -2, -1, 0, 1, 2, 3])
        bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"], fontsize=7)
        bar.set_label("use, in even shares", fontsize=8)
    save(figure, path)


def confusions(
    path: Path, tables: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]]
) -> None:
    """One matrix per task: rows are the right classes, columns the predicted ones, in shares."""
    sides = [min(12.0, 1.6 + 0.3 * len(table)) for table in tables.values()]
    figure, axes = figure_of(1, len(tables), (sum(sides), max(sides)), sides)
    for axis, (task, table) in zip(axes[0], tables.items(), strict=True):
        shares = table / np.maximum(table.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        places, words = range(len(table)), list(names[task])
        small = 7 if len(table) <= 30 else 5
        axis.set_xticks(places, words, rotation=90, fontsize=small)
        axis.set_yticks(places, words, fontsize=small)
        accuracy = table.trace() / max(int(table.sum()), 1)
        axis.set_title(f"{task}: {100 * accuracy:.1f} % right", fontsize=9)
        axis.set_xlabel("predicted", fontsize=8)
        axis.set_ylabel("right", fontsize=8)
        if len(table) <= MOST_WRITTEN:
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.005:
                    ink = "white" if share > 0.5 else "black"
                    axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center",
                              color=ink, fontsize=6)  # fmt: skip
    save(figure, path)
