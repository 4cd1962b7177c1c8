"""A library of adapters in a folder: LoRAs of one base, what is known of each, one manifest.

    library.json              base, layers with sizes, ranks and scales, members with their tasks
    members/NAME.safetensors  of each layer down [D, r], up [r, O], prototype [D] and perhaps a gate
                              [D]; an embedding [M] where there were examples, and perhaps a
                              gradient [M]

All members have one base, the same layers, and in each of them the same rank and scale, so that any
of them can be stacked, averaged or exchanged. A prototype is Arrow's (`ops.prototypes`), the
embedding a mean over a member's own examples, as is the gradient (`domains/text/gradients`), a gate
was trained behind it (`models/phatgoose`), and groups of alike members are found from their
parameters (`ops.adapter_clusters`). Only the manifest is read when a library is opened: a member's
arrays are read when they are asked for, so that ten thousand of them cost a line each.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moezoo.errors import UserError, unknown
from moezoo.json_text import json_text, plain
from moezoo.ops.adapter_clusters import alike
from moezoo.ops.prototypes import svd_prototype
from moezoo.schema_check import (
    FormatFault,
    flag,
    line,
    list_of,
    map_of,
    maybe,
    number,
    table,
    text,
    whole,
)
from moezoo.structured import read_object
from moezoo.weights.files import written_whole
from moezoo.weights.peft import Factors
from moezoo.weights.tensor_file import Planned, TensorFile, write

MANIFEST, MEMBERS = "library.json", "members"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
AGAIN = "build the library again"
DROPPED, PARTS = 0.8, 64  # of model-based clustering, as published
_NAMED = text(100, NAME.pattern)
_LAYER = {"inputs": whole(1, 2**24), "outputs": whole(1, 2**24), "rank": whole(1, 2**16)}
_LAYER |= {"scale": number(-1e6, 1e6)}
_MEMBER = {
    "name": _NAMED,
    "tasks": list_of(line(200), 0, 10_000),
    "source": line(),
    "cluster": maybe(whole(0, 100_000)),
    "embedding": whole(0, 2**24),
    "gated": flag,
    "gradient": whole(0, 2**24),
}
_NEEDED = tuple(name for name in _MEMBER if name != "gradient")  # later than format 1
FORM = table(
    {
        "format": whole(1, 1),
        "base": table({"name": line(), "sha256": line(64)}, required=("name", "sha256")),
        "layers": map_of(table(_LAYER, required=tuple(_LAYER)), 1, 100_000),
        "members": list_of(table(_MEMBER, required=_NEEDED), 0, 1_000_000),
    },
    required=("format", "base", "layers", "members"),
)


class LayerForm(NamedTuple):
    """What every member's update of a layer has: W [inputs, outputs] gets scale * down up."""

    inputs: int
    outputs: int
    rank: int
    scale: float


class BaseModel(NamedTuple):
    """The decoder that members belong to: how it is called, and the hash of its arrays."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Member:
    """An adapter of a library.

    tasks: what it was trained on.   source: where it came from.   cluster: its group of alike
    members, None where there are no groups.   embedding: width of its mean embedding, 0 = none.
    gated: whether it has a trained gate.   gradient: width of its mean gradient, 0 = none.
    """

    name: str
    tasks: tuple[str, ...] = ()
    source: str = ""
    cluster: int | None = None
    embedding: int = 0
    gated: bool = False
    gradient: int = 0


class NewMember(NamedTuple):
    """An adapter to put into a library: its factors by layer; its mean embedding [M], the gate [D]
    of each layer, and the mean of its prompts' gradients [M], if any."""

    member: Member
    layers: Mapping[str, Factors]
    embedding_M: np.ndarray | None = None
    gates: Mapping[str, np.ndarray] | None = None
    gradient_M: np.ndarray | None = None


