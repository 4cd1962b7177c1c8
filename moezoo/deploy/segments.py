"""A traced model cut in pieces where it applies experts, so that something else can apply them.

Every MoE layer gets a backend (`ExpertCall`) that computes nothing: it leaves a mark in the traced
program, with tokens, decision and the experts' parameters as its operands. The program is cut at
these marks. What lies between two of them is compiled as it stands, whatever the model is; the
experts' parameters never become arrays, only the names of where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    jaxpr_as_fun,
)

from moezoo.errors import UserError
from moezoo.ops.expert import (
    Applied,
    Backend,
    ExpertFn,
    ExpertLinear,
    Params,
    count_experts,
    dense,
)
from moezoo.ops.routing import Routing, pick


class StoredLeaf(jax.ShapeDtypeStruct):
    """In the place of an array: its shape and type, and its name in a file of weights."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, name: str):
        super().__init__(shape, dtype)
        self.name = name


MARK = Primitive("expert_call")
# Compiled functions inside of a program, which are taken apart where they hold a mark.
INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "remat")


@MARK.def_abstract_eval
def _marked(x: Any, experts: Any, weights: Any, *leaves: Any, row: Any, **others: Any) -> Any:
    return x.update(shape=(x.shape[0], *row.shape))


@dataclass(frozen=True)
class ExpertCall:
    """The backend of a layer whose experts are applied between two pieces of the program.

    layer: its path.   backend: its own, which says what is dropped.
    """

    layer: str
    backend: Backend

    def __call__(self, fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        weights_NK, dropped = effective_weights(self.backend, routing, count_experts(params))
        # A choice without weight gives nothing: its expert need not be read for it.
        experts_NK = jnp.where(weights_NK == 0, -1, routing.experts_NK)
        leaves, tree = jax.tree.flatten(params)
        row = _row_of(fn, params, x_ND)
        y_ND = MARK.bind(
            *(x_ND, experts_NK, weights_NK, *leaves),
            **{"fn": fn, "tree": tree, "row": row, "layer": self.layer},
        )
        return Applied(y_ND, dropped)


def _row_of(fn: ExpertFn, params: Params, x_ND: Array) -> jax.ShapeDtypeStruct:
    """Shape and type of what one expert makes of one row."""
    own = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), params)
    x_RD = jax.ShapeDtypeStruct((1, x_ND.shape[1]), x_ND.dtype)
    made = jax.eval_shape(lambda p, x: fn(p, x, dense), own, x_RD)
    return jax.ShapeDtypeStruct(made.shape[1:], made.dtype)


def effective_weights(backend: Backend, routing: Routing, experts: int) -> tuple[Array, Array]:
    """What each choice weighs in the end, float32 [N, K], and how many the backend dropped.

    A backend that drops choices is asked by experts that each give their own number as a one-hot
    row: its output is then the weight of every expert, whatever its rule. One whose count of
    dropped choices depends on nothing drops none, and is not asked.
    """
    n = routing.experts_NK.shape[0]
    own_E1E = np.eye(experts, dtype=np.float32)[:, None]

    def one_hot(params: Params, x: Array, linear: ExpertLinear) -> Array:
        return linear(x, params)

    def ask(routing: Routing) -> tuple[Array, Array]:
        weights_NE, dropped = backend(one_hot, own_E1E, jnp.ones((n, 1)), routing)
        return pick(weights_NE, routing.experts_NK), dropped

    asked = jax.make_jaxpr(ask)(routing).jaxpr
    if not needed(asked.eqns, asked.outvars[1:])[1].intersection(asked.invars):
        return routing.weights_NK, jnp.zeros((), jnp.int32)
    weights_NK, dropped = ask(routing)
    return jnp.where(routing.experts_NK >= 0, weights_NK, 0.0), dropped


def needed(eqns: Sequence[JaxprEqn], outs: Sequence[Any]) -> tuple[list[JaxprEqn], set[Var]]:
    """The equations that `outs` need, in order, and all variables that are used."""
    used = {v for v in outs if isinstance(v, Var)}
    kept = []
    for eqn in reversed(eqns):
        if used.intersection(eqn.outvars):
            kept.append(eqn)
            used.update(v for v in _read(eqn) if isinstance(v, Var))
    return kept[::-1], used


def _read(eqn: JaxprEqn) -> Sequence[Any]:
    """What the program itself has to bring for an equation: of a mark, all but the parameters."""
    return eqn.invars[:3] if eqn.primitive is MARK else eqn.invars


class StoredOperand(NamedTuple):
    """Stacked parameters as they reach experts: an input of the program, converted step by step."""

    name: str
    dtypes: tuple[np.dtype, ...]


