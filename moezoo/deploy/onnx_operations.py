"""A traced program as an ONNX graph with any batch size, for runtimes that have no JAX.

Each operation of the program becomes one or a few nodes of ONNX's standard operators, so that the
graph runs wherever those do. Written here because the one library that converts JAX programs
(jax2onnx 0.17.1) pins an Orbax that this package is too new for, and, installed without its
dependencies, stopped at five of the eight systems here: it replaces functions of JAX while tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from moezoo.deploy import onnx_loops
from moezoo.deploy.onnx_graph import OnnxGraph, OnnxTensor, OnnxValue, Operation, libraries
from moezoo.errors import UserError


def convert(
    call: Callable[[Mapping[str, Any], Any], Mapping[str, Any]],
    weights: Mapping[str, Any],
    given: jax.ShapeDtypeStruct,
    name: str,
) -> Any:
    """`call(weights, given)` as an `onnx.ModelProto` with the weights inside.

    given: the form of the input called `name`, whose first axis is the symbol `b`; outputs have
    the names that `call` gives them. Raises UserError where an operation has no form in ONNX.
    """
    onnx, _ = libraries()
    forms = {key: jax.ShapeDtypeStruct(w.shape, w.dtype) for key, w in weights.items()}
    traced = jax.jit(call).trace(forms, given)
    closed = traced.jaxpr
    graph = OnnxGraph(onnx, OPERATIONS, name)
    inputs = closed.jaxpr.invars
    # Dictionaries flatten in sorted order; what is given is the last argument.
    for key, variable in zip([*sorted(weights), name], inputs, strict=True):
        if key == name and variable is inputs[-1]:
            graph.values[variable] = OnnxTensor(name)
        else:
            graph.values[variable] = graph.constant(np.asarray(weights[key]), key)
    graph.run(closed.jaxpr, closed.consts)
    names = sorted(
        jax.tree_util.tree_leaves_with_path(traced.out_info), key=lambda one: str(one[0])
    )
    for (path, _), variable in zip(names, closed.jaxpr.outvars, strict=True):
        graph.node("Identity", [graph.whole(variable)], name=path[0].key)
    results = [
        (path[0].key, v.aval) for (path, _), v in zip(names, closed.jaxpr.outvars, strict=True)
    ]
    return graph.model((name, inputs[-1].aval), results)


def _narrow(graph: OnnxGraph, equation: Any) -> tuple[list[str], bool]:
    """Operands as they are kept, and whether the result is narrow as well.

    It is where no operand has all axes at their sizes.
    """
    tensors = [graph.read(one) for one in equation.invars]
    shape = equation.outvars[0].aval.shape
    full = [
        not tensor.narrow and one.aval.shape == shape
        for tensor, one in zip(tensors, equation.invars, strict=True)
    ]
    return [tensor.name for tensor in tensors], not any(full)


def elementwise(kind: str, **fields: Any) -> Operation:
    """An operator that broadcasts."""

    def make(graph: OnnxGraph, equation: Any) -> OnnxTensor:
        names, narrow = _narrow(graph, equation)
        return OnnxTensor(graph.node(kind, names, **fields), narrow)

    return make


def chain(*kinds: str) -> Operation:
    """Operators of one operand, one after the other."""

    def make(graph: OnnxGraph, equation: Any) -> OnnxTensor:
        (name,), narrow = _narrow(graph, equation)
        for kind in kinds:
            name = graph.node(kind, [name])
        return OnnxTensor(name, narrow)

    return make


def _same(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    return graph.read(equation.invars[0])


def _square(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    (name,), narrow = _narrow(graph, equation)
    return OnnxTensor(graph.node("Mul", [name, name]), narrow)


def _log1p(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    # There is no such operator; near 0 this is off by a rounding of 1, and no more.
    (name,), narrow = _narrow(graph, equation)
    one = graph.constant(np.ones((), equation.invars[0].aval.dtype)).name
    return OnnxTensor(graph.node("Log", [graph.node("Add", [name, one])]), narrow)


def _integer_pow(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    (name,), narrow = _narrow(graph, equation)
    power = graph.constant(np.asarray(equation.params["y"], equation.invars[0].aval.dtype)).name
    return OnnxTensor(graph.node("Pow", [name, power]), narrow)


def _is_finite(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    (name,), narrow = _narrow(graph, equation)
    odd = graph.node("Or", [graph.node("IsInf", [name]), graph.node("IsNaN", [name])])
    return OnnxTensor(graph.node("Not", [odd]), narrow)


def _not_equal(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    names, narrow = _narrow(graph, equation)
    return OnnxTensor(graph.node("Not", [graph.node("Equal", names)]), narrow)


def _select(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    which, *cases = equation.invars
    if which.aval.dtype != np.bool_ or len(cases) != 2:
        raise UserError("This path chooses among several cases, which has no form in ONNX here.")
    names, narrow = _narrow(graph, equation)
    return OnnxTensor(graph.node("Where", [names[0], names[2], names[1]]), narrow)


def _clamp(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    names, narrow = _narrow(graph, equation)
    return OnnxTensor(
        graph.node("Min", [graph.node("Max", [names[1], names[0]]), names[2]]), narrow
    )


def _cast(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    (name,), narrow = _narrow(graph, equation)
    if equation.invars[0].aval.dtype == equation.params["new_dtype"]:
        return OnnxTensor(name, narrow)
    return OnnxTensor(
        graph.node("Cast", [name], to=graph.type_of(equation.params["new_dtype"])), narrow
    )


def _round(graph: OnnxGraph, equation: Any) -> OnnxValue:
    if equation.params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        raise UserError("This path rounds halves away from 0, which has no form in ONNX here.")
    return elementwise("Round")(graph, equation)


def _logical(kind: str) -> Operation:
    make = elementwise(kind)

    def checked(graph: OnnxGraph, equation: Any) -> OnnxValue:
        if equation.invars[0].aval.dtype != np.bool_:
            raise UserError("This path has operations on bits, which have no form in ONNX here.")
        return make(graph, equation)

    return checked


def reduction(kind: str) -> Operation:
    """An operator over axes, which it takes away."""

    def make(graph: OnnxGraph, equation: Any) -> str:
        axes = graph.whole_numbers(equation.params["axes"])
        operand, dtype = graph.whole(equation.invars[0]), equation.invars[0].aval.dtype
        if dtype == np.bool_:
            operand = graph.node("Cast", [operand], to=graph.type_of(np.dtype(np.int32)))
        name = graph.node(kind, [operand, axes], keepdims=0)
        if dtype == np.bool_:
            return graph.node("Cast", [name], to=graph.type_of(dtype))
        return name

    return make


def _running_sum(graph: OnnxGraph, equation: Any) -> str:
    axis = graph.constant(np.asarray(equation.params["axis"], np.int64)).name
    operand, backwards = graph.whole(equation.invars[0]), int(equation.params["reverse"])
    return graph.node("CumSum", [operand, axis], reverse=backwards)


def _argmax(graph: OnnxGraph, equation: Any) -> str:
    (axis,) = equation.params["axes"]
    name = graph.node("ArgMax", [graph.whole(equation.invars[0])], axis=axis, keepdims=0)
    return graph.node("Cast", [name], to=graph.type_of(equation.params["index_dtype"]))


def _top_k(graph: OnnxGraph, equation: Any) -> list[str]:
    operand, k = graph.whole(equation.invars[0]), equation.params["k"]
    axis = equation.params.get("axis", -1)
    values, places = graph.fresh(), graph.fresh()
    # Of equal numbers the first comes first, in ONNX as in JAX.
    made = graph.onnx.helper.make_node(
        "TopK", [operand, graph.whole_numbers([k])], [values, places], axis=axis
    )
    graph.nodes.append(made)
    dtype = equation.outvars[1].aval.dtype
    return [values, graph.node("Cast", [places], to=graph.type_of(dtype))]


def _broadcast(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    (operand,) = equation.invars
    places, shape = equation.params["broadcast_dimensions"], equation.params["shape"]
    tensor, old = graph.read(operand), operand.aval.shape
    if tuple(places) == tuple(range(len(shape))) and tuple(old) == tuple(shape):
        return tensor
    # A narrow operand has size 1 where `old` says more: only new axes are put in.
    new = [axis for axis in range(len(shape)) if axis not in places]
    name = graph.node("Unsqueeze", [tensor.name, graph.whole_numbers(new)]) if new else tensor.name
    return OnnxTensor(name, narrow=True)


def _reshape(graph: OnnxGraph, equation: Any) -> str:
    return graph.reshape(graph.whole(equation.invars[0]), equation.outvars[0].aval.shape)


def _transpose(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    tensor = graph.read(equation.invars[0])
    return OnnxTensor(graph.transpose(tensor.name, equation.params["permutation"]), tensor.narrow)


def _slice(graph: OnnxGraph, equation: Any) -> str:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    steps = equation.params["strides"] or (1,) * len(starts)
    old, name = equation.invars[0].aval.shape, graph.whole(equation.invars[0])
    cut = [i for i in range(len(old)) if (starts[i], limits[i], steps[i]) != (0, old[i], 1)]
    if not cut:
        return name
    ends = graph.shape([limits[i] for i in cut])
    begins = graph.shape([starts[i] for i in cut])
    every = graph.whole_numbers([steps[i] for i in cut])
    return graph.node("Slice", [name, begins, ends, graph.whole_numbers(cut), every])


def _pad(graph: OnnxGraph, equation: Any) -> str:
    operand, value = (graph.whole(one) for one in equation.invars)
    sides = equation.params["padding_config"]
    if any(inside for _, _, inside in sides):
        raise UserError("This path pads between values, which has no form in ONNX here.")
    around = [low for low, _, _ in sides] + [high for _, high, _ in sides]
    return graph.node("Pad", [operand, graph.whole_numbers(around), value], mode="constant")


def _squeeze(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    tensor, axes = graph.read(equation.invars[0]), equation.params["dimensions"]
    name = graph.node("Squeeze", [tensor.name, graph.whole_numbers(axes)]) if axes else tensor.name
    return OnnxTensor(name, tensor.narrow)


def _concatenate(graph: OnnxGraph, equation: Any) -> str:
    names = [graph.whole(one) for one in equation.invars]
    return graph.node("Concat", names, axis=equation.params["dimension"])


def _stack(graph: OnnxGraph, equation: Any) -> str:
    axis = equation.params["axis"]
    at = graph.whole_numbers([axis])
    names = [graph.node("Unsqueeze", [graph.whole(one), at]) for one in equation.invars]
    return graph.node("Concat", names, axis=axis)


def _unstack(graph: OnnxGraph, equation: Any) -> list[str]:
    """Of JAX 0.12 and later: the slices along an axis, without that axis."""
    axis, whole = equation.params["axis"], graph.whole(equation.invars[0])
    places = (graph.constant(np.asarray(i, np.int64)).name for i in range(len(equation.outvars)))
    return [graph.node("Gather", [whole, place], axis=axis) for place in places]


def _tile(graph: OnnxGraph, equation: Any) -> str:
    times = graph.shape(equation.params["reps"])
    rank = equation.outvars[0].aval.ndim
    operand = graph.whole(equation.invars[0])
    if rank != len(equation.params["reps"]) or rank != equation.invars[0].aval.ndim:
        raise UserError("This path repeats along new axes, which has no form in ONNX here.")
    return graph.node("Tile", [operand, times])


def _split(graph: OnnxGraph, equation: Any) -> list[str]:
    names = [graph.fresh() for _ in equation.outvars]
    sizes = graph.whole_numbers([int(size) for size in equation.params["sizes"]])
    operand = graph.whole(equation.invars[0])
    made = graph.onnx.helper.make_node(
        "Split", [operand, sizes], names, axis=equation.params["axis"]
    )
    graph.nodes.append(made)
    return names


def _iota(graph: OnnxGraph, equation: Any) -> OnnxTensor:
    shape, axis = equation.params["shape"], equation.params["dimension"]
    dtype, size = equation.params["dtype"], shape[axis]
    if isinstance(size, int):
        name = graph.constant(np.arange(size, dtype=dtype)).name
    else:
        zero, one = (graph.constant(np.asarray(value, np.int64)).name for value in (0, 1))
        last = graph.reshape(graph.size(size), [])
        counted = graph.node("Range", [zero, last, one])
        name = graph.node("Cast", [counted], to=graph.type_of(dtype))
    new = [i for i in range(len(shape)) if i != axis]
    if not new:
        return OnnxTensor(name)
    return OnnxTensor(graph.node("Unsqueeze", [name, graph.whole_numbers(new)]), narrow=True)


def _gather(graph: OnnxGraph, equation: Any) -> str:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    operand, places = equation.invars
    plain = not numbers.operand_batching_dims and len(numbers.start_index_map) == 1
    if not plain:
        raise UserError("This path reads by several indices at once, which ONNX has no form for.")
    (axis,) = numbers.start_index_map
    others = all(sizes[i] == size or i == axis for i, size in enumerate(operand.aval.shape))
    at = graph.node("Cast", [graph.whole(places)], to=graph.type_of(np.dtype(np.int64)))
    if others and places.aval.shape == (1,):  # a slice that begins at a number
        end = graph.node("Add", [at, graph.whole_numbers([sizes[axis]])])
        cut = graph.node("Slice", [graph.whole(operand), at, end, graph.whole_numbers([axis])])
        return graph.reshape(cut, equation.outvars[0].aval.shape)
    # Rows of a table, along any axis: their places' axes stand where that axis was.
    rank = places.aval.ndim - 1
    around = tuple(i for i in range(equation.outvars[0].aval.ndim) if not axis <= i < axis + rank)
    rows = numbers.collapsed_slice_dims == (axis,) and sizes[axis] == 1
    if not (others and rows and numbers.offset_dims == around and places.aval.shape[-1] == 1):
        raise UserError("This path reads rows in a way that has no form in ONNX here.")
    flat = graph.node("Squeeze", [at, graph.whole_numbers([-1])])
    return graph.node("Gather", [graph.whole(operand), flat], axis=axis)


def _dot(graph: OnnxGraph, equation: Any) -> str:
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = equation.invars
    dtype = equation.outvars[0].aval.dtype
    a, b = left.aval.shape, right.aval.shape
    left_free = [i for i in range(len(a)) if i not in (*left_sum, *left_batch)]
    right_free = [i for i in range(len(b)) if i not in (*right_sum, *right_batch)]
    first = graph.transpose(graph.whole(left), [*left_batch, *left_free, *left_sum])
    second = graph.transpose(graph.whole(right), [*right_batch, *right_sum, *right_free])
    first, second = (
        name if one.aval.dtype == dtype else graph.node("Cast", [name], to=graph.type_of(dtype))
        for name, one in ((first, left), (second, right))
    )
    batch = [a[i] for i in left_batch]
    inner = _product([a[i] for i in left_sum])
    if len(left_sum) != 1 or (batch and len(left_free) != 1):
        rows = _product([a[i] for i in left_free]) if batch else None
        kept = [rows] if batch else [a[i] for i in left_free]
        first = graph.reshape(first, [*batch, *kept, inner])
    columns = _product([b[i] for i in right_free])
    if len(right_sum) != 1 or len(right_free) != 1:
        second = graph.reshape(second, [*batch, inner, columns])
    name = graph.node("MatMul", [first, second])
    if len(right_free) == 1 and (len(left_free) == 1 or not batch) and (left_free or batch):
        return name
    return graph.reshape(name, equation.outvars[0].aval.shape)


def _product(dims: Sequence[Any]) -> Any:
    found: Any = 1
    for dim in dims:
        found = found * dim
    return found


def _convolution(graph: OnnxGraph, equation: Any) -> str:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    spatial = len(params["window_strides"])
    odd = set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1
    if odd or any(side < 0 for sides in params["padding"] for side in sides):
        raise UserError("This path has a convolution of a kind that ONNX has no form for here.")
    given, kernel = (graph.whole(one) for one in equation.invars)
    name = graph.node(
        "Conv",
        [graph.transpose(given, numbers.lhs_spec), graph.transpose(kernel, numbers.rhs_spec)],
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        pads=[sides[end] for end in (0, 1) for sides in params["padding"]],
    )
    return graph.transpose(name, [numbers.out_spec.index(i) for i in range(spatial + 2)])


def _condition(graph: OnnxGraph, equation: Any) -> list[OnnxTensor]:
    """Both branches, of which one's results are taken: programs here change nothing else."""
    index, *operands = equation.invars
    if len(equation.params["branches"]) != 2:
        raise UserError("This path has more than two branches, which has no form in ONNX here.")
    found = []
    for branch in equation.params["branches"]:
        for variable, given in zip(branch.jaxpr.invars, operands, strict=True):
            graph.values[variable] = graph.read(given)
        graph.run(branch.jaxpr, branch.consts)
        found.append([graph.whole(result) for result in branch.jaxpr.outvars])
    which = graph.node("Cast", [graph.whole(index)], to=graph.type_of(np.dtype(bool)))
    pairs = zip(*found, strict=True)
    return [OnnxTensor(graph.node("Where", [which, second, first])) for first, second in pairs]


