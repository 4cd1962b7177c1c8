"""The conditions of a run on pairs as encoders in one folder, which runs without moezoo.

manifest.json       the conditions: inputs, program, names of weights, cost; words, temperature
model.safetensors   the weights of all conditions; equal arrays are stored once
*.stablehlo         the computations; conditions with the same computation share one
golden.safetensors  inputs and features, to check the machine that runs it
encode.py           loader and command, with the files that it imports

Under a condition the encoder is dense: no router, no experts (`domains.pairs.conditions`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from moezoo.deploy import manifest
from moezoo.deploy.export import (
    LOADING,
    PLATFORMS,
    check_finite,
    check_free,
    read_back,
    save_tensors,
    write_manifest,
    written,
)
from moezoo.deploy.path import no_source_locations, shapes
from moezoo.deploy.runtime import load
from moezoo.domains.images.export import photos, steps
from moezoo.domains.pairs import runtime as encode
from moezoo.domains.pairs.conditions import ConditionPath, ConditionSet, Cost, condition_set
from moezoo.domains.pairs.data import words
from moezoo.domains.pairs.domain import PairsDataConfig, words_of
from moezoo.domains.pairs.runtime import load_encoders
from moezoo.errors import UserError, unknown
from moezoo.models.conditional_moe.model import COLDEST, ConditionalMoE
from moezoo.models.conditional_moe.reading import Reading
from moezoo.models.conditional_moe.tokens import EncoderInputs
from moezoo.train.config import Config
from moezoo.train.console import Console
from moezoo.train.restore import read_config
from moezoo.train.setup import load_run

FREE = ("dense", "modality", "task", "attribute")  # levels at which a condition fixes everything


class EncoderRun(NamedTuple):
    """A run's model, what each condition encodes from an example, and how texts are read."""

    model: ConditionalMoE
    inputs: dict[str, EncoderInputs]
    reading: Reading
    data: PairsDataConfig
    step: int


def open_run(run: Path, wanted: Sequence[str] = ()) -> EncoderRun:
    """The newest undamaged checkpoint of a run on pairs; its data need not be there.

    wanted: names of conditions; default: all sides of the run's tasks. Raises UserError for another
    kind of run, a level at which tokens decide, and unknown conditions.
    """
    config = read_config(run)
    level = getattr(config.model, "level", None)
    if not isinstance(config.data, PairsDataConfig) or level not in FREE:
        why = f"tokens decide (level {level})" if level else "there are no conditions"
        raise UserError(
            f"{run} cannot be written as encoders, because {why}: use a run on pairs of level "
            f"{', '.join(FREE)}."
        )
    found = sides(config)
    for name in wanted:
        if name not in found:
            raise unknown("condition of this run", name, list(found))
    domain = config.data.domain
    _, classes = domain.example(config)
    loaded = load_run(run, classes)
    chosen = {name: found[name] for name in wanted or found}
    return EncoderRun(loaded.model, chosen, domain.reading, config.data, loaded.step)


def sides(config: Config) -> dict[str, EncoderInputs]:
    """Every `task|side` of a configuration on pairs, with the shapes of its inputs."""
    made: dict[str, EncoderInputs] = {}
    length: Any = getattr(config.data, "length", 0)
    text = jax.ShapeDtypeStruct((1, length), jnp.int32)
    for task in config.tasks:
        part = config.data.domain.example(replace(config, tasks=(task,)))[0][task]
        image = jax.eval_shape(jnp.asarray, part["image"]) if "image" in part else None
        # Partners are on both sides; everything else is encoded with all its inputs.
        alone = "label" not in part and "targets" not in part
        beside = text if "text" in part and not alone else None
        made[f"{task}|input"] = EncoderInputs(image, beside)
        made[f"{task}|target"] = EncoderInputs(None, text)
    return made


def features(
    path: ConditionPath, names: Sequence[str], reading: Reading
) -> Callable[..., dict[str, Any]]:
    """The exported function: from (weights, image or text or both) to the features of encode.py."""

    def call(weights: Mapping[str, Any], *given: Any) -> dict[str, Any]:
        inputs = reading.inputs(**dict(zip(names, given, strict=True)))
        read = path.module(weights).encode(inputs, path.condition)
        made = {"whole": read.whole_BD.astype(jnp.float32)}
        return made | ({"text": read.text_BLD.astype(jnp.float32)} if "text" in names else {})

    return call


def names_of(inputs: EncoderInputs) -> list[str]:
    """The names of these inputs: image, text or both."""
    given = {"image": inputs.image_BHWC, "text": inputs.text_BL}
    return [name for name, value in given.items() if value is not None]


def export_encoders(
    run: Path,
    out: Path,
    wanted: Sequence[str] = (),
    *,
    replace: bool = False,
    console: Console | None = None,
) -> Path:
    """Write the encoders of a run; see the first lines of this file.

    Raises UserError for what `open_run` refuses, and if `out` cannot be written.
    """
    console = console or Console()
    check_free(out, replace=replace)
    trained = open_run(run, wanted)
    found = condition_set(trained.model, trained.inputs)
    costs = found.costs()
    with written(out) as folder:
        _fill(folder, trained, found, costs, run.name)
        error = read_back(folder, out, load_encoders)
    rows = [
        (name, " and ".join(names_of(trained.inputs[name])), f"{c.parameters:,}", f"{c.flops:.3g}")
        for name, c in costs.items()
    ]
    console.table(f"encoders of {run}", ("condition", "encodes", "parameters", "FLOP"), rows)
    console.say(
        f"{out}: {found.parameters:,} different parameters for {len(rows)} conditions; written, "
        f"loaded again, outputs differ by at most {error:.1g}"
    )
    return out


