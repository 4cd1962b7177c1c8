"""Runs on pairs that begin with what a run on images has learned."""

from __future__ import annotations

from typing import Any

from moezoo.train.domain import Pretrained
from moezoo.weights import conditional_names


class RunsOnImages(Pretrained):
    """A vision transformer becomes the image's part of a conditional encoder."""

    what = "a run"
    wanted = "that of a run with a vision transformer"

    def of_run(self, params: dict[str, Any]) -> dict[str, Any]:
        """Its parameters by the paths of a conditional encoder."""
        return conditional_names.from_vit(params)
