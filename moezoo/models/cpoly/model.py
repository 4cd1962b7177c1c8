"""C-Poly: modules that tasks share, chosen as in Polytropon, and modules of each task's own.

Wang et al., "Customizable Combination of Parameter-Efficient Modules for Multi-Task Learning",
arXiv:2312.03248. It claims (as others report) to be better than Polytropon and MHR on SuperGLUE and
mostly on SuperNI, with more modules than these. The update of a frozen layer W is for task t

    y = W x + sum_(i <= A) w_ti x A_i B_i + sum_j v_tj x C_j D_j

w the sigmoids over their sum of a table's logits, sampled as relaxed Bernoulli variables in
training (eq. 3), v a matrix [J, J B] that begins as the identity and is trained: a task begins with
its own B modules alone. No code was published; from the paper's equations. Outputs are added up,
where Polytropon mixes factors: the paper writes a sum of modules. The scale alpha / rank and the
table's learning rate (`pace`) are Polytropon's.

What we ran: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx

from moezoo.fields import AxisSize, Positive
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.language import AdaptedDecoderConfig, left_over
from moezoo.nn.lowrank import LowRank
from moezoo.nn.skill_tables import SharedAndOwnRouter


@dataclass(frozen=True)
class CPolyConfig(AdaptedDecoderConfig):
    """A frozen decoder with shared LoRAs under a table, and LoRAs of each task's own."""

    card: ClassVar[Card] = Card(
        title="C-Poly",
        paper="Wang et al., ICLR 2024, arXiv:2312.03248",
        kind="on a frozen decoder every task weighs LoRAs that all share and LoRAs of its own",
        parity="none published; a task's decoder is tested against the equations",
        trained=("text/cpoly_tiny",),
        headline="exact match 0.594 on the nine tasks of text/smora_tiny, one seed",
    )

    tasks: AxisSize = 9
    """Rows of the table, and tasks with modules of their own."""
    shared: AxisSize = 3
    """Modules that all tasks share (A)."""
    own: AxisSize = 1
    """Modules of each task's own (B)."""
    rank: AxisSize = 4
    """Rank of each module."""
    pace: Positive = 100.0
    """How much faster than the modules the table learns under Adam."""

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach nothing, and why: all."""
        return balancing.none_of_them("every task weighs all modules, so none is chosen")

    def beyond(self, groups: Sequence[str]) -> str | None:
        said = f"no row of the table (model.tasks {self.tasks}), so nothing of their own"
        return left_over(groups, self.tasks, f"{said}, and all share evenly")

    def router_computes(self) -> tuple[str, ...]:
        # Of shared and own ones other numbers may come to the same shape.
        return "shared", "own", "pace"

    def make_update(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> LowRank:
        """Modules of a layer and their table."""
        router = SharedAndOwnRouter(self.tasks, self.shared, self.own, self.pace, rngs=rngs)
        modules = self.shared + self.tasks * self.own
        made: dict[str, Any] = {"experts": modules, "router": router, "dropout": self.dropout}
        made["scale"] = self.alpha / self.rank
        return LowRank(inputs, outputs, modules * self.rank, **made, rngs=rngs)
