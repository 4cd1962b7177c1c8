"""A library of adapters in a folder: LoRAs of one base, what is known of each, one manifest.

    library.json              base, layers with sizes, ranks and scales, members with their tasks
    members/NAME.safetensors  of each layer down [D, r], up [r, O], prototype [D] and perhaps a gate
                              [D]; an embedding [M] where there were examples, and perhaps a
                              gradient [M]
    .lock                     who changes the library; others wait

All members have one base, the same layers, and in each of them the same rank and scale, so that any
of them can be stacked, averaged or exchanged. A prototype is Arrow's (`ops.prototypes`), the
embedding a mean over a member's own examples, as is the gradient (`domains/text/gradients`), a gate
was trained behind it (`models/phatgoose`), and groups of alike members are found from their
parameters (`ops.adapter_clusters`). Only the manifest is read when a library is opened: a member's
arrays are read when they are asked for, so that ten thousand of them cost a line each.

A change reads the manifest again when it is the only writer (`library_files`), so that what others
have changed since a library was opened stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moezoo.errors import UserError, unknown
from moezoo.files import write_atomically
from moezoo.ops.adapter_clusters import alike, distinct
from moezoo.ops.prototypes import svd_prototype
from moezoo.schema_check import shortened
from moezoo.weights.files import written_whole
from moezoo.weights.library_files import (
    MEMBERS,
    Arrays,
    delete_members,
    member_file,
    members_written,
    only_writer,
    write_arrays,
)
from moezoo.weights.library_manifest import (
    AGAIN,
    MANIFEST,
    NAME,
    WIDTHS,
    BaseModel,
    LayerForm,
    LibraryManifest,
    Member,
    manifest_text,
    read_manifest,
    unlike_width,
)
from moezoo.weights.peft import Factors
from moezoo.weights.tensor_file import TensorFile

DROPPED, PARTS = 0.8, 64  # of model-based clustering, as published
SHOWN = 20  # names in a sentence


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
        self.base, layers, members = read_manifest(self.folder / MANIFEST)
        self.layers = dict(layers)
        self.members = {member.name: member for member in members}

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
        tasks = sorted({task for m in self.members.values() for task in m.tasks})
        near = get_close_matches(task, [*tasks, *self.members], n=3)
        hint = f", perhaps {' or '.join(near)}" if near else ""
        raise UserError(
            f"Unknown task of the library '{self.folder}': '{task}' is no task and no "
            f"member{hint}; its tasks: {_few(tasks) or 'none'}; its members: {_few(self.names)}."
        )

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
        if not self._member(name).gated:
            again = self._again(name, "RUN")
            raise UserError(
                f"Member {name} of '{self.folder}' has no gate: train one behind it (configuration "
                f"text/phatgoose_tiny) and {again}, or take another route."
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
        width = self._member(name).embedding
        if not width:
            again = self._again(name, "FOLDER --examples FILE")
            raise UserError(
                f"Member {name} of '{self.folder}' has no mean embedding, because it came without "
                f"examples: {again}, or take another route."
            )
        return self._read(self._file(name), "embedding", (width,))

    def gradient(self, name: str) -> np.ndarray:
        """The mean of a member's projected gradients [M]; UserError where it has none."""
        width = self._member(name).gradient
        if not width:
            again = self._again(name, "FOLDER --gradients")
            raise UserError(
                f"Member {name} of '{self.folder}' has no gradient: {again}, or take another route."
            )
        return self._read(self._file(name), "gradient", (width,))

    def _again(self, name: str, words: str) -> str:
        return (
            f"take the member out and add it anew (moezoo library remove {self.folder} {name}, "
            f"moezoo library add {self.folder} {words})"
        )

    def bytes_of_member(self) -> int:
        """The size of one member's factors in memory, float32."""
        sizes = ((f.inputs + f.outputs) * f.rank for f in self.layers.values())
        return 4 * sum(sizes)

    def _member(self, name: str) -> Member:
        if name not in self.members:
            raise unknown(f"member of the library '{self.folder}'", name, list(self.members))
        return self.members[name]

    def _file(self, name: str) -> TensorFile:
        """A member's open file; UserError for arrays that the manifest does not tell of."""
        member, kinds = self._member(name), ("down", "up", "prototype")
        kinds += ("gate",) if member.gated else ()
        told = {f"{path}.{kind}" for path in self.layers for kind in kinds}
        told |= {kind for kind in WIDTHS if getattr(member, kind)}
        file = TensorFile(member_file(self.folder, name))
        if further := sorted(file.entries.keys() - told):
            raise UserError(
                f"{file.path} holds {shortened(further[0], 200)}, of which the library's manifest "
                f"says nothing; {AGAIN}."
            )
        return file

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


