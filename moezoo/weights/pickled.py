"""The values of a pickle of PyTorch, without running it.

A pickle is a program that may call any function there is. Here its steps are followed on a stack of
plain values, and all that it can call are the few functions of `MAKERS`, which are ours and make
tuples and dictionaries. What else it names is either known to be harmless and becomes an `Inert`
without content, or is refused by name (`Refused`).

    values, rest = read(content)
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from moezoo.schema_check import FormatFault, shortened, shown

MOST_STEPS = 4_000_000  # an array takes about thirty
MOST_MARKS = 100_000  # that stand open at once: a level of nesting has one


class Refused(Exception):
    """A pickle that wants something which no weights need, in words that follow its name."""


class Asked(NamedTuple):
    """A function or class that a pickle names; nothing was imported."""

    name: str


class Inert(NamedTuple):
    """Something of another program that is no array: only what it was is kept."""

    name: str


class StorageRef(NamedTuple):
    """The flat memory behind arrays: its type's name in PyTorch, its key, its elements."""

    kind: str
    key: str
    count: int


class StorageView(NamedTuple):
    """An array: elements of a storage from `offset` on, in steps of `strides`."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# Results, options and settings that training programs keep beside their weights.
HARMLESS = frozenset({
    "argparse.Namespace", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "_codecs.encode", "builtins.set", "__builtin__.set",
    "collections.defaultdict", "collections.Counter", "builtins.dict", "__builtin__.dict",
    "builtins.list", "__builtin__.list", "builtins.int", "__builtin__.int", "builtins.float",
    "__builtin__.float", "builtins.complex", "__builtin__.complex", "builtins.bytearray",
    "__builtin__.bytearray", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath",
    "torch.device", "torch.Size", "torch.Generator",
})  # fmt: skip
DTYPES = frozenset(
    f"torch.{name}"
    for name in (
        "float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8 bool complex64 complex128"
    ).split()
)


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, list | tuple):
        raise FormatFault(f"it makes a table of a {type(pairs).__name__}")
    made: dict[Any, Any] = {}
    for name, value in pairs:
        _put(made, name, value)
    return made


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StorageView:
    """Of `_rebuild_tensor_v2`; further arguments are about gradients."""
    if not isinstance(storage, StorageRef):
        raise FormatFault("an array in it has no storage")
    for what, numbers in (("shape", shape), ("strides", strides), ("offset", (offset,))):
        if not isinstance(numbers, tuple) or any(type(n) is not int for n in numbers):
            raise FormatFault(f"an array's {what} is no whole numbers")
    return StorageView(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


def read(
    content: bytes, start: int = 0, refs: dict[str, StorageRef] | None = None
) -> tuple[Any, int]:
    """The value of the pickle that begins at `start`, and where it ends.

    refs: is given the storages that it refers to, by key.
    Raises Refused for what asks for more than weights need, FormatFault or a ValueError of the
    standard library for what is no whole pickle.
    """
    file = io.BytesIO(content)
    file.seek(start)
    machine = _Machine({} if refs is None else refs)
    for step, (code, given, _) in enumerate(pickletools.genops(file)):
        if step >= MOST_STEPS:
            raise FormatFault(f"it takes more than {MOST_STEPS:,} steps")
        if code.name == "STOP":
            return machine.pop(), file.tell()
        machine.follow(code.name, given)
    raise FormatFault("it has no end")


def _put(table: dict[Any, Any], name: Any, value: Any) -> None:
    """Only plain names: a deep tuple's hash alone can end the process."""
    if not isinstance(name, str | int | float | bytes | None):
        raise FormatFault(f"a table in it has a {type(name).__name__} for a name")
    if name in table:
        raise FormatFault(f"it has {shown(name)} twice")
    table[name] = value