class CutCall(NamedTuple):
    """One application of experts: its layer, function and operands, and the variable it gives.

    row: shape and type of what one expert makes of one row.
    """

    layer: str
    fn: ExpertFn
    tree: Any
    operands: tuple[StoredOperand, ...]
    experts: int
    row: jax.ShapeDtypeStruct
    tokens: tuple[Any, Any, Any]  # x_ND, experts_NK, weights_NK
    result: Var


class Segment(NamedTuple):
    """A compiled piece: which variables it reads and gives; `call` is what comes behind it."""

    run: Callable[..., Any]
    reads: tuple[Var, ...]
    gives: tuple[Var, ...]
    call: CutCall | None
    last: frozenset[Var]  # nobody needs these afterwards


class CutProgram(NamedTuple):
    """A whole program: its inputs and those of them that no array comes for, pieces, outputs."""

    inputs: tuple[Var, ...]
    stored: frozenset[Var]
    constants: dict[Var, Any]
    segments: tuple[Segment, ...]
    outputs: tuple[Any, ...]
    tree: Any


def cut(fn: Callable[[Any], Any], given: Any) -> CutProgram:
    """`fn(given)` cut where it applies experts.

    given: a tree of arrays, and of `StoredLeaf` where none will come. Raises UserError where
    experts are applied inside of a compiled loop, where something else than experts reads what is
    stored, and where there are no experts.
    """
    traced, shape = jax.make_jaxpr(fn, return_shape=True)(given)
    traced = _flattened(traced)
    jaxpr = traced.jaxpr
    leaves = jax.tree.leaves(given)
    names = {
        var: leaf.name
        for var, leaf in zip(jaxpr.invars, leaves, strict=True)
        if isinstance(leaf, StoredLeaf)
    }
    eqns, used = needed(jaxpr.eqns, jaxpr.outvars)
    for var in used.intersection(names):
        raise UserError(
            f"{names[var]} is read by more than its experts, so it cannot come from a file one by "
            "one: load this model as a whole."
        )
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    calls = [_call(eqn, makers, names) for eqn in eqns if eqn.primitive is MARK]
    if not calls:
        raise UserError(
            "This model applies no stacked experts: nothing can be streamed, load it as a whole."
        )
    segments = tuple(_segments(jaxpr, _pieces(eqns), calls))
    constants = dict(zip(jaxpr.constvars, traced.consts, strict=True))
    return CutProgram(
        tuple(jaxpr.invars), frozenset(names), constants, segments, tuple(jaxpr.outvars),
        jax.tree.structure(shape),
    )  # fmt: skip


def _flattened(traced: ClosedJaxpr) -> ClosedJaxpr:
    """The program without compiled functions that hold a mark: these are written out."""
    if all(eqn.primitive is MARK or not _holds_mark(eqn) for eqn in traced.jaxpr.eqns):
        return traced
    arguments = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in traced.jaxpr.invars]
    return jax.make_jaxpr(lambda *values: _written_out(traced.jaxpr, traced.consts, values))(
        *arguments
    )


