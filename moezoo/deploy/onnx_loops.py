"""Loops over a known number of steps in ONNX, written out, and reading at places that they count.

ONNX has loops of its own, whose steps no runtime joins; a sentence of thirty words is a few
thousand nodes written out. Places that a program computes are read and written by ONNX's Slice,
clamped into the array as JAX clamps them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moezoo.errors import UserError

LONGEST = 256  # steps of a loop that is written out


def scan(graph: Any, equation: Any) -> list[Any]:
    """A scan over so many steps, one after the other."""
    about = equation.params
    length, inner = about["length"], about["jaxpr"]
    if length > LONGEST:
        raise UserError(
            f"This path has a loop of {length} steps, of which {LONGEST} would be written out: "
            "leave out onnx; the folder's own program runs with JAX."
        )
    fixed, states = _groups(equation, inner.jaxpr)
    carried = fixed + states
    constants = [graph.read(one) for one in equation.invars[:fixed]]
    state = [graph.read(one) for one in equation.invars[fixed:carried]]
    rows = [graph.whole(one) for one in equation.invars[carried:]]
    kept: list[list[str]] = [[] for _ in equation.outvars[states:]]
    steps = range(length)
    for step in reversed(steps) if about["reverse"] else steps:
        given = [graph.tensor(_row(graph, name, step)) for name in rows]
        for variable, value in zip(inner.jaxpr.invars, [*constants, *state, *given], strict=True):
            graph.values[variable] = value
        graph.run(inner.jaxpr, inner.consts)
        results = inner.jaxpr.outvars
        state = [graph.read(one) for one in results[:states]]
        for rest, one in zip(kept, results[states:], strict=True):
            name = graph.whole(one)
            rest.append(graph.node("Unsqueeze", [name, graph.whole_numbers([0])]))
    ordered = (rest[::-1] if about["reverse"] else rest for rest in kept)
    return [*state, *(graph.node("Concat", rest, axis=0) for rest in ordered)]


def _groups(equation: Any, step: Any) -> tuple[int, int]:
    """How many arrays a loop reads unchanged, and how many it carries from step to step.

    They are told by their number of axes (a loop stacks what it takes and gives step by step),
    since the parameters that count them have other names in other versions of JAX.
    """

    def same(outer: Any, inner: Any) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))

    states = same(equation.outvars, step.outvars)
    return same(equation.invars, step.invars) - states, states


def _row(graph: Any, name: str, step: int) -> str:
    return graph.node("Gather", [name, graph.constant(np.asarray(step, np.int64)).name], axis=0)


def dynamic_slice(graph: Any, equation: Any) -> str:
    """A part of an array that begins at computed places."""
    operand, *starts = equation.invars
    name = graph.whole(operand)
    sizes = zip(operand.aval.shape, equation.params["slice_sizes"], starts, strict=True)
    for axis, (have, wanted, start) in enumerate(sizes):
        if have == wanted:
            continue
        first = _place(graph, start, have - wanted)
        last = graph.node("Add", [first, graph.whole_numbers([wanted])])
        name = _part(graph, name, first, last, axis)
    return name


def dynamic_update_slice(graph: Any, equation: Any) -> str:
    """An array with a part, which begins at a computed place of one axis, exchanged."""
    operand, update, *starts = equation.invars
    have, wanted = operand.aval.shape, update.aval.shape
    apart = [axis for axis, (a, b) in enumerate(zip(have, wanted, strict=True)) if a != b]
    if not apart:
        return graph.whole(update)
    if len(apart) > 1:
        raise UserError(
            "This path writes at computed places of several axes, which has no form in ONNX here: "
            "leave out onnx; the folder's own program runs with JAX."
        )
    (axis,) = apart
    name = graph.whole(operand)
    first = _place(graph, starts[axis], have[axis] - wanted[axis])
    behind = graph.node("Add", [first, graph.whole_numbers([wanted[axis]])])
    before = _part(graph, name, graph.whole_numbers([0]), first, axis)
    after = _part(graph, name, behind, graph.whole_numbers([have[axis]]), axis)
    return graph.node("Concat", [before, graph.whole(update), after], axis=axis)


def _place(graph: Any, start: Any, last: int) -> str:
    """A computed place as int64 [1], at least 0 and at most `last`."""
    number = graph.type_of("int64")
    name = graph.node("Cast", [graph.whole(start)], to=number)
    name = graph.node("Reshape", [name, graph.whole_numbers([1])])
    name = graph.node("Max", [name, graph.whole_numbers([0])])
    return graph.node("Min", [name, graph.whole_numbers([last])])


def _part(graph: Any, name: str, first: str, last: str, axis: int) -> str:
    return graph.node("Slice", [name, first, last, graph.whole_numbers([axis])])


def dim_as_value(graph: Any, equation: Any) -> str:
    """A size of a shape as a number."""
    number = graph.type_of(equation.outvars[0].aval.dtype)
    scalar = graph.reshape(graph.size(equation.params["dim"]), [])
    return graph.node("Cast", [scalar], to=number)


LOOPS = {
    "dim_as_value": dim_as_value,
    "scan": scan,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
}