class Library:
    """The library in a folder.

    Raises UserError where there is none, or its manifest is damaged.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        found = read_object(path, FORM, absent="name a library's folder", again=AGAIN)
        self.base = BaseModel(**found["base"])
        self.layers = {name: LayerForm(**form) for name, form in found["layers"].items()}
        told = (m | {"tasks": tuple(m["tasks"])} for m in found["members"])
        self.members = {m["name"]: Member(**m) for m in told}
        if len(self.members) < len(found["members"]):
            raise UserError(f"{path} names a member twice; {AGAIN}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, in the order in which they came."""
        return tuple(self.members)

    @property
    def clusters(self) -> dict[int, tuple[str, ...]]:
        """The members of each group of alike ones; empty where groups were not asked for."""
        found: dict[int, tuple[str, ...]] = {}
        for member in self.members.values():
            if member.cluster is not None:
                found[member.cluster] = (*found.get(member.cluster, ()), member.name)
        return dict(sorted(found.items()))

    def of_task(self, task: str) -> tuple[str, ...]:
        """The members that were trained on a task; one of that name where none was.

        Raises UserError with the nearest names where there is neither.
        """
        found = tuple(name for name, m in self.members.items() if task in m.tasks)
        if found or task in self.members:
            return found or (task,)
        known = {task for m in self.members.values() for task in m.tasks} | set(self.members)
        raise unknown(f"task of the library {self.folder}", task, sorted(known))

    def factors(self, name: str) -> dict[str, Factors]:
        """A member's update of every layer, float32; UserError where its file is damaged."""
        file = self._file(name)
        found = {}
        for path, form in self.layers.items():
            down = self._read(file, f"{path}.down", (form.inputs, form.rank))
            up = self._read(file, f"{path}.up", (form.rank, form.outputs))
            found[path] = Factors(down, up, form.scale, {})
        return found

    def prototypes(self, name: str) -> dict[str, np.ndarray]:
        """A member's prototype [D] of every layer."""
        return self._vectors(name, "prototype")

    def gates(self, name: str) -> dict[str, np.ndarray]:
        """A member's trained gate [D] of every layer; UserError where it has none."""
        if name in self.members and not self.members[name].gated:
            raise UserError(
                f"Member {name} of {self.folder} has no gate: train one behind it (configuration "
                "text/phatgoose_tiny) and add that run, or take another route."
            )
        return self._vectors(name, "gate")

    def _vectors(self, name: str, kind: str) -> dict[str, np.ndarray]:
        file = self._file(name)
        return {
            path: self._read(file, f"{path}.{kind}", (form.inputs,))
            for path, form in self.layers.items()
        }

    def embedding(self, name: str) -> np.ndarray:
        """A member's mean embedding [M]; UserError where it has none."""
        width = self.members[name].embedding
        if not width:
            raise UserError(
                f"Member {name} of {self.folder} has no mean embedding, because it came without "
                "examples: add it again with --examples FILE, or take another route."
            )
        return self._read(self._file(name), "embedding", (width,))

    def gradient(self, name: str) -> np.ndarray:
        """The mean of a member's projected gradients [M]; UserError where it has none."""
        width = self.members[name].gradient
        if not width:
            raise UserError(
                f"Member {name} of {self.folder} has no gradient: build the library of adapters "
                "with examples and --gradients, or take another route."
            )
        return self._read(self._file(name), "gradient", (width,))

    def bytes_of_member(self) -> int:
        """The size of one member's factors in memory, float32."""
        sizes = ((f.inputs + f.outputs) * f.rank for f in self.layers.values())
        return 4 * sum(sizes)

    def _file(self, name: str) -> TensorFile:
        if name not in self.members:
            raise unknown(f"member of the library {self.folder}", name, list(self.members))
        return TensorFile(_place(self.folder, name))

    def _read(self, file: TensorFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
        held = file.entries.get(name)
        if held is None or tuple(held.shape) != shape:
            has = "lacks" if held is None else f"has in shape {list(held.shape)}"
            raise UserError(
                f"{file.path} {has} {name}, which the library's manifest has as {list(shape)}; "
                f"{AGAIN}."
            )
        array = file.read(name, lambda view: view.astype(np.float32))
        if not np.isfinite(array).all():
            raise UserError(f"{file.path} has numbers in {name} that are not finite; {AGAIN}.")
        return array


def fingerprint(arrays: Mapping[str, Any]) -> str:
    """A hash of a decoder's arrays by path, whatever else stands in its file: sha256, hex."""
    made = hashlib.sha256()
    for path, array in sorted(arrays.items()):
        held = np.ascontiguousarray(array)
        made.update(f"{path} {held.shape} {held.dtype.name}\n".encode())
        made.update(held.reshape(-1).view(np.uint8).data)
    return made.hexdigest()


def create(
    folder: Path, base: BaseModel, members: Sequence[NewMember], clusters: int = 0
) -> Library:
    """Write a new library; the folder appears whole or not at all.

    clusters: groups of alike members to tell apart, 0 for none. Raises UserError where members do
    not fit each other, two have one name, the folder exists, or there are fewer different members
    than groups.
    """
    if not members:
        raise UserError("A library needs at least one adapter: name runs or PEFT folders.")
    layers = forms(members[0])
    told = tuple(_checked(members, layers, base.name, taken=()))
    if clusters:
        told = _grouped(told, [one.layers for one in members], clusters)
    with written_whole(folder) as temporary:
        (temporary / MEMBERS).mkdir()
        for one in members:
            _write_member(temporary, one)
        text = _manifest(base, layers, told)
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
    return Library(folder)


def add(library: Library, members: Sequence[NewMember]) -> Library:
    """The library with further members; where it has groups of alike ones, they are found anew.

    Raises UserError, and changes nothing, where one does not fit the others or its name is taken.
    """
    new = _checked(members, library.layers, library.base.name, taken=library.names)
    for one in members:
        _write_member(library.folder, one)
    return _changed(library, (*library.members.values(), *new))


def remove(library: Library, names: Iterable[str]) -> Library:
    """The library without some members; UserError for one that it has not, and where none is left.

    Where it has groups of alike members, they are found anew.
    """
    names = tuple(dict.fromkeys(names))
    for name in names:
        if name not in library.members:
            raise unknown(f"member of the library {library.folder}", name, list(library.members))
    kept = tuple(m for m in library.members.values() if m.name not in names)
    if not kept:
        raise UserError(
            f"Without {', '.join(names)} the library {library.folder} would be empty: delete its "
            "folder instead."
        )
    changed = _changed(library, kept)
    # Behind the manifest: whoever reads it meanwhile finds every file that it names.
    for name in names:
        _place(library.folder, name).unlink(missing_ok=True)
    return changed


def forms(new: NewMember) -> dict[str, LayerForm]:
    """The sizes, rank and scale of an adapter's layers."""
    return {
        path: LayerForm(f.down.shape[0], f.up.shape[1], f.down.shape[1], float(f.scale))
        for path, f in new.layers.items()
    }


def _changed(library: Library, members: tuple[Member, ...]) -> Library:
    if count := len(library.clusters):
        held = copy(library)  # the manifest does not name new ones yet
        held.members = {m.name: m for m in members}
        count = min(count, len(members))
        members = _grouped(members, [held.factors(m.name) for m in members], count)
    content = _manifest(library.base, library.layers, members)
    _replace(library.folder / MANIFEST, content.encode())
    return Library(library.folder)


def _checked(
    members: Sequence[NewMember], layers: Mapping[str, LayerForm], base: str, taken: Sequence[str]
) -> tuple[Member, ...]:
    """What the manifest says of new members; UserError for one that does not fit the layers."""
    seen, told = set(taken), []
    for one in members:
        name = one.member.name
        if not NAME.fullmatch(name):
            raise UserError(
                f"'{name[:100]}' cannot name a member: take letters, digits, '_', '-' and '.'."
            )
        if name in seen:
            raise UserError(f"The library has two members called {name}: rename one's folder.")
        seen.add(name)
        _check_form(name, forms(one), layers, base)
        width = 0 if one.embedding_M is None else len(one.embedding_M)
        gated = one.gates is not None
        own = {"embedding": width, "gated": gated}
        own["gradient"] = 0 if one.gradient_M is None else len(one.gradient_M)
        told.append(replace(one.member, cluster=None, **own))
    return tuple(told)


def _check_form(
    name: str, own: Mapping[str, LayerForm], wanted: Mapping[str, LayerForm], base: str
) -> None:
    extra, missing = sorted(own.keys() - wanted), sorted(wanted.keys() - own)
    if extra or missing:
        what = f"adapts {extra[0]}" if extra else f"does not adapt {missing[0]}"
        raise UserError(
            f"{name} {what}, unlike the library's other members: all must have the same targets."
        )
    for path, form in wanted.items():
        if own[path][:2] != form[:2]:
            raise UserError(
                f"{name} has an update {own[path].inputs} x {own[path].outputs} for {path}, which "
                f"is {form.inputs} x {form.outputs} in {base}: it was made for another base."
            )
        for part in ("rank", "scale"):
            ours, theirs = getattr(own[path], part), getattr(form, part)
            if abs(ours - theirs) > 1e-6 * abs(theirs):
                raise UserError(
                    f"{name} has {part} {ours:g} in {path}, the library's members have "
                    f"{theirs:g}: all must have the same."
                )


def _grouped(
    members: Sequence[Member], layers: Sequence[Mapping[str, Factors]], clusters: int
) -> tuple[Member, ...]:
    rows_NP = np.stack([parameters(one) for one in layers])
    rng = np.random.default_rng(42)
    found = alike(rows_NP, clusters, rng, dropped=DROPPED, parts=PARTS)
    pairs = zip(members, found.cluster_N, strict=True)
    return tuple(replace(member, cluster=int(group)) for member, group in pairs)


def parameters(layers: Mapping[str, Factors]) -> np.ndarray:
    """All factors of an adapter in one row, layers by name, down before up."""
    ordered = (layers[path] for path in sorted(layers))
    return np.concatenate([np.ravel(a) for one in ordered for a in (one.down, one.up)])


def _place(folder: Path, name: str) -> Path:
    return folder / MEMBERS / f"{name}.safetensors"


def _write_member(folder: Path, new: NewMember) -> None:
    arrays: dict[str, np.ndarray] = {}
    for path, one in new.layers.items():
        down, up = (np.asarray(a, np.float32) for a in (one.down, one.up))
        prototype, _ = svd_prototype(jnp.asarray(down), jnp.asarray(up))
        arrays |= {f"{path}.down": down, f"{path}.up": up}
        arrays[f"{path}.prototype"] = np.asarray(prototype)
    arrays |= {f"{path}.gate": np.asarray(g, np.float32) for path, g in (new.gates or {}).items()}
    if new.embedding_M is not None:
        arrays["embedding"] = np.asarray(new.embedding_M, np.float32)
    if new.gradient_M is not None:
        arrays["gradient"] = np.asarray(new.gradient_M, np.float32)
    place = _place(folder, new.member.name)
    temporary = place.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        planned = {n: Planned(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()}
        write(temporary, planned)
        os.replace(temporary, place)
    except OSError as error:
        raise UserError(f"Could not write {place}: {error.strerror}; make room.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Could not write {path}: {error.strerror}; make room.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _manifest(base: BaseModel, layers: Mapping[str, LayerForm], members: Sequence[Member]) -> str:
    found = {
        "format": 1,
        "base": base._asdict(),
        "layers": {path: form._asdict() for path, form in layers.items()},
        "members": [vars(member) for member in members],
    }
    try:  # what could not be read again is not written
        FORM(plain(found), "")
    except FormatFault as error:
        raise UserError(f"The library cannot be described: {error}.") from error
    return json_text(found, 1)
