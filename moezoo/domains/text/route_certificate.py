"""What a route over a library would lose as a plain decoder: weights held still, and measured.

A route whose weights depend on prompt or token is no single adapter. Two plain decoders come near
it: `mean`, in every layer the adapters under the mean of the weights that tokens of these prompts
and answers gave them, and `single`, the one adapter that got most, alone. Both are folded into the
matrices, as `--write-merged` does, and held against the route on the same prompts: logits and
likeliest tokens along the route's own answers, and the answers themselves. Constant weights fold
exactly, which the same comparison shows; of others equal logits are those of these prompts only.
Bounds are one-sided Clopper-Pearson, 95 %, for prompts drawn like these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moezoo.backbones.generate import Settings, padded
from moezoo.deploy.certificate import at_most
from moezoo.domains.text.inference import MadeAnswer, Speaker, answered, tokens_of
from moezoo.domains.text.library import copied
from moezoo.domains.text.library_routes import LibraryRoute
from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.context import Context
from moezoo.nn.injection import Adapted
from moezoo.ops import lowrank
from moezoo.ops.routing import dense_weights

EXACT = 1e-4  # of logits, over the largest one: what float32 sums in another order differ by


class ReadRows(NamedTuple):
    """Prompts with a route's answers, [B, T], and the places [B, T] before each answered token."""

    tokens_BT: np.ndarray
    mask_BT: np.ndarray
    asked_BT: np.ndarray


def rows_of(speaker: Speaker, prompts: Sequence[str], answers: Sequence[MadeAnswer]) -> ReadRows:
    """Prompt and answer of each row; the place behind the whole answer counts, too."""
    starts = [tokens_of(speaker, prompt) for prompt in prompts]
    # The tokens that were made: those of the text are others where it is no UTF-8.
    rows = [[*start, *answer.tokens] for start, answer in zip(starts, answers, strict=True)]
    tokens_BT, mask_BT = padded(rows, speaker.tokenizer.pad, "right")
    place_T = np.arange(tokens_BT.shape[1])
    first_B1, last_B1 = (np.array([len(r) - 1 for r in given])[:, None] for given in (starts, rows))
    return ReadRows(tokens_BT, mask_BT, (place_T >= first_B1) & (place_T <= last_B1))


def certificate(
    chosen: LibraryRoute, prompts: Sequence[str], settings: Settings, tasks: Sequence[str] = ()
) -> dict[str, Any]:
    """What holds of the route on these prompts, as JSON takes it.

    tasks: of the prompts, for route oracle. Raises UserError without prompts, and for a route that
    adds up answers of several models.
    """
    if not prompts:
        raise UserError("A certificate is measured on prompts: give some like those to come.")
    speaker = chosen.asked(prompts, tasks)
    answers = chosen.answered(prompts, settings, 0, tasks)
    rows = rows_of(speaker, prompts, answers)
    model = module.merge(*speaker.parts)
    logits_BTV, gates = _read(model, speaker.context, rows)
    moved_NE = chosen.moved(prompts, answers, settings)
    if moved_NE is not None:  # what was read is the first of the weights
        gates = dict.fromkeys(gates, moved_NE)
    mean = {path: gates_NE.mean(0) for path, gates_NE in gates.items()}
    mass_E = np.mean(list(mean.values()), axis=0)
    best = int(mass_E.argmax())
    single = {path: np.eye(len(mass_E))[best] for path in mean}
    # The single adapter is its own A B, also where the route would add others' factors to it.
    held = {"mean": folded(model, mean), "single": folded(model, single, lowrank.by_block)}
    paths: dict[str, dict[str, Any]] = {}
    for name, plain_model in held.items():
        plain = speaker._replace(parts=module.split(plain_model), context=Context())
        along = _along(plain, rows, logits_BTV) if moved_NE is None else None
        again = answered(plain, prompts, settings)
        other = sum(a.tokens != b.tokens for a, b in zip(answers, again, strict=True))
        paths[name] = {"answers": _rate(other, len(prompts)), "along": along}
    paths["single"]["adapter"] = chosen.labels[best]
    return {
        "weights": chosen.weights_of,
        "constant": chosen.constant,
        "combination": chosen.combination,
        "prompts": len(prompts),
        "mean_weights": dict(zip(chosen.labels, mass_E.tolist(), strict=True)),
        "used": _used(chosen, gates),
        "paths": paths,
    }


