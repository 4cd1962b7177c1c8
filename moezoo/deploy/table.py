"""What cutting paths out of a run saves: the whole model beside every task's path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax

from moezoo.deploy import cost, produce
from moezoo.deploy.path import PathWeights, TaskPath, unread
from moezoo.deploy.produce import Produced, Request, TrainedRun, certify, measure, prune, whole_path
from moezoo.nn import module
from moezoo.train.console import Console
from moezoo.train.report import escaped

HEADER = ("path", "experts", "parameters", "MB", "GFLOP", "ms", "metric", "value", "change")
HEADER += ("clean", "off by more than 5: at most")


def full_model(trained: TrainedRun) -> dict[str, Any]:
    """Cost of the model predicting all its tasks in one call, its training-only branch left out."""
    subject, reads = trained.subject, trained.exporter.input
    definition, params, stats = module.split(subject.model)
    names = frozenset(module.flatten(stats))
    flat = module.flatten(params) | module.flatten(stats)

    def call(weights: PathWeights, given: jax.Array) -> dict[str, jax.Array]:
        parts = [{k: w for k, w in weights.items() if (k in names) == s} for s in (False, True)]
        model = module.merge(definition, *(module.unflatten(part) for part in parts))
        return model(given).predictions

    absent = set(unread(call, flat, reads.batch(1)))
    weights = {name: w for name, w in flat.items() if name not in absent}
    jitted = jax.jit(call)
    outputs = {name: task.channels for name, task in subject.tasks.items()}
    flops = None
    if subject.counted:
        flops = cost.flops(trained.config.model, trained.size, outputs)
        flops = flops or cost.traced_flops(call, flat, reads)
    return {
        "title": subject.title,
        "parameters": cost.parameters(weights),
        "bytes": cost.bytes_of(weights),
        "flops_per_example": flops,
        "latency": [cost.latency(lambda given: jitted(flat, given), b, reads) for b in (1, 8)],
        "device": cost.device(),
    }


def budgets(whole: TaskPath) -> list[int]:
    """Half and a quarter of the largest layer's experts, and no more than the smallest has."""
    experts = [layer.experts for layer in whole.layers.values()]
    halves = {max(max(experts) // part, 1) for part in (2, 4)}
    return sorted({min(half, *experts) for half in halves}, reverse=True)


def compare_paths(
    trained: TrainedRun, request: Request, console: Console, tasks: Iterable[str] | None = None
) -> list[Produced]:
    """Every task's whole path, then pruned to half and a quarter; calibrated once per task."""
    produced = []
    for name in tasks or trained.subject.tasks:
        whole, task = whole_path(trained, name), trained.subject.tasks[name]
        stated = certify(trained, whole, whole, None, request, console)
        produced.append(Produced(whole, whole, task, None, stated))
        if not produce.removable(trained, whole):
            continue
        found = measure(trained, whole, request, console)
        for keep in budgets(whole):
            # A total and a number per layer exclude each other.
            path = prune(trained, whole, found, replace(request, keep=keep, total=None))
            stated = certify(trained, whole, path, found, request, console)
            produced.append(Produced(path, whole, task, found, stated))
    return produced


def rows(full: dict[str, Any], produced: Sequence[Produced]) -> list[tuple[object, ...]]:
    """One row per path under HEADER; the first is the whole model."""
    lines: list[tuple[object, ...]] = [(full["title"], "all", *_cost(full), "", "", "", "", "")]
    for item in produced:
        stated = item.certificate
        kept = {len(layer.kept) for layer in item.path.layers.values()} or {0}
        test, held = stated["test"], stated.get("verification")
        lines.append(
            (
                item.path.task,
                "all" if item.path.exact else "/".join(map(str, sorted(kept))),
                *_cost(stated["cost"]),
                test["metric"],
                _number(test["path"][test["metric"]]),
                f"{test['change']:+.4f}",
                f"{100 * held['coverage']:.1f} %" if held else "100 %",
                _bound(held) if held else "0 %",
            )
        )
    return lines


def markdown(lines: Sequence[Sequence[object]]) -> str:
    """The rows as a Markdown table with aligned columns, for a console and a README alike."""
    cells = [tuple(map(escaped, line)) for line in (HEADER, *lines)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    ruled = [cells[0], tuple("-" * width for width in widths), *cells[1:]]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in ruled)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _cost(cost: dict[str, Any]) -> tuple[str, str, str, str]:
    return (
        f"{cost['parameters']:,}",
        f"{cost['bytes'] / 1e6:.2f}",
        gigaflops(cost),
        f"{cost['latency'][0]['median_ms']:.1f}",
    )


def gigaflops(cost: dict[str, Any]) -> str:
    """Billions of operations per example; "-" for a model without a formula."""
    count = cost["flops_per_example"]
    return "-" if count is None else f"{count / 1e9:.3f}"


def _bound(held: dict[str, Any]) -> str:
    """The bound at 5 percent or degrees."""
    # A level that every kind of output has (`tasks.output`).
    (found,) = (d for d in held["disagreement"] if d["level"] == 5.0)
    return f"{100 * found['rate_at_most']:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
