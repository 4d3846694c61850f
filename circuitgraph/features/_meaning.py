"""What a feature means: where it is active, which tokens it speaks for, what somebody called it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circuitgraph._dictionary import Neurons
from circuitgraph._engine import TracedModel
from circuitgraph._errors import CircuitGraphError, FileError, unknown_name, whole_number
from circuitgraph._names import Writer
from circuitgraph._pairs import PromptPairs
from circuitgraph._refinement import Refinement
from circuitgraph._tokens import Encoder
from circuitgraph.evaluation._question import pose
from circuitgraph.files import write_bytes
from circuitgraph.files._atomic import read_bytes

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from circuitgraph._task import Task


@dataclass(frozen=True)
class Example:
    """A prompt and how active a feature is at each of its tokens."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def peak(self) -> float:
        return max(self.activations)

    def __str__(self) -> str:
        """With the tokens at which it is active in brackets, and the largest activation."""
        shown = [f"[{token}]" if value > self.peak / 2 > 0 else token for token, value in zip(self.tokens, self.activations, strict=True)]
        return f"{''.join(shown)}  ({self.peak:.3g})"


@dataclass(frozen=True)
class FeatureCard:
    """What is known of a feature.

    `frequency`: the share of tokens at which it is active. `examples`: the prompts of its largest activations, each once. `promotes`,
    `suppresses`: tokens with the largest and the smallest logit weight, the direct effect on the vocabulary of what the feature says at
    activation 1, with the final norm's scale taken as 1, less the mean over the vocabulary.
    """

    name: str
    frequency: float
    examples: tuple[Example, ...]
    promotes: tuple[tuple[str, float], ...]
    suppresses: tuple[tuple[str, float], ...]
    label: str = ""

    def __str__(self) -> str:
        def listed(tokens: Sequence[tuple[str, float]]) -> str:
            return ", ".join(f"{token} {weight:+.2g}" for token, weight in tokens)

        lines = [f"{self.name}{f': {self.label}' if self.label else ''} (active at {self.frequency:.1%} of the tokens)"]
        lines += [f"  promotes {listed(self.promotes)}", f"  suppresses {listed(self.suppresses)}"]
        return "\n".join([*lines, *(f"  {example}" for example in self.examples)])


def feature_cards(
    model: TracedModel,
    task: Task | PromptPairs | str | Path,
    names: Sequence[str] | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    examples: int = 5,
    tokens: int = 8,
    prompts: int | None = None,
    seed: int = 0,
) -> tuple[FeatureCard, ...]:
    """A card for each of these features of a refined model (default: all that are nodes), on a task's prompts, clean and corrupted ones.

    `labels`: by name, your own or those of `read_labels`. `examples`, `tokens`: how many prompts and tokens of each kind a card has.
    A feature of a cross-layer transcoder has one card, `m3.f12`, whose tokens are those that it promotes at all MLPs together.
    Raises `UnknownNameError` for a name that is no feature of the model, `CircuitGraphError` for a model that is not refined.
    """
    whole_number("feature cards: examples", examples, 0)
    whole_number("feature cards: tokens", tokens, 0)
    if not model.refinements:
        raise CircuitGraphError(f"{model.name} is not refined, so it has no features; see refine")
    question = pose(model, task, prompts=prompts, seed=seed)
    known = [writer for writer in model.graph.writers if writer.kind in ("feature", "neuron") and writer.origin < 0]
    wanted = [_named(name, known) for name in names] if names is not None else known
    cards: dict[Writer, FeatureCard] = {}
    for refinement in model.refinements:
        own = [writer for writer in wanted if writer.component == refinement.component]
        if own:
            cards.update(zip(own, _Cards(model, refinement, question.pairs, labels or {}, examples, tokens).of(own), strict=True))
    return tuple(cards[writer] for writer in wanted)


def _named(name: str, known: Sequence[Writer]) -> Writer:
    found = next((writer for writer in known if writer.name == name), None)
    if found is None:
        raise unknown_name("feature", name, [writer.name for writer in known])
    return found