def _used(chosen: LibraryRoute, gates: Mapping[str, np.ndarray]) -> list[str]:
    """The adapters without which a smaller bank would give other answers."""
    used_E = np.any([(gates_NE != 0).any(0) for gates_NE in gates.values()], axis=0)
    pairs = zip(chosen.labels, used_E, strict=True)
    return [name for name, used in pairs if used or chosen.unweighed]


def folded(
    model: Any, gates: Mapping[str, np.ndarray], combine: lowrank.Combine | None = None
) -> Any:
    """A decoder without adapters: in every layer the bank under constant gates, by path.

    combine: how adapters are mixed; None: as the bank does.
    """
    made = copied(model)
    for path, layer in surgery.find(made, Adapted).items():
        kernel = layer.base.kernel.get_value()
        layer.update.combine = combine or layer.update.combine
        delta_DO = layer.update.delta(jnp.asarray(gates[path], jnp.float32))
        layer.base.kernel.set_value((kernel.astype(jnp.float32) + delta_DO).astype(kernel.dtype))
        surgery.replace(made, path, layer.base)
    return made


def _read(model: Any, context: Context, rows: ReadRows) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [B, T, V], and the gates [N, E] of all tokens that are no padding, by layer."""
    mask_BT, attributes_RA = jnp.asarray(rows.mask_BT), context.attributes_RA
    told = Context(context.task_B, mask_BT=mask_BT, attributes_RA=attributes_RA)
    x_BTD, _ = model.features(jnp.asarray(rows.tokens_BT), told)
    # Before the records are looked at: the head may be adapted, too.
    logits_BTV = np.asarray(model.logits(x_BTD, told), np.float32)
    gates = {
        path: np.asarray(dense_weights(told.records[path].routing, layer.update.gates))[
            rows.mask_BT.reshape(-1)
        ]
        for path, layer in surgery.find(model, Adapted).items()
    }
    return logits_BTV, gates


def _along(plain: Speaker, rows: ReadRows, wanted_BTV: np.ndarray) -> dict[str, Any]:
    """How far logits are apart along the route's own answers."""
    model = module.merge(*plain.parts)
    found_BTV, _ = _read(model, plain.context, rows)
    found, wanted = found_BTV[rows.asked_BT], wanted_BTV[rows.asked_BT]
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        raise UserError(
            "Logits along the route's answers are not finite, so nothing can be said of them: an "
            "adapter of the library is damaged or far too large."
        )
    apart = float(np.abs(found - wanted).max())
    other = int((found.argmax(-1) != wanted.argmax(-1)).sum())
    return {
        "largest_difference": apart,
        "exact": bool(apart <= EXACT * np.abs(wanted).max()),
        "likeliest_token": _rate(other, len(wanted)),
    }


def _rate(events: int, of: int) -> dict[str, Any]:
    return {"differ": events, "of": of, "rate_at_most": at_most(events, of)}


def summary(told: Mapping[str, Any]) -> str:
    """The certificate in a sentence for each path."""
    lines = []
    for name, path in told["paths"].items():
        answers, along = path["answers"], path["along"]
        what = f"with {path['adapter']} alone" if "adapter" in path else f"with the {name} weights"
        said = f"{answers['differ']} of {answers['of']} answers differ"
        bound = f"{100 * answers['rate_at_most']:.1f} %"
        said += f" (with 95 % certainty at most {bound} of prompts like these)"
        if along is not None:
            token = along["likeliest_token"]
            said += f", another token is the likeliest at {token['differ']} of {token['of']} places"
            if along["exact"]:
                same = (
                    "the same decoder" if told["constant"] else "the same logits on these prompts"
                )
                said = f"{same}; {said}"
        lines.append(f"A plain decoder {what}: {said}.")
    return "\n".join(lines)
