"""Collecting trained LoRAs for a library: runs on text and PEFT folders, with their own examples.

What a member's examples look like to the base is kept as one vector: the mean of the base's
features over the tokens of its prompts (`ops.prototypes`: routes by nearness and by running prompt
compare with it). Where it is asked for, the mean of the gradients of these prompts is kept, too
(`gradients`).

An adapter belongs to its base as this was asked in training: other arrays, another tokenizer or
another template are refused. Folders of Hugging Face and runs on continuous text know no template;
there that of the runs whose adapters are taken counts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moezoo import regular
from moezoo.backbones.generate import padded
from moezoo.domains.text.adapter import language_data, language_model, language_run
from moezoo.domains.text.data.encode import encode, ends
from moezoo.domains.text.data.example import Template, Turn
from moezoo.domains.text.data.tokenizer import Tokenizer, identity
from moezoo.domains.text.domain import (
    TEMPLATES,
    TextDataConfig,
    open_rows,
    tasks_of,
    tokenizer_of,
)
from moezoo.domains.text.generation import bare as as_it_is
from moezoo.domains.text.generation import speech_of_folder, speech_of_run
from moezoo.domains.text.gradients import gradient_features
from moezoo.domains.text.inference import check_prompt
from moezoo.errors import UserError, unknown
from moezoo.nn import module, surgery
from moezoo.nn.context import Context
from moezoo.nn.injection import Adapted
from moezoo.nn.upcycle import BASE
from moezoo.text_lines import lines as split_lines
from moezoo.train.restore import read_config
from moezoo.weights import hf, hf_files, hub, peft
from moezoo.weights.library import (
    BaseModel,
    Library,
    Member,
    NewMember,
    check_free,
    fingerprint,
    forms,
)
from moezoo.weights.peft import Factors
from moezoo.weights.peft_config import NAME as PEFT_CONFIG

EXAMPLES = 128  # prompts that a member's mean embedding is of
UPDATE = "/update/"


class BaseDecoder(NamedTuple):
    """A frozen decoder to which adapters belong, and how texts become its tokens.

    stop: the tokens that end an answer, () for those of the template.   left_out: layers whose
    own updates were taken off, because adapters belong to what is below them.   assumed: whether
    nothing says the template, so that it is only the usual one.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    template: Template
    sha256: str
    stop: tuple[int, ...] = ()
    left_out: int = 0
    assumed: bool = False

    @property
    def told(self) -> BaseModel:
        """What a library's manifest says of it."""
        template = None if self.assumed else _template_name(self.template)
        return BaseModel(self.name, self.sha256, template, identity(self.tokenizer))


def open_base(folder: Path, template: str | None = None) -> BaseDecoder:
    """The bare decoder of a run or of a Hugging Face folder, asked as `open_speaker` asks it.

    A run that trained updates stands for the base below them. Raises UserError where it is neither.
    """
    folder, updates = hub.folder(folder), 0
    if hf_files.holds_model(folder):
        speech = speech_of_folder(folder, template)
        model = module.merge(*hf.load(folder).parts)
        assumed = speech.template is as_it_is
    else:
        model, data = language_model(folder)
        speech = speech_of_run(data, template)
        updates = len(surgery.find(model, Adapted))
        bare(model)
        assumed = template is None and data.name == "corpus"
    # Not resolved: a link is called as its user calls it.
    name = Path(os.path.abspath(folder)).name
    made = (speech.tokenizer, speech.template)
    return BaseDecoder(name, model, *made, _hash(model), speech.stop, updates, assumed)


def asked_with(base: BaseDecoder, template: str | None) -> BaseDecoder:
    """The base asked with a template by its name, where its own is only assumed."""
    if template is None or not base.assumed:
        return base
    if template not in TEMPLATES:
        raise unknown("template", template, list(TEMPLATES))
    made = TEMPLATES[template]
    stop = tuple(dict.fromkeys((*ends(made, base.tokenizer), *base.stop)))
    return base._replace(template=made, stop=stop, assumed=False)