def _few(names: Sequence[str]) -> str:
    """Names for a sentence, the first of many."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def create(
    folder: Path, base: BaseModel, members: Sequence[NewMember], clusters: int = 0
) -> Library:
    """Write a new library; the folder appears whole or not at all.

    clusters: groups of alike members to tell apart, 0 for none. Raises UserError where members do
    not fit each other, two have one name, numbers are not finite, the folder exists, or there are
    fewer different members than groups.
    """
    if not members:
        raise UserError("A library needs at least one adapter: name runs or PEFT folders.")
    check_free([one.member.name for one in members])
    layers = forms(members[0])
    told = _checked(members, layers, base.name, ())
    arrays = {one.member.name: _arrays(one) for one in members}
    if clusters:
        told = _grouped(told, _rows([one.layers for one in members]), clusters)
    content = manifest_text(LibraryManifest(base, layers, told))
    with written_whole(folder) as temporary:
        (temporary / MEMBERS).mkdir()
        for name, own in arrays.items():
            write_arrays(member_file(temporary, name), own)
        write_atomically(temporary / MANIFEST, content)
    return Library(folder)


def add(library: Library, members: Sequence[NewMember]) -> Library:
    """The library with further members; where it has groups of alike ones, they are found anew.

    Raises UserError, and changes nothing, where one does not fit the others, its name is taken, or
    numbers are not finite.
    """
    with _changed(library) as now:
        taken = tuple(now.members.values())
        check_free([one.member.name for one in members], now)
        told = (*taken, *_checked(members, now.layers, now.base.name, taken))
        arrays = {one.member.name: _arrays(one) for one in members}
        if now.clusters:
            held = [now.factors(member.name) for member in taken]
            told = _grouped_again(now, told, [*held, *(one.layers for one in members)])
        content = manifest_text(LibraryManifest(now.base, now.layers, told))
        with members_written(now.folder, arrays):
            write_atomically(now.folder / MANIFEST, content)
    return Library(library.folder)


def remove(library: Library, names: Iterable[str]) -> Library:
    """The library without some members; UserError for one that it has not, and where none is left.

    Where it has groups of alike members, they are found anew.
    """
    names = tuple(dict.fromkeys(names))
    with _changed(library) as now:
        for name in names:
            if name not in now.members:
                raise unknown(f"member of the library '{now.folder}'", name, list(now.members))
        kept = tuple(m for m in now.members.values() if m.name not in names)
        if not kept:
            raise UserError(
                f"Without {', '.join(names)} the library '{now.folder}' would be empty: delete its "
                "folder instead."
            )
        if now.clusters:
            kept = _grouped_again(now, kept, [now.factors(member.name) for member in kept])
        content = manifest_text(LibraryManifest(now.base, now.layers, kept))
        write_atomically(now.folder / MANIFEST, content)
        # Behind the manifest: whoever reads it meanwhile finds every file that it names.
        delete_members(now.folder, names)
    return Library(library.folder)


@contextmanager
def _changed(library: Library) -> Iterator[Library]:
    """The library as it is now, which nobody else changes during the block."""
    Library(library.folder)  # a folder that is none gets no lock
    with only_writer(library.folder):
        now = Library(library.folder)
        if (now.base, now.layers) != (library.base, library.layers):
            raise UserError(f"'{library.folder}' has become another library meanwhile: look again.")
        yield now


def forms(new: NewMember) -> dict[str, LayerForm]:
    """The sizes, rank and scale of an adapter's layers."""
    return {
        path: LayerForm(f.down.shape[0], f.up.shape[1], f.down.shape[1], float(f.scale))
        for path, f in new.layers.items()
    }