OPERATIONS: dict[str, Operation] = {
    **{kind: elementwise(kind.capitalize()) for kind in ("add", "mul", "sub", "div", "max", "min")},
    **{kind: elementwise(kind.capitalize()) for kind in ("pow", "neg", "exp", "log", "sqrt")},
    **{kind: elementwise(kind.capitalize()) for kind in ("tanh", "erf", "abs", "sign", "floor")},
    **{kind: elementwise(kind.capitalize()) for kind in ("ceil", "sin", "cos")},
    "logistic": elementwise("Sigmoid"),
    "rsqrt": chain("Sqrt", "Reciprocal"),
    "log1p": _log1p,
    "round": _round,
    "square": _square,
    "integer_pow": _integer_pow,
    "is_finite": _is_finite,
    "eq": elementwise("Equal"),
    "ne": _not_equal,
    "lt": elementwise("Less"),
    "le": elementwise("LessOrEqual"),
    "gt": elementwise("Greater"),
    "ge": elementwise("GreaterOrEqual"),
    "and": _logical("And"),
    "or": _logical("Or"),
    "not": _logical("Not"),
    "select_n": _select,
    "clamp": _clamp,
    "convert_element_type": _cast,
    "stop_gradient": _same,
    "copy": _same,
    "reduce_precision": _same,
    "optimization_barrier": lambda graph, equation: [graph.read(one) for one in equation.invars],
    "reduce_sum": reduction("ReduceSum"),
    "reduce_max": reduction("ReduceMax"),
    "reduce_min": reduction("ReduceMin"),
    "reduce_prod": reduction("ReduceProd"),
    "reduce_or": reduction("ReduceMax"),
    "reduce_and": reduction("ReduceMin"),
    "cumsum": _running_sum,
    "argmax": _argmax,
    "top_k": _top_k,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "pad": _pad,
    "squeeze": _squeeze,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "split": _split,
    "iota": _iota,
    "gather": _gather,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "cond": _condition,
    **onnx_loops.LOOPS,
}
