"""Which operations the program of an export may have: an allow-list, checked before compiling.

Reads the StableHLO module itself. A program may do arithmetic on arrays, call its own functions,
and loop while a counter that grows by one is below a limit that the loop does not change. Custom
calls, which name code outside of the program, are refused but for JAX's assertion about shapes,
and so are annotations that reach past the arithmetic, communication and streams.

A copy travels in every export, beside `schema_check.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jax.extend import mlir
from jax.extend.mlir import ir

if __package__:
    from moezoo import schema_check as sc
else:
    import schema_check as sc  # pyright: ignore[reportMissingImports]

MOST_NUMBERS = 2**31  # in one array, a batch counted as 1
MOST_STEPS = 10**7  # operations when all calls and all loops of a known length are written out
ELEMENTWISE = """abs add and atan2 cbrt ceil clamp compare complex convert cosine
 count_leading_zeros divide exponential exponential_minus_one floor imag is_finite log
 log_plus_one logistic maximum minimum multiply negate not or popcnt power real
 reduce_precision remainder round_nearest_afz
 round_nearest_even rsqrt select shift_left shift_right_arithmetic shift_right_logical sign sine
 sqrt subtract tan tanh xor"""
SHAPING = """bitcast_convert broadcast_in_dim concatenate constant convolution dot_general
 dynamic_broadcast_in_dim dynamic_conv dynamic_gather dynamic_iota dynamic_pad dynamic_reshape
 dynamic_slice dynamic_update_slice gather get_dimension_size get_tuple_element iota map
 optimization_barrier pad real_dynamic_slice reduce reduce_window reshape reverse scatter
 select_and_scatter slice sort transpose"""
CONTROL = "case composite custom_call if return while"
ALLOWED = {f"stablehlo.{name}" for name in f"{ELEMENTWISE} {SHAPING} {CONTROL}".split()}
ALLOWED |= {"func.func", "func.call", "func.return"}
CUSTOM = {"shape_assertion"}  # JAX evaluates it before anything is compiled
COMPOSITES = "chlo."  # mathematical functions, with their definition
# Annotations have a dot in their names; these say what arguments and results are.
ANNOTATIONS = {"jax.uses_shape_polymorphism", "mhlo.num_partitions", "mhlo.num_replicas"}
ANNOTATIONS |= {"jax.global_constant", "jax.result_info", "jax.arg_info"}
OUTSIDE = {"backend_config", "called_computations", "output_operand_aliases"}


@dataclass
class _Function:
    """What a function consists of: its own steps, and calls with how often each is made."""

    steps: float = 0
    calls: list[tuple[str, float]] = field(default_factory=list)


def check(serialized: bytes) -> None:
    """Raise FormatFault for a module with anything that is not allowed."""
    with ir.Context():
        module = mlir.deserialize_portable_artifact(serialized)
        _check_attributes(module.operation, ANNOTATIONS | {"sym_name"})
        functions: dict[str, _Function] = {}
        for op in module.body.operations:
            if op.operation.name != "func.func":
                raise sc.FormatFault(f"it holds {sc.shown(op.operation.name)} beside its functions")
            name = ir.StringAttr(op.operation.attributes["sym_name"]).value
            functions[name] = _function(op.operation)
    _check_steps(functions)


def _function(function: Any) -> _Function:
    found = _Function()
    _check_operation(function)
    waiting = [(op, 1.0) for op in _inside(function)]
    while waiting:
        op, rounds = waiting.pop()
        _check_operation(op)
        found.steps += rounds
        for name in ("callee", "decomposition"):
            if name in op.attributes:
                called = ir.FlatSymbolRefAttr(op.attributes[name]).value
                found.calls.append((called, rounds))
        if op.name == "stablehlo.while":
            rounds *= _rounds(op)
        waiting += [(inner, rounds) for inner in _inside(op)]
    return found


def _inside(op: Any) -> Iterator[Any]:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation


def _check_operation(op: Any) -> None:
    if op.name not in ALLOWED:
        raise sc.FormatFault(f"it has the operation {sc.shown(op.name)}, which no export needs")
    _check_attributes(op, ANNOTATIONS)
    if op.name == "stablehlo.custom_call":
        target = ir.StringAttr(op.attributes["call_target_name"]).value
        if target not in CUSTOM:
            raise sc.FormatFault(f"it calls {sc.shown(target)} outside of it")
    if op.name == "stablehlo.composite":
        name = ir.StringAttr(op.attributes["name"]).value
        if not name.startswith(COMPOSITES):
            raise sc.FormatFault(f"it has the composite {sc.shown(name)}, which no export needs")
    for result in op.results:
        _check_type(result.type)


def _check_attributes(op: Any, known: set[str]) -> None:
    """Refuse annotations that are none of `known`, and attributes that name code outside."""
    attributes = {_name(one): op.attributes[_name(one)] for one in op.attributes}
    for key in ("arg_attrs", "res_attrs"):
        for one in ir.ArrayAttr(attributes[key]) if key in attributes else ():
            attributes |= {_name(inner): inner for inner in ir.DictAttr(one)}
    for name in attributes:
        if name in OUTSIDE or ("." in name and name not in known):
            raise sc.FormatFault(f"it has the attribute {sc.shown(name)}, which no export needs")
    for name in ("mhlo.num_partitions", "mhlo.num_replicas"):
        if name in attributes and ir.IntegerAttr(attributes[name]).value != 1:
            raise sc.FormatFault("it is for several devices")


def _name(attribute: Any) -> str:
    return attribute if isinstance(attribute, str) else attribute.name


def _check_type(kind: Any) -> None:
    if not isinstance(kind, ir.RankedTensorType):
        raise sc.FormatFault(f"it has a value of the type {sc.shown(str(kind))}")
    sizes = [kind.get_dim_size(i) for i in range(kind.rank) if not kind.is_dynamic_dim(i)]
    if math.prod(sizes) > MOST_NUMBERS:
        raise sc.FormatFault(f"it has an array of the size {sizes}")


def _rounds(loop: Any) -> float:
    """How often a loop goes round where that is known, 1 where it depends on numbers.

    Raises FormatFault for a loop that does not count to a limit.
    """
    test, body = (region.blocks[0] for region in loop.regions)
    counter, limit = _comparison(test)
    results = list(body.operations[len(body.operations) - 1].operation.operands)
    step = _made_by(results[counter])
    here = body.arguments[counter]
    if step is None or step.name != "stablehlo.add" or _grown(step, here) != 1:
        raise sc.FormatFault("it has a loop whose counter does not grow by one")
    if isinstance(limit, int):
        if results[limit] != body.arguments[limit]:
            raise sc.FormatFault("it has a loop that changes its limit")
        limit = loop.operands[limit]
    first, last = _constant(loop.operands[counter]), _constant(limit)
    return 1.0 if first is None or last is None else float(max(last - first, 0))


def _comparison(test: Any) -> tuple[int, Any]:
    """Which of a loop's values counts, and its limit: another one's number, or a value outside."""
    result = test.operations[len(test.operations) - 1].operation.operands[0]
    compare = _made_by(result)
    if compare is not None and compare.name == "stablehlo.compare":
        left, right = compare.operands
        arguments = list(test.arguments)
        below = str(compare.attributes["comparison_direction"]).endswith(" LT>")
        if below and left in arguments and str(left.type) in ("tensor<i32>", "tensor<i64>"):
            limit = arguments.index(right) if right in arguments else right
            return arguments.index(left), limit
    raise sc.FormatFault("it has a loop that does not count to a limit")


def _made_by(value: Any) -> Any:
    """The operation that a value is the result of; None for arguments."""
    return None if isinstance(value, ir.BlockArgument) else value.owner.operation


def _grown(step: Any, counter: Any) -> int | None:
    left, right = step.operands
    other = right if left == counter else left if right == counter else None
    return None if other is None else _constant(other)


def _constant(value: Any) -> int | None:
    """A whole number that is written in the program."""
    made = _made_by(value)
    if made is None or made.name != "stablehlo.constant":
        return None
    stored = made.attributes["value"]
    if not isinstance(stored, ir.DenseIntElementsAttr) or len(stored) != 1:
        return None
    return int(stored[0])


def _check_steps(functions: dict[str, _Function]) -> None:
    """Refuse functions that call themselves, and programs whose calls multiply without end."""
    done: dict[str, float] = {}
    for start in functions:
        stack = [(start, False)]
        open_now: set[str] = set()
        while stack:
            name, called_all = stack.pop()
            if name not in functions:
                raise sc.FormatFault(f"it calls {sc.shown(name)}, which it does not have")
            if called_all:
                inner = (rounds * done[called] for called, rounds in functions[name].calls)
                done[name] = functions[name].steps + sum(inner)
                open_now.discard(name)
                if done[name] > MOST_STEPS:
                    raise sc.FormatFault(f"it takes more than {MOST_STEPS:,} steps")
            elif name in open_now:
                raise sc.FormatFault("it has a function that calls itself")
            elif name not in done:
                open_now.add(name)
                stack.append((name, True))
                stack += [(called, False) for called, _ in functions[name].calls]
