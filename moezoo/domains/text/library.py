"""Collecting trained LoRAs for a library: runs on text and PEFT folders, with their own examples.

What a member's examples look like to the base is kept as one vector: the mean of the base's
features over the tokens of its prompts (`ops.prototypes`: routes by nearness and by running prompt
compare with it). Where it is asked for, the mean of the gradients of these prompts is kept, too
(`gradients`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moezoo import regular
from moezoo.backbones.generate import padded
from moezoo.domains.text.adapter import language_model, language_run
from moezoo.domains.text.data.encode import encode
from moezoo.domains.text.data.example import Template, Turn
from moezoo.domains.text.data.tokenizer import Tokenizer
from moezoo.domains.text.domain import TextDataConfig, open_rows, tasks_of
from moezoo.domains.text.generation import speech_of_folder, speech_of_run
from moezoo.domains.text.gradients import gradient_features
from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.context import Context
from moezoo.nn.injection import Adapted
from moezoo.nn.upcycle import BASE
from moezoo.weights import hf, hf_files, hub, peft
from moezoo.weights.library import BaseModel, Library, Member, NewMember, fingerprint, forms
from moezoo.weights.peft import Factors
from moezoo.weights.peft_config import NAME as PEFT_CONFIG

EXAMPLES = 128  # prompts that a member's mean embedding is of
UPDATE = "/update/"


class BaseDecoder(NamedTuple):
    """A frozen decoder to which adapters belong, and how texts become its tokens.

    stop: the tokens that end an answer, () for those of the template.   left_out: layers whose
    own updates were taken off, because adapters belong to what is below them.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    template: Template
    sha256: str
    stop: tuple[int, ...] = ()
    left_out: int = 0

    @property
    def told(self) -> BaseModel:
        """What a library's manifest says of it."""
        return BaseModel(self.name, self.sha256)


def open_base(folder: Path, template: str | None = None) -> BaseDecoder:
    """The bare decoder of a run or of a Hugging Face folder, asked as `open_speaker` asks it.

    A run that trained updates stands for the base below them. Raises UserError where it is neither.
    """
    folder, updates = hub.folder(folder), 0
    if hf_files.holds_model(folder):
        speech = speech_of_folder(folder, template)
        model = module.merge(*hf.load(folder).parts)
    else:
        model, data = language_model(folder)
        speech = speech_of_run(data, template)
        updates = len(surgery.find(model, Adapted))
        bare(model)
    made = (speech.tokenizer, speech.template)
    return BaseDecoder(folder.name, model, *made, _hash(model), speech.stop, updates)


def bare(model: Any) -> None:
    """Take all updates off a decoder, in place."""
    for path, layer in surgery.find(model, Adapted).items():
        surgery.replace(model, path, layer.base)


def copied(model: Any) -> Any:
    """Another module with the same arrays, which can be changed and folded without the first."""
    return module.merge(*module.split(model))


def _hash(model: Any) -> str:
    parts = module.split(model)
    return fingerprint(module.flatten(parts.params) | module.flatten(parts.stats))


def member_of_run(
    run: Path, base: BaseDecoder, name: str | None = None, gradients: bool = False
) -> NewMember:
    """The LoRA of a run's newest undamaged checkpoint as a library takes it.

    gradients: whether to keep those of its prompts. Raises UserError where the run trained no
    plain LoRA, or on another base.
    """
    loaded, data = language_run(run)
    layers = surgery.find(loaded.model, Adapted)
    if not layers:
        raise UserError(f"{run} trained no adapter: name runs of LoRA, or PEFT folders.")
    routed = [layer for layer in layers.values() if layer.router is not None]
    if any(layer.update.experts > 1 for layer in routed):
        raise UserError(
            f"{run} trained adapters with routers, which are no single LoRA: a library takes plain "
            "ones (--model.update lora), and single ones with a gate (PHATGOOSE)."
        )
    parts = module.split(loaded.model)
    arrays = module.flatten(parts.params) | module.flatten(parts.stats)
    own = {p.replace(BASE, "/"): a for p, a in arrays.items() if UPDATE not in p}
    if fingerprint(own) != base.sha256:
        raise UserError(
            f"{run} was trained on another base than {base.name}: a library has adapters of one "
            "base; name the base of all by --base."
        )
    factors = {path: _factors(layer) for path, layer in layers.items()}
    member = Member(name or _named(run), tasks_of(data), str(run.name))
    gates = {
        path: np.asarray(layer.router.kernel.get_value())[:, 0]
        for path, layer in layers.items()
        if layer.router is not None
    }
    rows = prompts_of(data)
    found = NewMember(member, factors, embedding_of(base, rows), gates or None)
    return _with_gradient(found, base, rows) if gradients else found


def _with_gradient(
    member: NewMember, base: BaseDecoder, rows: Sequence[Sequence[int]]
) -> NewMember:
    if not rows:
        raise UserError(
            f"{member.member.name} came without examples, so it has no gradients: give --examples, "
            "or leave --gradients out."
        )
    found = gradient_features(base.model, forms(member), rows, base.tokenizer.pad)
    return member._replace(gradient_M=found.mean(0))


def _named(folder: Path) -> str:
    return folder.resolve().name


def _factors(layer: Adapted) -> Factors:
    update = layer.update
    down, up = (np.asarray(a.get_value(), np.float32) for a in (update.down, update.up))
    return Factors(down, up, float(update.scale), {})


def prompts_of(data: TextDataConfig) -> list[list[int]]:
    """Tokens of the first training examples up to their answers; [] for continuous text."""
    if data.name == "corpus":
        return []
    documents = open_rows(data, "train").documents
    held = (documents[i] for i in range(min(EXAMPLES, len(documents))))
    return [[int(t) for t in d.tokens[: int(np.argmax(d.answer))]] for d in held]


