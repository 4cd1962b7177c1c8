"""Runs on pairs that start from what a run on images has learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moezoo.train.domain import Pretrained

# Where the parameters of a vision transformer belong in a conditional encoder.
PLACES = {
    "blocks/": "encoder/blocks/",
    "norm/": "encoder/norm/",
    "patch_embed/": "tokens/patch_embed/",
}
POSITIONS, CLASS = "pos_embed", "cls_token"


def from_vit(params: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: array}` of a vision transformer under the paths of a conditional encoder.

    Its class token becomes the special token, with its position added; parameters without a
    counterpart keep their names.
    """
    made = {}
    for path, array in params.items():
        start = next((old for old in PLACES if path.startswith(old)), None)
        made[path if start is None else PLACES[start] + path[len(start) :]] = array
    if POSITIONS in made and CLASS in made:
        positions_1PD = made.pop(POSITIONS)
        made["tokens/special"] = made.pop(CLASS)[0] + positions_1PD[0, :1]
        made["tokens/image_positions"] = positions_1PD[0, 1:]
    return made


class RunsOnImages(Pretrained):
    """A vision transformer becomes the image part of a conditional encoder."""

    what = "a run"
    wanted = "that of a run with a vision transformer"
    runs_on = ("images",)

    def of_run(self, params: dict[str, Any]) -> dict[str, Any]:
        """Its parameters under the paths of a conditional encoder."""
        return from_vit(params)
