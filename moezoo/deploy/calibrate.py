"""One pass over calibration data: what each expert of each MoE layer does for one task."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moezoo import schema_check as check
from moezoo.deploy.novices import Observations
from moezoo.deploy.path import PathWeights, TaskPath
from moezoo.deploy.pruned import KeptOnly, divide, kept_of
from moezoo.deploy.specialise import copy_of, layers_of
from moezoo.deploy.usage import Moments, Usage, add, add_moments, observe, observe_inputs
from moezoo.errors import UserError
from moezoo.files import failure, write_atomically
from moezoo.nn import surgery
from moezoo.nn.context import Context
from moezoo.nn.moe import MoE, MoEOutput
from moezoo.ops.expert import weighted_sum
from moezoo.ops.routing import Routing
from moezoo.weights import files

ABOUT = check.table(
    {
        "task": check.text(),
        "chosen": check.map_of(check.whole(1, 2**20)),
        "images": check.whole(),
        "fingerprint": check.text(),
    },
    required=("task", "chosen", "images", "fingerprint"),
    others=check.refused,
)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of every MoE layer for one task.

    fingerprint: of the data they were measured on (`splits.Part.fingerprint`).
    images: how many there were.   chosen: K of every layer.   moments: those of every layer, or {}
    where no novice needs them.
    """

    task: str
    layers: dict[str, Usage]
    chosen: dict[str, int]
    images: int
    fingerprint: str
    moments: dict[str, Moments] = field(default_factory=dict)

    def of(self, layer: str) -> Observations:
        """What is known of a layer, as novices are made of it."""
        return Observations(self.layers[layer], self.moments.get(layer))

    def merged(self, other: Calibration) -> Calibration:
        """The statistics of the examples of both, which must be different ones of the same data.

        Raises UserError where they are of other tasks or layers, or one has moments only.
        """
        mine = self.task, self.chosen, self.fingerprint, sorted(self.moments)
        if mine != (other.task, other.chosen, other.fingerprint, sorted(other.moments)):
            raise UserError(
                f"Two calibrations of the tasks {self.task} and {other.task} do not go together: "
                "they are of other layers, data or kinds of sums."
            )
        layers = {name: add(usage, other.layers[name]) for name, usage in self.layers.items()}
        moments = {n: add_moments(m, other.moments[n]) for n, m in self.moments.items()}
        return replace(self, layers=layers, moments=moments, images=self.images + other.images)

    def save(self, file: Path) -> None:
        """Write an npz file without pickles."""
        arrays = {
            # A colon: the paths of layers have slashes.
            f"{name}:{field}": value
            for table in (self.layers, self.moments)
            for name, sums in table.items()
            for field, value in sums._asdict().items()
        }
        about = {k: getattr(self, k) for k in ("task", "chosen", "images", "fingerprint")}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, about=np.array(json.dumps(about)), **arrays)
        write_atomically(file, buffer.getvalue())

    @staticmethod
    def load(file: Path) -> Calibration:
        """Inverse of `save`; raises UserError when the file is none or damaged."""
        try:
            file.stat()
            archive = files.open_npz(file)
            about = check.parse(str(archive.array("about")))
            ABOUT(about, "")
            layers = {name: _read(archive, name, Usage) for name in about["chosen"]}
            with_moments = [n for n in about["chosen"] if f"{n}:inputs_EDD" in archive.stored]
            moments = {name: _read(archive, name, Moments) for name in with_moments}
            return Calibration(layers=layers, moments=moments, **about)
        except OSError as error:
            raise failure("read", file, error) from error
        except (UserError, check.FormatFault, KeyError) as error:
            raise UserError(f"{file} is no readable calibration ({error}).") from error


S = TypeVar("S", Usage, Moments)


def _read(archive: files.Npz, layer: str, kind: type[S]) -> S:
    """The sums of a layer; their names end in the letters of their axes."""
    sums = kind(*(archive.array(f"{layer}:{field}") for field in kind._fields))
    outputs = archive.array(f"{layer}:output_ED")
    sizes = {"E": outputs.shape[0], "D": outputs.shape[-1]}
    for name, array in sums._asdict().items():
        axes = name.rpartition("_")[2] if "_" in name else ""
        wanted = tuple(sizes[axis] for axis in axes)
        if array.shape != wanted or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise check.FormatFault(f"{layer}:{name} is {array.dtype} of {array.shape}")
    return sums


class Observed(NamedTuple):
    """A record that also has what each chosen expert gave, before the weight, and what it read.

    inputs_ND: the tokens that the layer's experts see.
    """

    routing: Routing
    outputs_NKD: Array
    inputs_ND: Array