def check_free(names: Sequence[str], library: Library | None = None) -> None:
    """UserError for names of new members of which two, or one and a library's, are the same.

    Disks that do not tell capitals apart would give both one file.
    """
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            raise UserError(
                f"Two of the adapters are called {name}, capitals apart: rename one's folder."
            )
        seen.add(name.lower())
        held = () if library is None else library.names
        same = next((held for held in held if held.lower() == name.lower()), None)
        if library is None or same is None:
            continue
        if same == name:
            raise UserError(
                f"The library '{library.folder}' has a member called {name} already: remove it "
                f"first (moezoo library remove {library.folder} {name}), or rename the new one's "
                "folder."
            )
        raise UserError(
            f"The library '{library.folder}' has a member called {same}, whose file would be that "
            f"of {name} on disks that do not tell capitals apart: rename the new one's folder."
        )


def _checked(
    members: Sequence[NewMember],
    layers: Mapping[str, LayerForm],
    base: str,
    others: tuple[Member, ...],
) -> tuple[Member, ...]:
    """What the manifest says of new members; UserError for one that does not fit the layers."""
    told: list[Member] = []
    for one in members:
        name = one.member.name
        if not NAME.fullmatch(name):
            raise UserError(
                f"'{name[:100]}' cannot name a member: take letters, digits, '_', '-' and '.'."
            )
        _check_form(name, forms(one), layers, base)
        _check_gates(one, layers)
        width = 0 if one.embedding_M is None else len(one.embedding_M)
        own = {"embedding": width, "gated": one.gates is not None}
        own["gradient"] = 0 if one.gradient_M is None else len(one.gradient_M)
        told.append(replace(one.member, cluster=None, **own))
    if fault := unlike_width((*others, *told)):
        raise UserError(f"{fault}: all must come from the same base.")
    return tuple(told)


def _check_gates(new: NewMember, layers: Mapping[str, LayerForm]) -> None:
    if new.gates is None:
        return
    wrong = {p for p in new.gates.keys() ^ layers.keys()} or {
        p for p, gate in new.gates.items() if np.shape(gate) != (layers[p].inputs,)
    }
    if wrong:
        raise UserError(
            f"{new.member.name} has no gate of {min(wrong)} that fits this layer's update: train "
            "its gates again."
        )


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


def _grouped(members: tuple[Member, ...], rows_NP: np.ndarray, clusters: int) -> tuple[Member, ...]:
    rng = np.random.default_rng(42)
    found = alike(rows_NP, clusters, rng, dropped=DROPPED, parts=PARTS)
    pairs = zip(members, found.cluster_N, strict=True)
    return tuple(replace(member, cluster=int(group)) for member, group in pairs)


def _grouped_again(
    library: Library, members: tuple[Member, ...], layers: Sequence[Mapping[str, Factors]]
) -> tuple[Member, ...]:
    """As many groups as the library has, fewer where there are fewer different members."""
    rows_NP = _rows(layers)
    most = distinct(rows_NP, dropped=DROPPED, parts=PARTS)
    return _grouped(members, rows_NP, min(len(library.clusters), most))


def _rows(layers: Sequence[Mapping[str, Factors]]) -> np.ndarray:
    """All factors of each adapter in one row, layers by name, down before up."""
    return np.stack(
        [
            np.concatenate([np.ravel(a) for path in sorted(one) for a in one[path][:2]])
            for one in layers
        ]
    )


def _arrays(new: NewMember) -> Arrays:
    """What a member's file holds, float32; UserError where a number is not finite."""
    arrays: Arrays = {}
    for path, one in new.layers.items():
        down, up = _finite(new, path, one.down), _finite(new, path, one.up)
        prototype, length = svd_prototype(jnp.asarray(down), jnp.asarray(up))
        if not np.isfinite(np.asarray(length)):
            raise UserError(
                f"{new.member.name} has factors in {path} whose product is not finite: train it "
                "again, with smaller steps."
            )
        arrays |= {f"{path}.down": down, f"{path}.up": up}
        arrays[f"{path}.prototype"] = _finite(new, path, prototype)
    for path, gate in (new.gates or {}).items():
        arrays[f"{path}.gate"] = _finite(new, f"the gate of {path}", gate)
    for kind, vector_M in (("embedding", new.embedding_M), ("gradient", new.gradient_M)):
        if vector_M is not None:
            arrays[kind] = _finite(new, f"its {WIDTHS[kind]}", vector_M)
    return arrays


def _finite(new: NewMember, place: str, array: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # of float64, which then is not finite
        found = np.asarray(array, np.float32)
    if not np.isfinite(found).all():
        raise UserError(
            f"{new.member.name} has numbers in {place} that are not finite: train it again."
        )
    return found
