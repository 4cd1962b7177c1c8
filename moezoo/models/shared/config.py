"""What the rest of the package asks of a model's configuration, and the answers by default.

A configuration is a frozen dataclass with `build`; everything else it may leave to `ModelTraits`,
which the zoo's own configurations inherit. One of somebody's own need not: `traits` answers for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, ClassVar, NamedTuple

from moezoo.errors import UserError
from moezoo.models.shared.card import Card
from moezoo.models.shared.macs import Macs


class LibraryBank(NamedTuple):
    """A library of LoRAs that stand still as the banks of a model, and the form of these banks.

    loras, rank, scale: how many LoRAs each has, of which rank and scale.
    """

    folder: str
    loras: int
    rank: int
    scale: float


class HeldParts(NamedTuple):
    """Parts beside a base that stand still in training, so that an earlier run must give them.

    patterns: their paths, with shell wildcards.   what: they in words.   learned_by: what to start
    from.
    """

    patterns: tuple[str, ...]
    what: str
    learned_by: str


class ModelTraits:
    """The answers of a model on images that predicts every pixel, about whose inside nothing is
    known.

    card: its row in the table of systems; None for a system that stands in none.
    renamed: fields that runs of older versions stored under another name: that name -> today's.
    reads: the name of the domain whose batches the model reads.
    per_pixel: whether it predicts every pixel rather than one answer for the whole example.
    begins_with: the pretrained networks on images that its parameters can begin with, a name of
    `domains.images.pretrained_kinds.KINDS`.
    experts, patch, heads: sizes that a mesh, an image or a file must fit; None where it has none.
    dispatch: how tokens reach their experts, a name of `ops.exchange`; None where none is sent.
    conditions: the lines of its table of conditions, for models that have one.
    vocabulary, text_length: what its texts may have; None where it reads none, or any.
    """

    card: ClassVar[Card | None] = None
    renamed: ClassVar[Mapping[str, str]] = {}
    reads: ClassVar[str] = "images"
    per_pixel: ClassVar[bool] = True
    begins_with: ClassVar[str] = "vit"
    experts: Any = None
    patch: Any = None
    heads: Any = None
    dispatch: Any = None
    conditions: Any = ()
    vocabulary: Any = None
    text_length: Any = None

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """Balance losses that could teach its routers nothing, by name, each with the reason.

        tasks: how many tasks tokens are numbered by; None: not known yet.
        """
        return {}

    @classmethod
    def check_stored(cls, values: Mapping[str, Any]) -> None:
        """UserError for stored fields that meant something else in an older version."""

    def computes(self) -> dict[str, Any]:
        """What decides, beside their shapes, what parameters compute, by the option's name."""
        return {} if self.heads is None else {"heads": self.heads}

    def computes_in(self) -> dict[str, dict[str, Any]]:
        """The same of parts that another model may lack: by a mark in their paths, by name.

        It is asked of parts that are taken over; fresh ones may differ.
        """
        return {}

    def beyond(self, groups: Sequence[str]) -> str | None:
        """What becomes of the data's tasks that its tables lack, in words; None: there are none."""
        return None

    def variant(self) -> str | None:
        """What this configuration is where it is another system than its card's; None: that."""
        return None

    def held(self) -> HeldParts | None:
        """What stands still in training and nothing but `start_from` can give; None: nothing."""
        return None

    def check_size(self, size: tuple[int, int]) -> None:
        """UserError where examples of this size (as `build` takes it) make no whole tokens."""
        height, width = size
        patch = self.patch
        if isinstance(patch, int) and patch > 0 and (height % patch or width % patch):
            raise UserError(
                f"data.resolution is {height} x {width}, but model.patch is {patch}: "
                f"both sides must be multiples of the patch."
            )

    def unfit(self, task: Any) -> str | None:
        """Why it cannot predict a task (`tasks.base.Task`) of this form; None where it can."""
        if task.per_pixel == self.per_pixel:
            return None
        if task.per_pixel:
            return (
                f"gives one answer for a whole example, but task {task.name} is predicted for "
                "every pixel"
            )
        return f"predicts every pixel, but task {task.name} is one answer for a whole example"

    def check_steps(self, steps: int) -> None:
        """UserError where training ends before something that the model does at a step of it."""

    def bank(self) -> LibraryBank | None:
        """The library whose LoRAs it begins with, beside what `start_from` gives; None: none."""
        return None

    def check_mesh(self, expert: int) -> None:
        """UserError where its experts do not split evenly over `expert` devices."""
        if isinstance(self.experts, int) and self.experts % expert:
            raise UserError(
                f"model.experts is {self.experts}, which does not split evenly over "
                f"mesh.expert={expert} devices."
            )

    def macs(self, size: tuple[int, int], tasks: Mapping[str, int]) -> Macs | None:
        """Multiply-accumulates of one example for all `{task: channels}`; None: not counted."""
        return None

    def whole(self) -> str | None:
        """Why no expert of a trained model can be removed; None where some can."""
        return None


class _Answered:
    """A configuration of somebody's own, with the defaults for what it does not say."""

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._config, name):
            return getattr(self._config, name)
        default = getattr(ModelTraits, name)
        # Bound to this wrapper, so that defaults, too, ask the configuration first; class methods
        # are bound already.
        method = callable(default) and not isinstance(default, MethodType)
        return MethodType(default, self) if method else default


def traits(config: Any) -> Any:
    """A model's configuration as something that answers everything that `ModelTraits` names."""
    return config if isinstance(config, ModelTraits) else _Answered(config)