@dataclass(frozen=True)
class Observing:
    """A layer's `mixing` that has an `Observed` for a record; `had` is the one that it replaces."""

    had: KeptOnly

    def __call__(self, layer: MoE, x: Array, routing: Routing, context: Context) -> MoEOutput:
        """As `had`, of a path that removed nothing that a token can ask for."""
        there = divide(routing, self.had.kept, self.had.removed).kept
        outputs_NKD = layer.outputs(x, there)
        # Of the outputs at hand: the layer's own way would run its experts again.
        y_ND = weighted_sum(outputs_NKD, there)
        inputs_ND = x.reshape(-1, x.shape[-1])
        return MoEOutput(y_ND, Observed(routing, outputs_NKD, inputs_ND))  # type: ignore[arg-type]


def observed(layer: MoE) -> MoE:
    """The same layer of a path, of any kind, whose record shows the outputs of its experts."""
    made = copy_of(layer)
    made.mixing = Observing(kept_of(layer))
    return made


LayerSums = dict[str, tuple[Usage, Moments | None]]


def make_observe(
    path: TaskPath, *, moments: bool = False
) -> Callable[[PathWeights, Array, Array], LayerSums]:
    """A jitted (weights, given, valid_B) -> sums of every MoE layer over the valid rows.

    Of those that have all experts that a token can ask for.
    """
    watched = [name for name, layer in path.layers.items() if not layer.missing]

    def sums(weights: PathWeights, given: Array, valid_B: Array) -> LayerSums:
        model = path.module(weights)
        for name, layer in layers_of(model).items():
            if name in watched:
                surgery.replace(model, name, observed(layer))
        records = model(given, tasks=(path.task,)).records
        return {name: _over_valid_rows(records[name], valid_B, moments) for name in watched}

    return jax.jit(sums)


def _over_valid_rows(
    record: Observed, valid_B: Array, moments: bool
) -> tuple[Usage, Moments | None]:
    tokens = record.routing.mask_N.shape[0] // valid_B.shape[0]
    # Rows that fill up the last batch repeat an example, which counts once.
    mask_N = record.routing.mask_N & jnp.repeat(valid_B, tokens)
    routing = record.routing._replace(mask_N=mask_N)
    usage = observe(routing, record.outputs_NKD)
    if not moments:
        return usage, None
    return usage, observe_inputs(routing, record.inputs_ND, record.outputs_NKD)


def calibrate(
    path: TaskPath,
    batches: Iterable[Mapping[str, Any]],
    fingerprint: str,
    progress: Callable[[int], None] = lambda rows: None,
    *,
    moments: bool = False,
    begun: Calibration | None = None,
) -> Calibration:
    """Statistics of a whole path over batches with the path's input and `valid`.

    moments: whether novices will need them; their sums take E D^2 numbers per layer, twice.
    begun: what an interrupted pass over the same batches had seen, where this one goes on. On
    several devices each takes its rows of a batch. Of a path that lost experts in some layers it
    measures the others. Raises UserError for a model without MoE layers and for a path that lost
    experts in all of them.
    """
    if not path.layers:
        raise UserError(f"The {path.task} path has no MoE layer: there is nothing to prune.")
    # A pruned path's stand-ins would be observed in the place of experts.
    if all(layer.missing for layer in path.layers.values()):
        raise UserError("Calibrate the whole path of the task, not a pruned one.")
    sums, images, rows = make_observe(path, moments=moments), 0, _Rows(path.weights)
    usages, seen = dict[str, Usage](), dict[str, Moments]()
    if begun is not None:
        usages, seen = dict(begun.layers), dict(begun.moments)
    for batch in batches:
        if begun is not None and images < begun.images:
            images += int(np.sum(batch["valid"]))
            continue
        found = sums(rows.weights, *rows(batch[path.input.name], batch["valid"]))
        for name, (usage, more) in found.items():
            usages[name] = add(usages.get(name), usage)
            if more is not None:
                seen[name] = add_moments(seen.get(name), more)
        images += int(np.sum(batch["valid"]))
        progress(int(np.sum(batch["valid"])))
    chosen = {name: layer.chosen for name, layer in path.layers.items()}
    ordered = {name: usages[name] for name in path.layers if name in usages}
    return Calibration(path.task, ordered, chosen, images, fingerprint, seen)


class _Rows:
    """Places a path's weights on all of this process's devices, and divides rows among them."""

    def __init__(self, weights: PathWeights):
        devices = jax.local_devices()
        self.mesh = jax.make_mesh((len(devices),), ("rows",), (AxisType.Auto,), devices=devices)
        self.weights = jax.device_put(weights, NamedSharding(self.mesh, PartitionSpec()))

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        """The arrays, divided where that goes evenly, else all of them everywhere."""
        even = len(arrays[0]) % self.mesh.size == 0
        spec = PartitionSpec("rows") if even else PartitionSpec()
        return tuple(jax.device_put(array, NamedSharding(self.mesh, spec)) for array in arrays)
