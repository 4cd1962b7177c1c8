"""A graph of ONNX that grows by one operation of a traced program after the other.

What each operation becomes is in `onnx_operations`, where a program is converted; here is what
they are made of: constants, nodes, sizes that depend on the batch, and the finished graph.

A tensor may be kept narrower than it is (`OnnxTensor.narrow`): where broadcasting has made an axis
of size 1 longer, ONNX's arithmetic broadcasts again by itself, and nothing is written out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moezoo.errors import UserError

OPSET = 20  # of 2023, which ONNX Runtime has since 1.17
BATCH = "b"  # the symbol in the program's shapes
MISSING = "Writing ONNX needs the extra 'onnx': pip install 'moezoo[onnx]'."


class OnnxTensor(NamedTuple):
    """A value of the graph: its name; `narrow` where axes of size 1 stand for longer ones."""

    name: str
    narrow: bool = False


def libraries() -> tuple[Any, Any]:
    """The packages onnx and onnxruntime; UserError where they are not installed."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(MISSING) from error
    return onnx, onnxruntime


OnnxValue = str | OnnxTensor | list[str] | list[OnnxTensor]
Operation = Callable[[Any, Any], OnnxValue]  # of the graph and an equation of the program


class OnnxGraph:
    """A graph that grows by one operation of the program after the other.

    operations: what each becomes, by the name of its primitive. given: the name of the input whose
    first axis is the batch.
    """

    def __init__(self, onnx: Any, operations: Mapping[str, Operation], given: str):
        self.onnx, self.operations, self.given = onnx, operations, given
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.values: dict[Any, OnnxTensor] = {}
        self.known: dict[Any, str] = {}
        self.count = 0

    # What operations are made of.

    def fresh(self) -> str:
        """A name that nothing has."""
        self.count += 1
        return f"v{self.count}"

    def node(self, kind: str, inputs: Sequence[str], name: str | None = None, **fields: Any) -> str:
        """Add a node with one output; its name."""
        name = name or self.fresh()
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], **fields))
        return name

    def constant(self, value: np.ndarray, name: str | None = None) -> OnnxTensor:
        """Add a constant; equal small ones become one."""
        value = np.ascontiguousarray(value) if value.ndim else value
        self.type_of(value.dtype)
        key = (value.dtype.str, value.shape, value.tobytes()) if value.size <= 64 else None
        if name is None and key in self.known:
            return OnnxTensor(self.known[key])
        made = name or self.fresh()
        self.initializers.append(self.onnx.numpy_helper.from_array(value, made))
        if name is None and key is not None:
            self.known[key] = made
        return OnnxTensor(made)

    def tensor(self, name: str) -> OnnxTensor:
        """What a node gives, with all of its axes at their sizes."""
        return OnnxTensor(name)

    def whole_numbers(self, values: Sequence[int]) -> str:
        """A constant of int64, as sizes and axes are."""
        return self.constant(np.asarray(values, np.int64)).name

    def type_of(self, dtype: Any) -> int:
        """ONNX's number for a type; UserError for one that its runtimes do not compute in."""
        if str(dtype) not in TYPES:
            raise UserError(
                f"The model computes in {dtype}, which ONNX runtimes hardly know: take a model "
                "with model.dtype float32."
            )
        return getattr(self.onnx.TensorProto, TYPES[str(dtype)])

    def read(self, variable: Any) -> OnnxTensor:
        """The tensor of a variable or a literal of the program."""
        if hasattr(variable, "val"):
            return self.constant(np.asarray(variable.val, variable.aval.dtype))
        return self.values[variable]

    def whole(self, variable: Any) -> str:
        """The tensor of a variable with all of its axes at their sizes."""
        tensor = self.read(variable)
        if not tensor.narrow:
            return tensor.name
        name = self.node("Expand", [tensor.name, self.shape(variable.aval.shape)])
        self.values[variable] = OnnxTensor(name)
        return name

    def size(self, dim: Any) -> str:
        """One size of a shape as int64 [1]; a sum of whole numbers and multiples of the batch."""
        if isinstance(dim, int):
            return self.whole_numbers([dim])
        if ("size", str(dim)) in self.known:
            return self.known["size", str(dim)]
        factor, more = linear(str(dim))
        if "batch" not in self.known:
            shape = self.node("Shape", [self.given])
            self.known["batch"] = self.node("Gather", [shape, self.whole_numbers([0])], axis=0)
        name = self.known["batch"]
        if factor != 1:
            name = self.node("Mul", [name, self.whole_numbers([factor])])
        if more:
            name = self.node("Add", [name, self.whole_numbers([more])])
        self.known["size", str(dim)] = name
        return name

    def shape(self, dims: Sequence[Any], free: bool = False) -> str:
        """A shape as int64 [rank]. free: one size that the batch decides may be left to ONNX."""
        loose = [i for i, dim in enumerate(dims) if not isinstance(dim, int)]
        if not loose:
            return self.whole_numbers(list(dims))
        if free and len(loose) == 1 and all(dim != 0 for dim in dims):
            return self.whole_numbers([-1 if i in loose else dim for i, dim in enumerate(dims)])
        return self.node("Concat", [self.size(dim) for dim in dims], axis=0)

    def reshape(self, name: str, dims: Sequence[Any]) -> str:
        """The same numbers in another shape."""
        return self.node("Reshape", [name, self.shape(dims, free=True)])

    def transpose(self, name: str, order: Sequence[int]) -> str:
        """The same tensor with its axes in another order."""
        if list(order) == list(range(len(order))):
            return name
        return self.node("Transpose", [name], perm=list(order))

    # The program.

    def run(self, jaxpr: Any, consts: Sequence[Any]) -> None:
        """Add every operation of a program whose inputs are known."""
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            self.values[variable] = self.constant(np.asarray(value))
        for equation in jaxpr.eqns:
            self.add(equation)

    def add(self, equation: Any) -> None:
        """Add one operation."""
        kind = equation.primitive.name
        inner = next((equation.params[k] for k in INNER if k in equation.params), None)
        if kind in CALLS and inner is not None:
            return self.inline(equation, inner)
        if kind not in self.operations:
            raise UserError(
                f"This path has the operation '{kind}', which has no form in ONNX here: leave out "
                "onnx; the folder's own program runs with JAX."
            )
        made = self.operations[kind](self, equation)
        outputs = made if isinstance(made, list) else [made]
        for variable, one in zip(equation.outvars, outputs, strict=True):
            self.values[variable] = one if isinstance(one, OnnxTensor) else OnnxTensor(one)

    def inline(self, equation: Any, inner: Any) -> None:
        """Add the operations of a program that this one calls."""
        jaxpr = getattr(inner, "jaxpr", inner)
        for variable, given in zip(jaxpr.invars, equation.invars, strict=True):
            self.values[variable] = self.read(given)
        self.run(jaxpr, getattr(inner, "consts", ()))
        for variable, result in zip(equation.outvars, jaxpr.outvars, strict=True):
            self.values[variable] = self.read(result)

    def model(self, given: tuple[str, Any], results: Sequence[tuple[str, Any]]) -> Any:
        """The finished graph, checked by onnx."""
        helper = self.onnx.helper

        def about(name: str, aval: Any) -> Any:
            dims = [dim if isinstance(dim, int) else "batch" for dim in aval.shape]
            return helper.make_tensor_value_info(name, self.type_of(aval.dtype), dims)

        outputs = [about(name, aval) for name, aval in results]
        graph = helper.make_graph(
            self.nodes, "path", [about(*given)], outputs, initializer=self.initializers
        )
        opsets = [helper.make_opsetid("", OPSET)]
        made = helper.make_model(graph, opset_imports=opsets, producer_name="moezoo")
        made.ir_version = 9  # as old as the opset: newer ones are refused by older runtimes
        return made


TYPES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "int32": "INT32",
    "int64": "INT64",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}
CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")
CALLS += ("custom_vjp_call_jaxpr",)
INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def linear(text: str) -> tuple[int, int]:
    """Factor of the batch and what is added to it, of a size such as `2*b + 1`."""
    factor, more = 0, 0
    for sign, term in re.findall(r"([+-]?)\s*([^+\-\s]+)", text):
        match = re.fullmatch(rf"(?:(\d+)\*)?({BATCH})|(\d+)", term)
        if match is None:
            raise UserError(f"A size of this path is {text}, which has no form in ONNX here.")
        number = int(match[3] or match[1] or 1) * (-1 if sign == "-" else 1)
        factor, more = (factor + number, more) if match[2] else (factor, more + number)
    return factor, more