def member_of_peft(
    folder: Path,
    base: BaseDecoder,
    tasks: Sequence[str],
    examples: Path | None,
    gradients: bool = False,
) -> NewMember:
    """The adapter of a PEFT folder as a library takes it.

    tasks: what it was trained on, as far as it is known. examples: a text file with a prompt a
    line, which its mean embedding is made of. gradients: as of runs. Raises UserError where the
    folder is damaged, its adapter is more than plain LoRA, changed its base, or was made for
    another.
    """
    adapter = peft.read(folder, base.model)
    if adapter.config.get("peft_type") != "LORA" or any(f.router for f in adapter.layers.values()):
        raise UserError(
            f"{folder} has routers, so it is no single LoRA: a library takes plain ones."
        )
    if adapter.init in ("pissa", "olora"):
        raise UserError(
            f"{folder} was trained on a base that {adapter.init} had changed: save it as plain "
            "LoRA (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    said = adapter.config.get("base_model_name_or_path")
    if said and Path(said).name != base.name:
        raise UserError(
            f"{folder} says that it was trained on {Path(said).name}, not on {base.name}: a "
            "library has adapters of one base."
        )
    lines = [] if examples is None else text_lines(examples)[:EXAMPLES]
    rows = [prompt_tokens(base, line) for line in lines]
    member = Member(_named(folder), tuple(tasks), folder.name)
    found = NewMember(member, adapter.layers, embedding_of(base, rows))
    return _with_gradient(found, base, rows) if gradients else found


def text_lines(file: Path, what: str = "prompt") -> list[str]:
    """The lines of a text file that are not empty; UserError where there is none, or no text."""
    advice = f"name a text file with a {what} a line"
    content = regular.read(file, 64 * regular.MB, UserError, advice)
    try:
        found = [line for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is no text in UTF-8: name one with a {what} a line.") from error
    if not found:
        raise UserError(f"'{file}' has no {what}: give at least one line.")
    return found


def prompt_tokens(base: BaseDecoder, prompt: str) -> list[int]:
    """A prompt's tokens with everything that the template puts before an answer."""
    return question_tokens(base, (Turn("user", prompt), Turn("assistant", "x")))


def question_tokens(base: BaseDecoder, turns: Sequence[Turn]) -> list[int]:
    """The tokens of a conversation before its first answer."""
    pieces = base.template(turns)
    document = encode(pieces, base.tokenizer, 2**20)
    assert document is not None  # no text is longer
    return [int(t) for t in document.tokens[: int(np.argmax(document.answer))]]


def members_of(
    folders: Sequence[Path],
    base: BaseDecoder,
    tasks: Sequence[str] = (),
    examples: Path | None = None,
    gradients: bool = False,
) -> list[NewMember]:
    """The adapters of runs and PEFT folders, in their order.

    tasks, examples: of PEFT folders, which do not say them; UserError where there is none.
    gradients: whether to keep those of members' prompts.
    """
    published = [folder for folder in folders if is_peft(folder)]
    if (tasks or examples) and not published:
        raise UserError("Runs know their tasks and examples: leave --tasks and --examples out.")
    return [
        member_of_peft(folder, base, tasks, examples, gradients)
        if folder in published
        else member_of_run(folder, base, gradients=gradients)
        for folder in folders
    ]


def is_peft(folder: Path) -> bool:
    """Whether a folder is an adapter that PEFT wrote."""
    return (folder / PEFT_CONFIG).exists()


def base_of(folders: Sequence[Path], named: Path | None) -> BaseDecoder:
    """The decoder of all adapters: the one that is named, else what the first run trained on.

    Raises UserError where none is named and there are PEFT folders only.
    """
    if named is not None:
        return open_base(named)
    run = next((folder for folder in folders if not is_peft(folder)), None)
    if run is None:
        raise UserError("PEFT folders do not hold their base: name its folder by --base.")
    start = language_run(run)[0].config.start_from
    base = open_base(run)
    return base if start is None else base._replace(name=Path(start).name)


def check_library_base(library: Library, base: BaseDecoder) -> None:
    """Raise UserError where a decoder is not the library's."""
    from moezoo.weights.library_bank import check_base

    check_base(library, base.model, base.name, base.sha256)


def embedding_of(base: BaseDecoder, rows: Sequence[Sequence[int]]) -> np.ndarray | None:
    """The mean embedding [D] of several prompts' tokens; None without any."""
    return embeddings(base, rows).mean(0) if rows else None


def embeddings(base: BaseDecoder, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The mean of the base's last features over the tokens of each prompt, float32 [B, D]."""
    longest = -(-max(map(len, rows)) // 16) * 16  # few shapes, few programs
    tokens_BT, mask_BT = padded(rows, base.tokenizer.pad, "right", longest)
    parts = module.split(base.model)
    return np.asarray(
        _mean_features(parts.definition, parts.params, parts.stats, tokens_BT, mask_BT)
    )


@partial(jax.jit, static_argnums=0)
def _mean_features(
    definition: Any, params: Any, stats: Any, tokens_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    return mean_features(module.merge(definition, params, stats), tokens_BT, mask_BT)


def mean_features(model: Any, tokens_BT: Any, mask_BT: Any) -> jax.Array:
    """The mean of a decoder's last features over each row's tokens, float32 [B, D]."""
    mask_BT = jnp.asarray(mask_BT)
    x_BTD = model.features(jnp.asarray(tokens_BT), Context(mask_BT=mask_BT)).x_BTD
    kept_BTD = jnp.where(mask_BT[..., None], x_BTD.astype(jnp.float32), 0.0)
    return kept_BTD.sum(1) / mask_BT.sum(1, keepdims=True)