def _fill(
    folder: Path, trained: EncoderRun, found: ConditionSet, costs: Mapping[str, Cost], source: str
) -> None:
    stored = _stored(found)
    arrays = {stored[digest]: np.asarray(a) for digest, a in found.arrays.items()}
    check_finite(arrays, source, "weights")
    save_tensors(folder / "model.safetensors", arrays)
    entries, golden = {}, _golden_inputs(trained)
    program: Any = None
    for name, path in found.paths.items():
        given = names_of(trained.inputs[name])
        call = features(path, given, trained.reading)
        file = f"{mark(call, path, given)}.stablehlo"
        if not (folder / file).exists():
            program = lower(call, path, given)
            (folder / file).write_bytes(bytes(program.serialize()))
        outputs = jax.jit(call)(path.weights, *(golden[one] for one in given))
        golden |= {f"{name}:{key}": np.asarray(value) for key, value in outputs.items()}
        entries[name] = {
            "inputs": given,
            "program": file,
            "weights": {k: stored[digest] for k, digest in found.names[name].items()},
            "outputs": {k: ["b", *value.shape[1:]] for k, value in outputs.items()},
            "cost": costs[name]._asdict(),
        }
    check_finite(golden, source, "features")
    save_tensors(folder / "golden.safetensors", golden)
    files = {"encode.py": encode, **LOADING, **photos(trained.data.resolution).files}
    for name, module in files.items():
        shutil.copyfile(str(module.__file__), folder / name)
    about = describe(trained, source) | {"conditions": entries, "parameters": found.parameters}
    write_manifest(folder, about | {"versions": manifest.versions(program)})


def mark(call: Callable[..., Any], path: ConditionPath, names: Sequence[str]) -> str:
    """A mark that is the same for functions with the same computation, whatever their weights.

    It covers the traced function and the constants that its results need (the task's number is not
    one): compiled text would differ in their order.
    """
    traced = jax.make_jaxpr(call)(shapes(path.weights), *_given(path, names, 1))
    needed = {id(variable) for variable in traced.jaxpr.outvars}
    for step in reversed(traced.jaxpr.eqns):
        if any(id(variable) in needed for variable in step.outvars):
            needed |= {id(variable) for variable in step.invars}
    digest = hashlib.sha256(str(traced).encode())
    for variable, constant in zip(traced.jaxpr.constvars, traced.consts, strict=True):
        if id(variable) in needed:
            digest.update(np.asarray(constant).tobytes())
    return "_".join((*names, digest.hexdigest()[:8]))


def lower(call: Callable[..., Any], path: ConditionPath, names: Sequence[str]) -> export.Exported:
    """The function for every platform, with a symbolic batch size."""
    (b,) = export.symbolic_shape("b")
    given = _given(path, names, b)
    with no_source_locations():
        return export.export(jax.jit(call), platforms=PLATFORMS)(shapes(path.weights), *given)


def _given(path: ConditionPath, names: Sequence[str], batch: Any) -> list[Any]:
    own = {"image": path.inputs.image_BHWC, "text": path.inputs.text_BL}
    return [jax.ShapeDtypeStruct((batch, *own[n].shape[1:]), own[n].dtype) for n in names]


def _stored(found: ConditionSet) -> dict[str, str]:
    """A name for every different array: its path, with a number if conditions differ in it."""
    names: dict[str, str] = {}
    count: dict[str, int] = {}
    for own in found.names.values():
        for name, digest in own.items():
            if digest not in names:
                count[name] = count.get(name, 0) + 1
                names[digest] = name if count[name] == 1 else f"{name}#{count[name]}"
    return names


def _golden_inputs(trained: EncoderRun) -> dict[str, np.ndarray]:
    rng, data = np.random.default_rng(0), trained.data
    image = rng.normal(size=(2, *data.resolution, 3)).astype(np.float32)
    text = rng.integers(len(words.MARKS), len(words_of(data)), (2, data.length), np.int32)
    text[1, data.length // 2 :] = words.PAD
    return {"image": image, "text": text}


def describe(trained: EncoderRun, source: str) -> dict[str, Any]:
    """The manifest without conditions, checksums and versions."""
    data, known = trained.data, words_of(trained.data)
    temperature = float(np.exp(np.asarray(trained.model.log_temperature.get_value())))
    return {
        "schema": load.SCHEMA,
        "kind": "encoders",
        "image_size": list(data.resolution),
        "preprocess": steps(data.resolution),
        "text": {
            "pattern": words.PATTERN,
            "words": list(known.words),
            "length": data.length,
            "pad": words.PAD,
        },
        "temperature": max(temperature, COLDEST),
        "golden": manifest.TOLERANCE,
        "source": f"{source}, step {trained.step}",
        "training_data": data.name,
    }
