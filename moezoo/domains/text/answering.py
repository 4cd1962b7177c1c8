"""Ways to answer with a library of adapters: the same weights always, a prompt's, a token's.

Each is built of a base and a library (`library_routes` has their names). It answers prompts, says
as which one decoder it can be asked, if any, and, where nothing depends on the prompt, is that
decoder with one plain update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.backbones.generate import Settings, generate, padded
from moezoo.domains.text.data.encode import ends
from moezoo.domains.text.gradients import gradient_features
from moezoo.domains.text.inference import MadeAnswer, Speaker, answer_of, answered, tokens_of
from moezoo.domains.text.library import BaseDecoder, copied, embeddings
from moezoo.errors import UserError, unknown
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.ops.prototypes import (
    boosted_softmax,
    chosen_and_universal,
    cosine,
    standardised_softmax,
    svd_prototype,
)
from moezoo.weights import library_bank
from moezoo.weights.library import Library
from moezoo.weights.library_bank import check_combination
from moezoo.weights.working_set import WorkingSet

TASK = "task:"
COLDEST, HOTTEST = 1e-6, 1e6  # beyond these a softmax over cosines is one of them, or the same


@dataclass(frozen=True)
class RouteOptions:
    """How a route mixes adapters; one that it does not read is refused (`RouteKind`).

    Raises UserError for values without a meaning.
    """

    combination: str | None = field(default=None, metadata={"word": "--combine"})
    """outputs, factors or downs (`weights.library_bank`); None: what the route's paper has."""
    best: int | None = field(default=None, metadata={"word": "--top-k"})
    """arrow, mbc, phatgoose: adapters per token; None: 4, of phatgoose 2, or all where the library
    has fewer."""
    temperature: float = 0.05
    """mocle: of the softmax over cosines."""
    every: int = 2
    """tle: tokens that are made before the weights are made anew."""

    def __post_init__(self) -> None:
        if self.combination is not None:
            check_combination(self.combination)
        if self.best is not None and self.best < 1:
            raise UserError(f"--top-k is {self.best}; at least one adapter must answer.")
        if not COLDEST <= self.temperature <= HOTTEST:
            raise UserError(
                f"temperature is {self.temperature}; that of route mocle must lie between "
                f"{COLDEST:g} and {HOTTEST:g}."
            )
        if self.every < 1:
            raise UserError(f"every is {self.every}; route tle makes at least one token at a time.")