def _written_out(jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    found: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    found.update(zip(jaxpr.invars, values, strict=True))

    for eqn in jaxpr.eqns:
        if eqn.primitive is not MARK and _holds_mark(eqn):
            outs = _opened(eqn, [_value(found, v) for v in eqn.invars])
        else:
            reads = [v for v in eqn.invars if isinstance(v, Var)]
            outs = _as_function(jaxpr, [eqn], reads, eqn.outvars)(*(found[v] for v in reads))
        found.update(zip(eqn.outvars, outs, strict=True))
    return [_value(found, v) for v in jaxpr.outvars]


def _opened(eqn: JaxprEqn, arguments: Sequence[Any]) -> list[Any]:
    if eqn.primitive.name not in INLINED:
        raise UserError(
            f"Experts are applied inside of a compiled '{eqn.primitive.name}', which cannot be cut "
            "between two of its rounds: load this model as a whole, or unrolled (--model.layers "
            "unrolled)."
        )
    inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
    return _written_out(closed.jaxpr, closed.consts, arguments)


def _as_function(
    jaxpr: Jaxpr, eqns: Sequence[JaxprEqn], reads: Sequence[Any], gives: Sequence[Any]
) -> Callable[..., Sequence[Any]]:
    """Equations of a program as a function from variables that they read to some that they give."""
    about = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return jaxpr_as_fun(ClosedJaxpr(Jaxpr((), reads, gives, eqns, debug_info=about), ()))


def _value(found: Mapping[Any, Any], v: Any) -> Any:
    return v.val if isinstance(v, Literal) else found[v]


def _holds_mark(eqn: JaxprEqn) -> bool:
    return eqn.primitive is MARK or any(
        _holds_mark(inner) for jaxpr in _inside(eqn.params) for inner in jaxpr.eqns
    )


def _inside(value: Any) -> Iterator[Jaxpr]:
    """The programs among an equation's parameters."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _inside(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _inside(one)


def _call(eqn: JaxprEqn, makers: Mapping[Any, JaxprEqn], names: Mapping[Any, str]) -> CutCall:
    params = eqn.params
    operands = tuple(_operand(v, params["layer"], makers, names) for v in eqn.invars[3:])
    x, experts, weights = eqn.invars[:3]
    stack: Any = eqn.invars[3].aval
    (result,) = eqn.outvars
    return CutCall(
        params["layer"], params["fn"], params["tree"], operands, stack.shape[0], params["row"],
        (x, experts, weights), result,
    )  # fmt: skip


def _operand(
    v: Any, layer: str, makers: Mapping[Any, JaxprEqn], names: Mapping[Any, str]
) -> StoredOperand:
    """Where an operand comes from; only conversions may lie between, which keep rows apart."""
    dtypes: list[np.dtype] = []
    while v in makers and makers[v].primitive.name == "convert_element_type":
        dtypes.insert(0, np.dtype(makers[v].params["new_dtype"]))
        v = makers[v].invars[0]
    if v not in names:
        how = f"go through '{makers[v].primitive.name}'" if v in makers else "are no parameters"
        raise UserError(
            f"The experts of {layer} {how} before they are applied, so they cannot come from a "
            "file one by one: load this model as a whole."
        )
    return StoredOperand(names[v], (np.dtype(v.aval.dtype), *dtypes))


def _pieces(eqns: Sequence[JaxprEqn]) -> list[list[JaxprEqn]]:
    """The equations before, between and behind the marks."""
    pieces: list[list[JaxprEqn]] = [[]]
    for eqn in eqns:
        if eqn.primitive is MARK:
            pieces.append([])
        else:
            pieces[-1].append(eqn)
    return pieces


def _segments(
    jaxpr: Jaxpr, pieces: Sequence[Sequence[JaxprEqn]], calls: Sequence[CutCall]
) -> Iterator[Segment]:
    # From behind: what a piece gives is what anybody later reads of it.
    wanted = {v for v in jaxpr.outvars if isinstance(v, Var)}
    kept = frozenset(wanted)
    found = []
    for piece, call in zip(reversed(pieces), (None, *reversed(calls)), strict=True):
        after = frozenset(wanted)
        tokens = () if call is None else tuple(v for v in call.tokens if isinstance(v, Var))
        if call is not None:
            wanted.discard(call.result)
        wanted.update(tokens)
        made = {v for eqn in piece for v in eqn.outvars}
        gives = tuple(sorted(made & wanted, key=_number(piece)))
        reads: Any = tuple(dict.fromkeys(v for e in piece for v in e.invars if _outside(v, made)))
        wanted = (wanted - made) | set(reads)
        last: Any = frozenset({*reads, *tokens}) - after - kept
        run = jax.jit(_as_function(jaxpr, piece, reads, gives))
        found.append(Segment(run, reads, gives, call, last))
    yield from reversed(found)


def _number(piece: Sequence[JaxprEqn]) -> Callable[[Any], int]:
    made = [v for eqn in piece for v in eqn.outvars]
    return {v: i for i, v in enumerate(made)}.__getitem__


def _outside(v: Any, made: set[Any]) -> bool:
    return isinstance(v, Var) and v not in made


def run_program(
    program: CutProgram, given: Any, apply: Callable[[CutCall, Any, Any, Any], Any]
) -> Any:
    """What the whole program gives; `apply(call, x_ND, experts_NK, weights_NK)` gives y_ND.

    given: a tree like that which the program was cut for.
    """
    found: dict[Any, Any] = dict(program.constants)
    leaves = zip(program.inputs, jax.tree.leaves(given), strict=True)
    found.update({var: leaf for var, leaf in leaves if var not in program.stored})
    for segment in program.segments:
        if segment.gives:
            outs = segment.run(*(found[v] for v in segment.reads))
            found.update(zip(segment.gives, outs, strict=True))
        if segment.call is not None:
            tokens = (_value(found, v) for v in segment.call.tokens)
            found[segment.call.result] = apply(segment.call, *tokens)
        for var in segment.last:
            found.pop(var, None)
    return jax.tree.unflatten(program.tree, [_value(found, v) for v in program.outputs])
