"""What a compiled program moves between devices, read out of its text, and the least it could.

The text has the body of a loop once, so it is first read how often every part runs (`repeats`).
Bytes are those that one device sends when every operation runs in its best known way: an
all-gather of a result of b bytes over g devices costs b (g-1)/g, a reduce-scatter of b bytes and an
all-to-all as much, an all-reduce twice as much, a permutation b.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from moezoo.ops.expert_parallel import share_of_tokens

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_WHILE = re.compile(r" while\(.*?condition=%?(?P<condition>[\w.-]+), body=%?(?P<body>[\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|\S+)")
_KNOWN = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"%?(?P<name>[\w.-]+) = [su]\d+\[\]\S* constant\((?P<value>\d+)\)")
_LESS = re.compile(r"ROOT .* compare\((?P<operands>.*?)\), direction=LT")
_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>.+?) "
    rf"(?P<kind>{'|'.join(sorted(KINDS, key=len, reverse=True))})(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(?P<type>[a-z]+\d*[a-z0-9]*)\[(?P<sizes>[\d,<=]*)\]")


class Collective(NamedTuple):
    """One operation of a program.

    kind: its name in the text without -start. members: the devices of its first group, numbered in
    the order of the mesh; of a permutation one pair. bytes: of the whole buffer on one device,
    before a scatter or after a gather; of a ragged-all-to-all the room of the result, whatever of
    it is used. times: how often it runs in one run of the program.
    """

    kind: str
    members: tuple[int, ...]
    bytes: int
    times: int = 1

    @property
    def group(self) -> int:
        """How many devices take part together."""
        return len(self.members)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh of these sizes that it runs over."""
        places = np.unravel_index(np.asarray(self.members), tuple(mesh.values()))
        return tuple(axis for axis, at in zip(mesh, places, strict=True) if np.ptp(at) > 0)

    @property
    def sent(self) -> float:
        """Bytes that one device sends, all times together."""
        away, total = (self.group - 1) / self.group, self.bytes * self.times
        if self.kind == "all-reduce":
            return 2 * total * away
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(total)
        return total * away


def collectives(text: str, devices: int) -> list[Collective]:
    """The operations in `compiled.as_text()` of a program for so many devices.

    Reads synchronous and -start/-done forms, tuples, and operations inside the computations that
    async-start and fusions call; a TPU's all-reduce-scatter fusion counts as a reduce-scatter.
    """
    return list(_read(text.splitlines(), devices, repeats(text)))


def _read(lines: Iterable[str], devices: int, times: Mapping[str, int]) -> Iterator[Collective]:
    computation = ""
    for line in lines:
        begun = _COMPUTATION.match(line)
        if begun:
            computation = begun["name"]
        found = _OPERATION.match(line)
        if found is None:
            continue
        kind, members = found["kind"], _members(line, devices)
        size = _bytes_of_start(kind, found["type"]) if found["start"] else _bytes(found["type"])
        if kind == "reduce-scatter" and not found["start"]:
            size *= len(members)
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        if len(members) > 1:
            yield Collective(kind, members, size, times.get(computation, 1))


def _bytes(types: str) -> int:
    """Bytes of all arrays in a type such as `(bf16[8,16]{1,0}, s32[])`, without padding."""
    total = 0
    for array in _ARRAY.finditer(types):
        sizes = [int(size.lstrip("<=")) for size in array["sizes"].split(",") if size]
        total += math.prod(sizes) * _bits(array["type"]) // 8
    return total


def _bits(name: str) -> int:
    return BITS.get(name) or int((re.findall(r"\d+", name) or ["8"])[0])


def _bytes_of_start(kind: str, types: str) -> int:
    """Bytes of the buffer where the type also holds the operands: (operands, results, ...)."""
    if kind == "all-reduce":
        return _bytes(types)
    parts = [_bytes(part) for part in _elements(types)]
    return parts[0] if kind == "collective-permute" else max(parts)


def _elements(types: str) -> list[str]:
    """The elements of a tuple type, outermost commas only."""
    depth, elements, begun = 0, [], 0
    inside = types.strip().removeprefix("(").removesuffix(")")
    for at, letter in enumerate(inside):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            elements.append(inside[begun:at])
            begun = at + 1
    return [*elements, inside[begun:]]