@dataclass(frozen=True, eq=False)
class _Cards:
    """The cards of one component's features."""

    model: TracedModel
    refinement: Refinement
    pairs: PromptPairs
    labels: Mapping[str, str]
    n_examples: int
    n_tokens: int

    def of(self, writers: Sequence[Writer]) -> list[FeatureCard]:
        numbers = [writer.index for writer in writers]
        activations = [self._activations(x, numbers) for x in self.model.seen_by(self.refinement, self.pairs)]
        active = np.mean(np.concatenate(activations) > 0, axis=0)
        weights = self.model.logit_weights(self.refinement, numbers)
        return [
            FeatureCard(
                writer.name,
                float(active[i]),
                self._examples([values[:, i] for values in activations]),
                self._tokens(weights[i], -1),
                self._tokens(weights[i], 1),
                self.labels.get(writer.name, ""),
            )
            for i, writer in enumerate(writers)
        ]

    def _activations(self, x: Float[ndarray, "position width"], numbers: list[int]) -> Float[ndarray, "position some"]:
        dictionary = self.refinement.dictionary
        f: Float[ndarray, "position some"] = x[:, numbers] if isinstance(dictionary, Neurons) else dictionary.encode(x, numbers)
        return f

    def _examples(self, activations: Sequence[Float[ndarray, " position"]]) -> tuple[Example, ...]:
        """The prompts in which it is most active, the same tokens only once."""
        encoder, found = Encoder(self.model.tokenizer), dict[tuple[int, ...], Example]()
        rows = [*self.pairs.clean, *self.pairs.corrupted]
        for i in np.argsort([-values.max() for values in activations], kind="stable"):
            if len(found) == self.n_examples or activations[i].max() <= 0:
                break
            ids = tuple(int(token) for token in rows[i])
            found.setdefault(ids, Example(_spaced(encoder.tokens(ids)), tuple(activations[i].tolist())))
        return tuple(found.values())

    def _tokens(self, weights: Float[ndarray, " vocabulary"], sign: int) -> tuple[tuple[str, float], ...]:
        chosen = np.argsort(sign * weights, kind="stable")[: self.n_tokens]
        names = Encoder(self.model.tokenizer).tokens(chosen.tolist())
        return tuple((name, float(weights[token])) for name, token in zip(names, chosen, strict=True))


def _spaced(tokens: Sequence[str]) -> tuple[str, ...]:
    """As they are read in a row: without quotes, and with a space before each where they are words or numbers that have none."""
    plain = [token[1:-1] if token[:1] in ("'", '"') else token for token in tokens]
    return tuple(plain) if any(token[:1].isspace() for token in plain) else tuple(f" {token}" for token in plain)


def read_labels(path: str | Path, component: str | None = None) -> dict[str, str]:
    """Labels by a feature's name, from JSON: an object `{"m3.f12": "plural nouns"}`, or an export of Neuronpedia, a list of objects with an
    `index` and a `description`, whose features are those of `component`, such as "m3". Raises `FileError`."""
    path = Path(path)
    try:
        data = json.loads(read_bytes(path, "labels"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not JSON: {error}") from error
    if isinstance(data, dict) and all(isinstance(label, str) for label in data.values()):
        return dict(data)
    if not isinstance(data, list) or not all(isinstance(one, dict) and {"index", "description"} <= set(one) for one in data):
        raise FileError(f"{path}: expected an object of labels by name, or Neuronpedia's list of objects with index and description")
    if component is None:
        raise FileError(f"{path} is an export of Neuronpedia, which does not say what we call the component; give component, such as 'm3'")
    return {f"{component}.f{int(one['index'])}": str(one["description"]).strip() for one in data}


def save_cards(cards: Sequence[FeatureCard], path: str | Path, *, title: str = "Features") -> Path:
    """A page of HTML, with no script and nothing to load: tokens the darker the more active the feature is. Raises `FileError`."""
    body = "\n".join(_section(card) for card in cards)
    page = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n'
    return write_bytes(path, f"{page}<h1>{html.escape(title)}</h1>\n{body}\n</html>\n".encode())


def _section(card: FeatureCard) -> str:
    def tokens(kind: str, found: Sequence[tuple[str, float]]) -> str:
        listed = " ".join(f'<code title="{weight:+.3g}">{html.escape(token)}</code>' for token, weight in found)
        return f"<p>{kind} {listed}</p>"

    examples = "\n".join(f"<p>{_highlighted(example)}</p>" for example in card.examples)
    head = f"<h2 id={html.escape(card.name)!r}>{html.escape(card.name)} <small>{html.escape(card.label)}</small></h2>"
    rest = f"<p>active at {card.frequency:.1%} of the tokens</p>{tokens('promotes', card.promotes)}{tokens('suppresses', card.suppresses)}"
    return f"<section>{head}{rest}{examples}</section>"


def _highlighted(example: Example) -> str:
    def token(text: str, value: float) -> str:
        share = max(value, 0) / example.peak if example.peak > 0 else 0
        return f'<span title="{value:.3g}" style="background:rgba(230,159,0,{share:.2f})">{html.escape(text)}</span>'

    return "".join(token(text, value) for text, value in zip(example.tokens, example.activations, strict=True))


_STYLE = (
    "body{font:15px sans-serif;max-width:60em;margin:2em auto;color:#1F2430}small{color:#8A90A0}code{background:#F3F4F7;padding:0 .2em}"
)