PUSHES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
})  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
FRESH: dict[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Inert("set"),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


class _Machine:
    """The stack of a pickle. Everything on it is a plain value or a tuple of this file."""

    def __init__(self, refs: dict[str, StorageRef]) -> None:
        self.refs = refs
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # what lies under each mark
        self.memo: dict[int, Any] = {}
        self.passed = 0  # values given to functions, which may be the same ones again and again

    def pop(self) -> Any:
        """The topmost value."""
        if not self.stack:
            raise FormatFault("it takes from an empty stack")
        return self.stack.pop()

    def popped(self, count: int) -> list[Any]:
        """The topmost values, lowest first."""
        if len(self.stack) < count:
            raise FormatFault("it takes from an empty stack")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def marked(self) -> list[Any]:
        """Everything above the last mark, which goes."""
        if not self.below:
            raise FormatFault("it looks for a mark that is not there")
        taken, self.stack = self.stack, self.below.pop()
        return taken

    def follow(self, code: str, given: Any) -> None:
        """One step of the program: its name and its argument."""
        if code in PUSHES:
            self.stack.append(given)
        elif code in CONSTANTS:
            self.stack.append(CONSTANTS[code])
        elif code in FRESH:
            self.stack.append(FRESH[code]())
        elif code in TUPLES:
            self.stack.append(tuple(self.popped(TUPLES[code])))
        elif code in PUTS:
            self.memo[given] = self.top()
        elif code in GETS:
            if given not in self.memo:
                raise FormatFault(f"it looks for {shown(given)}, which it did not keep")
            self.stack.append(self.memo[given])
        elif code in STEPS:
            STEPS[code](self, given)
        else:
            raise Refused(f"has a step {code}, which no weights need")

    def top(self) -> Any:
        """The topmost value, which stays."""
        if not self.stack:
            raise FormatFault("it looks at an empty stack")
        return self.stack[-1]

    def mark(self, _: Any) -> None:
        """A place on the stack to come back to."""
        if len(self.below) == MOST_MARKS:
            raise FormatFault(f"it leaves more than {MOST_MARKS:,} marks open")
        self.below.append(self.stack)
        self.stack = []

    def gather(self, form: Callable[[list[Any]], Any]) -> None:
        """A list or tuple of what lies above the mark."""
        values = self.marked()
        self.stack.append(form(values))

    def drop(self, _: Any) -> None:
        """The topmost value, or mark, is forgotten."""
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def keep(self, _: Any) -> None:
        """The top, under the next number."""
        self.memo[len(self.memo)] = self.top()

    def extend(self, values: list[Any]) -> None:
        """Values for the list, or forgotten set, that lies on top."""
        top = self.top()
        if isinstance(top, list):
            top.extend(values)
        elif not isinstance(top, Inert):
            raise FormatFault(f"it adds to a {type(top).__name__}")

    def fill(self, values: list[Any]) -> None:
        """Names and values in turn for the dictionary on top."""
        top = self.top()
        if isinstance(top, Inert):
            return
        if not isinstance(top, dict) or len(values) % 2:
            raise FormatFault(f"it fills a {type(top).__name__} with names")
        for name, value in zip(values[::2], values[1::2], strict=True):
            _put(top, name, value)

    def table(self, _: Any) -> None:
        """A dictionary of what lies above the mark."""
        values = self.marked()
        self.stack.append({})
        self.fill(values)

    def name(self, module: Any, attribute: Any) -> None:
        """A function or class that is called by these names."""
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise FormatFault("it asks for something without a name")
        name = f"{module}.{attribute}"
        if name in DTYPES:
            self.stack.append(Inert(name))
            return
        if name not in MAKERS and name not in HARMLESS and not is_storage(name):
            raise Refused(f"asks for {shortened(ascii(name)[1:-1], 100)}, which no weights need")
        self.stack.append(Asked(name))

    def call(self, function: Any, given: Any) -> None:
        """One of our functions, or nothing."""
        if not isinstance(function, Asked) or not isinstance(given, tuple):
            raise FormatFault(f"it calls a {type(function).__name__}")
        self.passed += sum(len(one) for one in (given, *given) if isinstance(one, list | tuple))
        if self.passed > MOST_STEPS:
            raise FormatFault(f"it takes more than {MOST_STEPS:,} steps")
        if function.name in HARMLESS:
            self.stack.append(Inert(function.name))
        elif function.name in MAKERS:
            self.stack.append(MAKERS[function.name](*given))
        else:
            raise Refused(f"calls {function.name}, which no weights need")

    def settle(self, _: Any) -> None:
        """State for the object on top: attributes, of which none is kept."""
        self.pop()
        if not isinstance(self.top(), dict | StorageView | Inert):
            raise FormatFault(f"it gives attributes to a {type(self.top()).__name__}")

    def refer(self, _: Any) -> None:
        """A storage, whose bytes lie elsewhere."""
        found = self.pop()
        if not isinstance(found, tuple) or len(found) not in (5, 6) or found[0] != "storage":
            raise FormatFault("it refers to something that is no storage")
        _, kind, key, _, count = found[:5]
        if found[5:] not in ((), (None,)):
            raise Refused("has views of storages, as PyTorch before 0.4 wrote: save it again")
        if not isinstance(kind, Asked) or not is_storage(kind.name):
            raise FormatFault("it has a storage without a type")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise FormatFault(f"its storage {shown(key)} has {shown(count)} elements")
        self.refs[key] = StorageRef(kind.name.rpartition(".")[2], key, count)
        self.stack.append(self.refs[key])


def is_storage(name: str) -> bool:
    """Whether this is one of PyTorch's classes of typed storages, on a GPU or not."""
    module, _, leaf = name.rpartition(".")
    return module in ("torch", "torch.cuda") and leaf in STORAGES


STORAGES = frozenset(
    f"{kind}Storage"
    for kind in (
        "Float Double Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble"
    ).split()
)


def _object(machine: _Machine, _: Any) -> None:
    function, values = machine.popped(2)
    machine.call(function, values)


def _instance(machine: _Machine, given: str) -> None:
    """As the oldest pickles make objects."""
    values = tuple(machine.marked())
    machine.name(*given.split(" ", 1))
    machine.call(machine.pop(), values)


STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda machine, given: None,
    "FRAME": lambda machine, given: None,
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": lambda machine, given: machine.marked(),
    "DUP": lambda machine, given: machine.stack.append(machine.top()),
    "MEMOIZE": _Machine.keep,
    "TUPLE": lambda machine, given: machine.gather(tuple),
    "LIST": lambda machine, given: machine.gather(list),
    "DICT": _Machine.table,
    "APPEND": lambda machine, given: machine.extend(machine.popped(1)),
    "APPENDS": lambda machine, given: machine.extend(machine.marked()),
    "ADDITEMS": lambda machine, given: machine.extend(machine.marked()),
    "SETITEM": lambda machine, given: machine.fill(machine.popped(2)),
    "SETITEMS": lambda machine, given: machine.fill(machine.marked()),
    "GLOBAL": lambda machine, given: machine.name(*given.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, given: machine.name(*machine.popped(2)),
    "REDUCE": _object,
    "NEWOBJ": _object,
    "INST": _instance,
    "BUILD": _Machine.settle,
    "BINPERSID": _Machine.refer,
}