def _template_name(template: Template) -> str | None:
    return next((name for name, known in TEMPLATES.items() if known is template), None)


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
    plain LoRA, or on another base, with another tokenizer or template, or nothing yet.
    """
    loaded, data = language_run(run)
    layers = surgery.find(loaded.model, Adapted)
    if not layers:
        raise UserError(f"{run} trained no adapter: name runs of LoRA, or PEFT folders.")
    gates = _gates(run, loaded.config.model, layers)
    parts = module.split(loaded.model)
    arrays = module.flatten(parts.params) | module.flatten(parts.stats)
    own = {p.replace(BASE, "/"): a for p, a in arrays.items() if UPDATE not in p}
    if fingerprint(own) != base.sha256:
        raise UserError(
            f"{run} was trained on another base than {base.name}: a library has adapters of one "
            "base; name the base of all by --base."
        )
    _check_asked(run, data, base)
    factors = {path: _factors(layer) for path, layer in layers.items()}
    _check_trained(run, factors, gates)
    member = Member(name or _named(run), tasks_of(data), _named(run))
    rows = prompts_of(data)
    found = NewMember(member, factors, embedding_of(base, rows), gates)
    return _with_gradient(found, base, rows) if gradients else found


def _gates(run: Path, config: Any, layers: Mapping[str, Adapted]) -> dict[str, np.ndarray] | None:
    """The gate [D] of every layer, None of plain LoRA; UserError for routers that are no gates."""
    if all(layer.router is None for layer in layers.values()):
        return None
    if not config.gates_library:
        raise UserError(
            f"{run} trained adapters with routers ({config.card.title}), which are no single LoRA: "
            "a library takes plain ones (--model.update lora), and single ones with a gate "
            "(PHATGOOSE)."
        )
    return {path: np.asarray(one.router.kernel.get_value())[:, 0] for path, one in layers.items()}


def _check_asked(run: Path, data: TextDataConfig, base: BaseDecoder) -> None:
    """UserError where a run's texts became other tokens than the base's."""
    if identity(tokenizer_of(data)) != identity(base.tokenizer):
        raise UserError(
            f"{run} was trained with another tokenizer than that of {base.name}: train it with "
            "--data.tokenizer as its base, or name the base of all by --base."
        )
    own = TEMPLATES[data.template]
    if data.name != "corpus" and not base.assumed and own is not base.template:
        raise UserError(
            f"{run} was trained with template {data.template}, but {base.name} and its other "
            f"adapters are asked with {_template_name(base.template) or 'another'}: train it with "
            "--data.template of that name, or make a library of its own."
        )


def _check_trained(
    folder: Path, factors: Mapping[str, Factors], gates: Mapping[str, np.ndarray] | None
) -> None:
    """UserError for an adapter that adds nothing, or that nothing would ever be routed to."""
    if not any(one.scale and one.down.any() and one.up.any() for one in factors.values()):
        raise UserError(
            f"The update in {folder} is 0 everywhere, as before its first step: train it first."
        )
    if gates is not None and not any(gate.any() for gate in gates.values()):
        raise UserError(
            f"The gates in {folder} are 0 everywhere, as before their first step: train them first."
        )


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
    said = _called(adapter.config.get("base_model_name_or_path"))
    if said not in (None, base.name):
        raise UserError(
            f"{folder} says that it was trained on {said}, not on {base.name}: a library has "
            "adapters of one base."
        )
    _check_trained(folder, adapter.layers, None)
    lines = [] if examples is None else text_lines(examples)[:EXAMPLES]
    rows = [prompt_tokens(base, line) for line in lines]
    member = Member(_named(folder), tuple(tasks), _named(folder))
    found = NewMember(member, adapter.layers, embedding_of(base, rows))
    return _with_gradient(found, base, rows) if gradients else found


def _called(path: str | None) -> str | None:
    """What a base is called by a path or a name on the hub; None where that names nothing (".")."""
    return None if not path or Path(path).name in ("", "..") else Path(path).name


def text_lines(file: Path, what: str = "prompt") -> list[str]:
    """The lines of a text file that are not empty; UserError where there is none, or no text.

    A line ends where the file has a line feed, and nowhere else: a page break inside of a document
    would shift the numbers of all behind it.
    """
    advice = f"name a text file with a {what} a line"
    content = regular.read(file, 64 * regular.MB, UserError, advice)
    try:
        lines = split_lines(content)
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is no text in UTF-8: name one with a {what} a line.") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise UserError(f"'{file}' has no {what}: give at least one line.")
    return found


def prompt_tokens(base: BaseDecoder, prompt: str) -> list[int]:
    """A prompt's tokens with everything that the template puts before an answer.

    Raises UserError for a prompt that is empty or no text.
    """
    check_prompt(prompt)
    return question_tokens(base, (Turn("user", prompt), Turn("assistant", "x")))


def question_tokens(base: BaseDecoder, turns: Sequence[Turn]) -> list[int]:
    """The tokens of a conversation before its first answer."""
    pieces = base.template(turns)
    document = encode(pieces, base.tokenizer, 2**20)
    assert document is not None  # no text is longer
    return [int(t) for t in document.tokens[: int(np.argmax(document.answer))]]


def check_names(folders: Sequence[Path], library: Library | None = None) -> None:
    """UserError where two folders, or one and a member, would have the same name in a library.

    Names are known before anything is read.
    """
    check_free([_named(folder) for folder in folders], library)


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


def base_of(
    folders: Sequence[Path], named: Path | None, template: str | None = None
) -> BaseDecoder:
    """The decoder of all adapters: the one that is named, else what the first run trained on.

    template: with which the library's members are asked; where none is told and the base has none,
    that of the first run. Raises UserError where no base is named and there are PEFT folders only.
    """
    runs = [folder for folder in folders if not is_peft(folder)]
    if named is None and not runs:
        raise UserError("PEFT folders do not hold their base: name its folder by --base.")
    base = open_base(runs[0] if named is None else named)
    if named is None:
        start = _called(read_config(runs[0]).start_from)
        base = base._replace(name=start or base.name)
    told = (data.template for data in map(language_data, runs) if data.name != "corpus")
    return asked_with(base, template or next(told, None))


def check_library_base(library: Library, base: BaseDecoder) -> None:
    """Raise UserError where a decoder is not the library's, or is asked in another way."""
    from moezoo.weights.library_bank import check_base

    check_base(library, base.model, base.name, base.sha256)
    template, tokenizer = library.base.template, library.base.tokenizer
    if tokenizer is not None and identity(base.tokenizer) != tokenizer:
        raise UserError(
            f"The adapters of '{library.folder}' were trained with another tokenizer than that of "
            f"{base.name}: name the base with its own."
        )
    own = _template_name(base.template)
    if template is not None and own != template:
        raise UserError(
            f"The adapters of '{library.folder}' were trained with template {template}, but "
            f"{base.name} is asked with {own or 'the prompt as it is'}: ask it with {template} "
            "(--template)."
        )


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