def _members(line: str, devices: int) -> tuple[int, ...]:
    """The first group of devices in any of XLA's ways to write groups."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", line)
    if listed:
        return tuple(int(number) for number in listed[1].split(","))
    iota = re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if iota:
        return tuple(_numbered(iota[2]).reshape(_integers(iota[1]))[0].tolist())
    axes = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", line)
    if axes is None:
        return tuple(range(devices))
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
    numbers = _numbered(axes[2]) if axes[2] else np.arange(devices)
    used = set(re.findall(r"'(\w+)'", axes[3]))
    first = tuple(slice(None) if name in used else 0 for name in sizes)
    return tuple(numbers.reshape(tuple(sizes.values()))[first].reshape(-1).tolist())


def _numbered(text: str) -> np.ndarray:
    """Device numbers in the order of `[8,8,8]T(1,0,2)`: counted up, then transposed."""
    shape, _, order = text.partition("T")
    numbers = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return (numbers.transpose(_integers(order)) if order else numbers).reshape(-1)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def sent(found: Iterable[Collective]) -> float:
    """Bytes that one device sends in all these operations."""
    return sum(one.sent for one in found)


def least_bytes(experts_NK: np.ndarray, experts: int, devices: int, row: int) -> np.ndarray:
    """The least that each device must send for one forward pass of a sharded MoE layer, float [P].

    Each of the `devices` holds E / P experts and the tokens of its part of `experts_NK` (-1 = no
    expert). A token's row of `row` bytes goes once to every other device with one of its experts,
    however many, and one row, the sum of what those experts give, comes back. Less is impossible
    as long as tokens and experts stay where they are and rows are not compressed. The derivative
    needs the same again.
    """
    place_NK = np.where(experts_NK < 0, -1, experts_NK // (experts // devices))
    there_PP = np.zeros((devices, devices))
    for home, part_NK in enumerate(np.split(place_NK, devices)):
        for away in range(devices):
            there_PP[home, away] = np.sum(np.any(part_NK == away, axis=1)) * (home != away)
    return row * (there_PP.sum(axis=1) + there_PP.sum(axis=0))


def even_least_bytes(n: int, k: int, experts: int, devices: int, row: int) -> float:
    """`least_bytes` of one device with n tokens, on average over all equally likely choices."""
    return 2.0 * row * n * (devices - 1) * share_of_tokens(k, experts, devices)


def repeats(text: str) -> dict[str, int]:
    """How often each computation of `compiled.as_text()` runs in one run of the program.

    A loop whose number of rounds is not in the text (it depends on data) counts as one round. Of
    the branches of a condition the one that sends least is taken: others are for rare loads.
    """
    computations = _computations(text)

    def least(names: list[str]) -> str:
        return min(names, key=lambda name: _sent_in(name, computations))

    entry = next((name for name, own in computations.items() if own.entry), None)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for called, rounds in computations[name].calls(computations, least):
            if called in computations:
                visit(called, count * rounds)

    if entry is not None:
        visit(entry, 1)
    return dict(times)


class _Computation:
    """The lines of one computation."""

    def __init__(self, entry: bool):
        self.entry = entry
        self.lines: list[str] = []

    def calls(
        self, computations: dict[str, _Computation], choose: Callable[[list[str]], str]
    ) -> Iterable[tuple[str, int]]:
        """The computations it calls, each with how often; `choose` one of several branches."""
        for line in self.lines:
            branches = _branches(line)
            if branches:
                chosen = choose([name for name in branches if name in computations])
                yield from ((name, int(name == chosen)) for name in branches)
                continue
            loop = _WHILE.search(line)
            if loop:
                rounds = _rounds(line, computations.get(loop["condition"]))
                yield loop["body"], rounds
                yield loop["condition"], rounds + 1
            for called in _CALLED.findall(line):
                for name in re.findall(r"[\w.-]+", called):
                    yield name, 1


def _branches(line: str) -> list[str]:
    """The computations between which a conditional chooses."""
    if " conditional(" not in line:
        return []
    listed = re.search(r"branch_computations=\{([^}]*)\}", line)
    if listed:
        return re.findall(r"[\w.-]+", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)


def _sent_in(name: str, computations: dict[str, _Computation]) -> float:
    """Bytes of the collectives in a computation and all that it calls, loops once."""
    own = computations[name]
    total = sum(_bytes(found["type"]) for found in map(_OPERATION.match, own.lines) if found)
    called = {one for one, _ in own.calls(computations, lambda names: names[0])}
    return total + sum(_sent_in(one, computations) for one in called if one in computations)


def _computations(text: str) -> dict[str, _Computation]:
    computations: dict[str, _Computation] = {}
    current = None
    for line in text.splitlines():
        begun = _COMPUTATION.match(line)
        if begun:
            current = computations[begun["name"]] = _Computation(bool(begun["entry"]))
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.lines.append(line)
    return computations


def _rounds(line: str, condition: _Computation | None) -> int:
    """The compiler's note, or the constant that JAX's counter, beginning at 0, stays below."""
    known = _KNOWN.search(line)
    if known:
        return int(known[1])
    own = condition.lines if condition else []
    constants = {c["name"]: int(c["value"]) for c in map(_CONSTANT.search, own) if c}
    for less in filter(None, map(_LESS.search, own)):
        named = re.findall(r"[\w.-]+", less["operands"])
        limits = [value for name, value in constants.items() if name in named]
        if len(limits) == 1:
            return limits[0]
    return 1