class LibraryRoute:
    """A way to answer; kinds fill in `answered`.

    usual: the combination where none is asked for.   weights_of: what decides the weights.
    constant: whether they are the same for every text, so that one plain update is the route.
    """

    usual: ClassVar[str] = "outputs"
    weights_of: ClassVar[str] = "all prompts"
    constant: ClassVar[bool] = False

    def __init__(self, base: BaseDecoder, library: Library, options: RouteOptions):
        self.base, self.library, self.options = base, library, options
        self.combination = options.combination or self.usual
        self.names = library.names

    def answers(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[str]:
        """The texts of what `answered` gives."""
        return [answer.text for answer in self.answered(prompts, settings, seed, tasks)]

    def answered(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[MadeAnswer]:
        """What is answered to each prompt; tasks: of the prompts, one each, for `oracle`."""
        raise NotImplementedError

    def model(self) -> Any:
        """The base with one plain update per layer; UserError where weights are not constant."""
        raise nothing_to_write("This route")

    def asked(self, prompts: Sequence[str], tasks: Sequence[str] = ()) -> Speaker:
        """The decoder with all adapters as a bank, told what decides for these prompts.

        Raises UserError where it is no single decoder.
        """
        raise UserError(
            "This route adds up what several decoders answer, which no single one does: a static "
            f"path is one adapter, {TASK}NAME."
        )

    def moved(
        self, prompts: Sequence[str], answers: Sequence[MadeAnswer], settings: Settings
    ) -> np.ndarray | None:
        """The weights [N, E] of every text so far while these answers were made; None where those
        of a prompt stay as `asked` has them."""
        return None

    def credited(self, answers: Sequence[MadeAnswer], weights_BE: np.ndarray) -> list[MadeAnswer]:
        """The answers, each with the members whose weights for its prompt are not 0."""
        found = []
        for answer, weights_E in zip(answers, weights_BE, strict=True):
            order = np.argsort(-weights_E, kind="stable")
            by = tuple((self.names[e], float(weights_E[e])) for e in order if weights_E[e])
            found.append(answer._replace(by=by))
        return found

    @property
    def labels(self) -> tuple[str, ...]:
        """What the adapters of the bank are called, in their order."""
        return self.names

    @property
    def unweighed(self) -> bool:
        """Whether adapters of weight 0 count even so."""
        return self.combination in library_bank.UNWEIGHED

    def speaker(self, model: Any) -> Speaker:
        """A decoder that is asked as the base is."""
        stop = self.base.stop or ends(self.base.template, self.base.tokenizer)
        return Speaker(module.split(model), self.base.tokenizer, self.base.template, stop)

    def shares(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """How alike each prompt's embedding is to each member's, [B, E] cosines."""
        held_ED = np.stack([self.library.embedding(name) for name in self.names])
        return np.asarray(cosine(jnp.asarray(embeddings(self.base, rows)), jnp.asarray(held_ED)))


class StaticRoute(LibraryRoute):
    """The same weights for every prompt; members that are not named take no part.

    Raises UserError for weights that are not finite, of nobody, or of no member.
    """

    constant: ClassVar[bool] = True

    def __init__(
        self,
        base: BaseDecoder,
        library: Library,
        options: RouteOptions,
        weights: Mapping[str, float],
    ):
        super().__init__(base, library, options)
        self.weights, self.names = dict(weights), tuple(weights)
        if not weights:
            raise UserError("No adapter has a weight: give at least one.")
        for name, weight in weights.items():
            if name not in library.members:
                raise unknown(f"member of the library {library.folder}", name, [*library.names])
            if not math.isfinite(weight):
                raise UserError(f"The weight of adapter {name} is {weight}: give a finite number.")

    def model(self) -> Any:
        """The base with one plain update per layer: nothing is routed any more."""
        model = copied(self.base.model)
        library_bank.attach_merged(model, self.library, self.weights, self.combination)
        return model

    def asked(self, prompts: Sequence[str], tasks: Sequence[str] = ()) -> Speaker:
        model = copied(self.base.model)
        make = library_bank.shares_routers(self.names)
        # Of those with a weight alone: downs adds the second factors of all in a bank.
        library_bank.attach_bank(model, self.library, self.names, make, self.combination)
        shares_BE = np.tile(np.array([*self.weights.values()], np.float32), (len(prompts), 1))
        told = Context(attributes_RA=jnp.asarray(shares_BE))
        return self.speaker(model)._replace(context=told)

    def answered(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[MadeAnswer]:
        return answered(self.speaker(self.model()), prompts, settings, seed)


class RowRoute(LibraryRoute):
    """Weights of each prompt, from its tokens or its task by `gates`."""

    weights_of: ClassVar[str] = "each prompt"

    def __init__(
        self,
        base: BaseDecoder,
        library: Library,
        options: RouteOptions,
        gates: Callable[[RowRoute, Sequence[Sequence[int]], Sequence[str]], np.ndarray],
    ):
        super().__init__(base, library, options)
        self.gates = gates
        model = copied(base.model)
        make = library_bank.shares_routers(self.names)
        library_bank.attach_bank(model, library, self.names, make, self.combination)
        self._speaker = self.speaker(model)

    def asked(self, prompts: Sequence[str], tasks: Sequence[str] = ()) -> Speaker:
        rows = [tokens_of(self._speaker, prompt) for prompt in prompts]
        told = Context(attributes_RA=jnp.asarray(self.gates(self, rows, tasks), jnp.float32))
        return self._speaker._replace(context=told)

    def answered(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[MadeAnswer]:
        asked = self.asked(prompts, tasks)
        weights_BE = np.asarray(asked.context.attributes_RA)
        return self.credited(answered(asked, prompts, settings, seed), weights_BE)


class RunningRoute(RowRoute):
    """Token-level adaptation: `gates` of the text so far, before every few tokens.

    The whole text is read again with the new weights, as the published loop does.
    """

    usual: ClassVar[str] = "downs"
    weights_of: ClassVar[str] = "the text so far"

    def answered(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[MadeAnswer]:
        speaker, every = self._speaker, self.options.every
        rows = [tokens_of(speaker, prompt) for prompt in prompts]
        starts, length = [len(row) for row in rows], max(map(len, rows)) + settings.new
        told = replace(settings, new=every, stop=speaker.stop, pad=speaker.tokenizer.pad)
        ended = np.zeros(len(rows), bool)
        for turn in range(-(-settings.new // every)):
            if ended.all():
                break
            gates_BE = jnp.asarray(self.gates(self, rows, tasks), jnp.float32)
            tokens_BT, mask_BT = padded(rows, told.pad, "left", length)
            made = generate(
                speaker.parts, tokens_BT, told, mask_BT=mask_BT,
                key=jax.random.fold_in(jax.random.key(seed), turn),
                context=Context(attributes_RA=gates_BE),
            )  # fmt: skip
            counts = np.where(ended, 0, np.asarray(made.lengths_B))
            for row, tokens, count in zip(rows, np.asarray(made.tokens_BT), counts, strict=True):
                row += [int(t) for t in tokens[:count]]
            ended |= np.array([row[-1] in speaker.stop for row in rows])
        ends_at = [start + settings.new for start in starts]
        return [
            answer_of(speaker, row[start:end])
            for row, start, end in zip(rows, starts, ends_at, strict=True)
        ]

    def moved(
        self, prompts: Sequence[str], answers: Sequence[MadeAnswer], settings: Settings
    ) -> np.ndarray:
        texts = []
        for prompt, answer in zip(prompts, answers, strict=True):
            start = tokens_of(self._speaker, prompt)
            made = min(len(answer.tokens) + 1, settings.new)  # the end token, too
            texts += [[*start, *answer.tokens[:k]] for k in range(0, made, self.options.every)]
        return self.gates(self, texts, ())


class TokenRoute(LibraryRoute):
    """Arrow: every token of every layer among prototypes; `groups`: over means of such members.

    Published code mixes factors, PEFT's sums outputs; PEFT's is the default, since it keeps every
    member what it was trained to be. most: adapters per token where no number is asked for.
    """

    weights_of: ClassVar[str] = "each token in each layer"
    most: ClassVar[int] = 4
    routers: ClassVar[Any] = staticmethod(library_bank.prototype_routers)

    def __init__(
        self,
        base: BaseDecoder,
        library: Library,
        options: RouteOptions,
        groups: Sequence[Sequence[str]] = (),
    ):
        super().__init__(base, library, options)
        model, combination, self.groups = copied(base.model), self.combination, groups
        best = min(options.best or self.most, len(groups) or len(self.names))
        if groups:
            _attach_groups(model, library, groups, best, combination)
        else:
            make = self.routers(library, self.names, best)
            library_bank.attach_bank(model, library, self.names, make, combination)
        self._speaker = self.speaker(model)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(" + ".join(group) for group in self.groups) or self.names

    def asked(self, prompts: Sequence[str], tasks: Sequence[str] = ()) -> Speaker:
        return self._speaker

    def answered(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[MadeAnswer]:
        return answered(self._speaker, prompts, settings, seed)


class GateRoute(TokenRoute):
    """PHATGOOSE: every token of every layer among the members' trained gates."""

    most: ClassVar[int] = 2
    routers: ClassVar[Any] = staticmethod(library_bank.gate_routers)


class EnsembleRoute(LibraryRoute):
    """ELREA: logits of the base + sum over members of w times theirs, of every token.

    w = softmax of the cosines between the prompt's gradient and the members', less their mean and
    over their deviation. Costs a forward pass for each member. What is mixed are answers, so there
    is no combination of adapters to choose.
    """

    def __init__(self, base: BaseDecoder, library: Library, options: RouteOptions):
        super().__init__(base, library, options)
        self.held_EM = np.stack([library.gradient(name) for name in self.names])
        model = copied(base.model)
        self.working = WorkingSet(model, library, resident=len(self.names))
        self._speaker = self.speaker(model)

    def weights(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Each member's weight for each prompt, [B, E], sums 1."""
        told = (self.base.model, self.library.layers, rows, self.base.tokenizer.pad)
        own_BM = jnp.asarray(gradient_features(*told))
        return np.asarray(standardised_softmax(cosine(own_BM, jnp.asarray(self.held_EM))))

    def answered(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[MadeAnswer]:
        weights_BE = self.weights([tokens_of(self._speaker, prompt) for prompt in prompts])
        shares_BM = np.concatenate([np.ones((len(prompts), 1)), weights_BE], axis=1)
        slots = self.working.slots([None, *self.names])  # the base is a member, too
        told = Context(jnp.tile(slots, len(prompts)))
        asked = self._speaker._replace(
            parts=self.working.parts, context=told, shares_BM=shares_BM.astype(np.float32)
        )
        return self.credited(answered(asked, prompts, settings, seed), weights_BE)


def _attach_groups(
    model: Any, library: Library, groups: Sequence[Sequence[str]], best: int, combination: str
) -> None:
    """A bank of groups' mean factors, each with the prototype of that mean."""
    means = [
        library_bank.mean_factors([library.factors(name) for name in group]) for group in groups
    ]
    held = [
        {
            p: np.asarray(svd_prototype(jnp.asarray(f.down), jnp.asarray(f.up))[0])
            for p, f in mean.items()
        }
        for mean in means
    ]
    library_bank.attach_factors(
        model, library.layers, means, library_bank.routers_by(held, best), combination
    )


def nearest(route: RowRoute, rows: Sequence[Sequence[int]], tasks: Sequence[str]) -> np.ndarray:
    """All weight on the member whose embedding is nearest; evenly where none is nearer."""
    likeness_BE = route.shares(rows)
    return _first(likeness_BE, np.eye(likeness_BE.shape[1])[likeness_BE.argmax(1)])


def nearest_and_all(
    route: RowRoute, rows: Sequence[Sequence[int]], tasks: Sequence[str]
) -> np.ndarray:
    """MoCLE of a library: p on the nearest member, 1 - p on the mean of all."""
    likeness_BE = route.shares(rows)
    probs_BE = jax.nn.softmax(jnp.asarray(likeness_BE) / route.options.temperature, axis=-1)
    best_BE, universal_B1 = chosen_and_universal(probs_BE)
    return _first(likeness_BE, np.asarray(best_BE + universal_B1 / likeness_BE.shape[1]))


def boosted(route: RowRoute, rows: Sequence[Sequence[int]], tasks: Sequence[str]) -> np.ndarray:
    """Token-level adaptation's weights of texts so far."""
    likeness_BE = route.shares(rows)
    return _first(likeness_BE, np.asarray(boosted_softmax(jnp.asarray(likeness_BE))))


def _first(likeness_BE: np.ndarray, gates_BE: np.ndarray) -> np.ndarray:
    """The gates, and even ones for a prompt that is as like to every member as to any other."""
    same_B1 = np.ptp(likeness_BE, axis=1, keepdims=True) == 0
    return np.where(same_B1, 1.0 / likeness_BE.shape[1], gates_BE)


def check_count(prompts: int, tasks: Sequence[str]) -> None:
    if len(tasks) != prompts:
        raise UserError(
            f"The oracle is told the task of every prompt: {prompts} prompts need as many tasks, "
            f"not {len(tasks)}."
        )


def told(route: RowRoute, rows: Sequence[Sequence[int]], tasks: Sequence[str]) -> np.ndarray:
    """Evenly on the members of each prompt's own task."""
    check_count(len(rows), tasks)
    gates_BE = np.zeros((len(rows), len(route.names)))
    for gates_E, task in zip(gates_BE, tasks, strict=True):
        for name in (members := route.library.of_task(task)):
            gates_E[route.names.index(name)] = 1 / len(members)
    return gates_BE


def nothing_to_write(who: str) -> UserError:
    return UserError(
        f"{who} mixes adapters anew for every prompt or token, so there is no single one to write: "
        f"take uniform or {TASK}NAME."
    )
