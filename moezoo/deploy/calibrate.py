"""One pass over calibration data: what each expert of each MoE layer does for one task."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo import schema_check as check
from moezoo.deploy.path import PathWeights, TaskPath
from moezoo.deploy.specialise import copy_of, layers_of
from moezoo.deploy.usage import Usage, add, observe
from moezoo.errors import UserError
from moezoo.nn import surgery
from moezoo.nn.context import Context
from moezoo.nn.moe import MoE, MoEOutput
from moezoo.ops.expert import weighted_sum
from moezoo.ops.routing import Routing
from moezoo.train.files import failure, write_atomically
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
    images: how many there were.   chosen: K of every layer.
    """

    task: str
    layers: dict[str, Usage]
    chosen: dict[str, int]
    images: int
    fingerprint: str

    def save(self, file: Path) -> None:
        """Write an npz file without pickles."""
        arrays = {
            # A colon: the paths of layers have slashes.
            f"{name}:{field}": value
            for name, usage in self.layers.items()
            for field, value in usage._asdict().items()
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
            layers = {name: _usage(archive, name) for name in about["chosen"]}
            return Calibration(layers=layers, **about)
        except OSError as error:
            raise failure("read", file, error) from error
        except (UserError, check.FormatFault, KeyError) as error:
            raise UserError(f"{file} is no readable calibration ({error}).") from error


def _usage(archive: files.Npz, layer: str) -> Usage:
    """The sums of a layer; their names end in the letters of their axes."""
    usage = Usage(*(archive.array(f"{layer}:{field}") for field in Usage._fields))
    sizes = {"E": np.size(usage.count_E), "D": np.shape(usage.output_ED)[-1:]}
    for name, array in usage._asdict().items():
        axes = name.rpartition("_")[2] if "_" in name else ""
        wanted = tuple(int(np.prod(sizes[axis])) for axis in axes)
        if array.shape != wanted or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise check.FormatFault(f"{layer}:{name} is {array.dtype} of {array.shape}")
    return usage


class Observed(NamedTuple):
    """A record that also has what each chosen expert gave, before the weight."""

    routing: Routing
    outputs_NKD: Array


def observing(layer: MoE, x: Array, routing: Routing, context: Context) -> MoEOutput:
    """A layer's `mixing` that has an `Observed` for a record."""
    outputs_NKD = layer.outputs(x, routing)
    # Of the outputs at hand: the layer's own way would run its experts again.
    y_ND = weighted_sum(outputs_NKD, routing)
    return MoEOutput(y_ND, Observed(routing, outputs_NKD))  # type: ignore[arg-type]


def observed(layer: MoE) -> MoE:
    """The same layer, of any kind, whose record shows the outputs of its experts."""
    made = copy_of(layer)
    made.mixing = observing
    return made


def make_observe(path: TaskPath) -> Callable[[PathWeights, Array, Array], dict[str, Usage]]:
    """A jitted (weights, given, valid_B) -> sums of every MoE layer over the valid rows."""

    def sums(weights: PathWeights, given: Array, valid_B: Array) -> dict[str, Usage]:
        model = path.module(weights)
        for name, layer in layers_of(model).items():
            surgery.replace(model, name, observed(layer))
        records = model(given, tasks=(path.task,)).records
        return {name: _over_valid_rows(records[name], valid_B) for name in path.layers}

    return jax.jit(sums)


def _over_valid_rows(record: Observed, valid_B: Array) -> Usage:
    tokens = record.routing.mask_N.shape[0] // valid_B.shape[0]
    # Rows that fill up the last batch repeat an example, which counts once.
    mask_N = record.routing.mask_N & jnp.repeat(valid_B, tokens)
    return observe(record.routing._replace(mask_N=mask_N), record.outputs_NKD)


def calibrate(
    path: TaskPath,
    batches: Iterable[Mapping[str, Any]],
    fingerprint: str,
    progress: Callable[[int], None] = lambda rows: None,
) -> Calibration:
    """Statistics of a whole path over batches with the path's input and `valid`.

    Raises UserError for a model without MoE layers and for a path that was pruned already.
    """
    if not path.layers:
        raise UserError(f"The {path.task} path has no MoE layer: there is nothing to prune.")
    # A pruned path's stand-ins would be observed in the place of experts.
    if not path.exact:
        raise UserError("Calibrate the whole path of the task, not a pruned one.")
    sums, totals, images = make_observe(path), dict[str, Usage](), 0
    for batch in batches:
        found = sums(path.weights, batch[path.input.name], batch["valid"])
        totals = {name: add(totals.get(name), usage) for name, usage in found.items()}
        images += int(np.sum(batch["valid"]))
        progress(int(np.sum(batch["valid"])))
    chosen = {name: layer.chosen for name, layer in path.layers.items()}
    return Calibration(path.task, totals, chosen, images, fingerprint)
