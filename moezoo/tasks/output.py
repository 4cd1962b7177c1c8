"""What a task's prediction means to its user: unit, painting, and when two predictions disagree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.errors import UserError
from moezoo.label import DIRECTION, LabelKind
from moezoo.tasks.painting import Key, Painting, Scale


@dataclass(frozen=True)
class TaskOutput:
    """What a post-processed prediction means to its user.

    form: decides how an export paints it: "classes", "vector" and "range" are maps, "label" is the
    class of a whole example, "number" is one or a few numbers for it, "sentence" words by number.
    unit: the unit of the values.
    difference(first, second): float32 [B], how far two predictions [B,...] of the same images
    are apart, in percent or degrees; an image disagrees at a level of `levels` if this exceeds it.
    words: what that means, with {} for the level.
    shown: what an export has to know besides to show it, JSON-able.
    """

    form: str
    unit: str
    difference: Callable[[jax.Array, jax.Array], jax.Array]
    words: str
    levels: tuple[float, ...] = (1.0, 5.0, 10.0)
    shown: Mapping[str, Any] = field(default_factory=dict)

    def event(self, level: float) -> str:
        """What disagreement of two predictions at this level means."""
        return self.words.format(f"{level:g}")


def _per_image(values: jax.Array) -> jax.Array:
    return jnp.mean(values.astype(jnp.float32), axis=tuple(range(1, values.ndim)))


def share_of_other_classes(first: jax.Array, second: jax.Array) -> jax.Array:
    """Percentage of pixels whose class differs."""
    return 100 * _per_image(first != second)


def share_of_other_sides(first: jax.Array, second: jax.Array) -> jax.Array:
    """Percentage of pixels whose probability lies on the other side of 0.5."""
    return 100 * _per_image((first > 0.5) != (second > 0.5))


def relative_rms(first: jax.Array, second: jax.Array) -> jax.Array:
    """Root mean square of the difference, in percent of the first's root mean square."""
    size = jnp.maximum(_per_image(first**2), 1e-12)
    return 100 * jnp.sqrt(_per_image((first - second) ** 2) / size)


def mean_angle(first: jax.Array, second: jax.Array) -> jax.Array:
    """Mean angle between unit vectors, degrees.

    From the chord, which is exact near zero, unlike the inverse cosine.
    """
    half_chord = jnp.linalg.norm(first - second, axis=-1) / 2
    return _per_image(2 * jnp.degrees(jnp.arcsin(jnp.clip(half_chord, 0.0, 1.0))))


CLASSES = TaskOutput(
    "classes",
    "class index",
    share_of_other_classes,
    "the predicted class differs on more than {} % of the image's pixels",
)
PROBABILITY = TaskOutput(
    "range",
    "probability",
    share_of_other_sides,
    "the probability lies on the other side of 0.5 on more than {} % of the image's pixels",
)
VECTOR = TaskOutput(
    "vector",
    "unit vector in the camera frame",
    mean_angle,
    "the predicted normals differ by more than {} degrees on average over the image",
)

LABEL = TaskOutput(
    "label",
    "class index of the image",
    share_of_other_classes,
    "the predicted class differs",
    levels=(5.0,),
)

VALUE = TaskOutput(
    "range",
    "value",
    relative_rms,
    "the maps differ by more than {} % (root mean square, relative to the full model's)",
)
NUMBER = TaskOutput(
    "number",
    "value",
    relative_rms,
    "the numbers differ by more than {} % (root mean square, relative to the full model's)",
)
# For tasks that are not the zoo's: derived from the kind of label that they declare.
BY_FORM = {"class": CLASSES, "binary": PROBABILITY, "image": LABEL, "value": VALUE}


def of_label(label: LabelKind | None, key: Key | None) -> TaskOutput | None:
    """The output derived from a task's declared kind of label; None if no export has a form.

    key: of the task's pictures, whose unit is the values' unit.
    """
    if label is None or (label.form not in BY_FORM and label != DIRECTION):
        return None
    found = VECTOR if label == DIRECTION else BY_FORM[label.form]
    return replace(found, unit=key.unit) if found is VALUE and isinstance(key, Scale) else found


def painting(output: TaskOutput, picture: Painting, channels: int, name: str) -> dict[str, Any]:
    """How an export paints a task's prediction: the manifest's `picture` entry.

    Colours are the same as in the task's own pictures.
    """
    if output.form in ("vector", "number", "sentence"):
        return {"kind": output.form, **output.shown}
    if output.form == "classes":
        colours = picture(np.arange(channels)[None])[0]
        return {"kind": "classes", "colours": colours.tolist()}
    if output.form == "label":
        tags = [picture(np.asarray(index)) for index in range(channels)]
        return {"kind": "label", "colours": [tag[0, 0].tolist() for tag in tags]}
    key = picture.key(())
    if not isinstance(key, Scale):
        raise UserError(
            f"Pictures of task {name} have no scale from low to high, which an export of "
            "numbers needs: give the task a picture like moezoo.tasks.painting.Probability."
        )
    colours = key.colours.tolist()
    whole = {"low": key.low, "high": key.high, "lowest": colours[0], "colours": colours}
    return {"kind": "range"} | whole
