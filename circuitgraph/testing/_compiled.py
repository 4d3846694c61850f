"""Compiled models: Tracr programs (Lindner et al. 2023) as transformers whose circuit follows from the program, the data and the ablation.

The weights are data files, made by `scripts/compile_tracr.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._errors import CircuitGraphError, UnknownNameError, unknown_name, whole_number
from circuitgraph._graph import Graph
from circuitgraph._pairs import PromptPairs
from circuitgraph._tensors import read_file
from circuitgraph.testing._outputs import Ablation, OutputEngine
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention, ReferenceLayer, ReferenceMLP
from circuitgraph.testing._structural import structural_graph

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    Tokens = Int[ndarray, "prompts position"]

_FOLDER = Path(__file__).parent / "compiled"
COMPILED = ("frac_prevs", "hist", "reverse", "shuffle_dyck2", "sort")
SEEN = 1e-4
"""How far an output must move to count. Softmax and steep MLPs leave traces of edges that carry nothing; the others move it a lot more."""


@dataclass(frozen=True, eq=False)
class CompiledModel:
    """A program as a model. Token and position embeddings are two writers, `tok` and `pos`; attention looks both ways.

    `alphabet`: what prompts are made of. `vocabulary`: what each token id stands for. `labels`: what each dimension of the stream stands
    for. `outputs`: what each logit stands for, found by label; none where the one output is a number. `longest`: tokens after BOS.

    >>> reverse = compiled_model("reverse")
    >>> reverse.graph
    Graph(10 writers, 17 readers, 94 edges, 11 nodes)
    >>> reverse.run([3, 1, 2])
    [2, 1, 3]
    >>> sorted(reverse.measured("corrupted", length=3))
    ['a3.h0->logits', 'tok->a3.h0<v>']
    """

    model: ReferenceModel
    source: str
    alphabet: tuple[Any, ...]
    vocabulary: tuple[Any, ...]
    labels: tuple[str, ...]
    outputs: tuple[Any, ...]
    longest: int

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def graph(self) -> Graph:
        return self.model.graph()

    def tokens(self, values: Sequence[Any]) -> Int[ndarray, " position"]:
        """Token ids of an input, BOS first. Raises `UnknownNameError` for what is not in the alphabet."""
        self._check_length(len(values))
        if unknown := [value for value in values if value not in self.alphabet]:
            raise UnknownNameError(f"{self.name} knows no {unknown[0]!r}; expected some of {[*self.alphabet]}")
        return np.array([self.vocabulary.index(value) for value in ("BOS", *values)])

    def run(self, values: Sequence[Any]) -> list[Any]:
        """What the program makes of an input, one output per position after BOS."""
        logits = self.model.forward(self.tokens(values)[None])[0, 1:]
        return [self.outputs[best] for best in logits.argmax(axis=1)] if self.outputs else logits[:, 0].tolist()

    def inputs(self, length: int) -> list[tuple[Any, ...]]:
        """All inputs of this length, in the order of `prompts`. Raises `CircuitGraphError` for one the model has no positions for."""
        self._check_length(length)
        return [*itertools.product(self.alphabet, repeat=length)]

    def prompts(self, length: int) -> Tokens:
        """The token ids of all inputs of this length, `[prompts, 1 + length]`."""
        return np.stack([self.tokens(values) for values in self.inputs(length)])

    def pairs(self, length: int) -> PromptPairs:
        """All inputs of this length, each corrupted by another one: the list is turned by a little more than half.

        The answer is the model's own last output. Of a program that puts out a number it is the only logit, and of that no metric of a last
        position tells anything: ask `engine`.
        """
        prompts = self.prompts(length)
        return PromptPairs(prompts, self._turned(prompts), self.model.forward(prompts)[:, -1].argmax(axis=-1))

    def engine(self, ablation: Ablation, length: int, graph: Graph | None = None) -> OutputEngine:
        """Asks about all outputs of all inputs of this length, by the edges of `graph` (default: the whole one).

        Raises `UnknownNameError` for an ablation but "zero" and "corrupted".
        """
        prompts = self.prompts(length)
        return OutputEngine(self.model, self.graph if graph is None else graph, prompts, self._turned(prompts), ablation)

    @cached_property
    def structural_graph(self) -> Graph:
        """The graph without the edges that carry nothing: the outputs are the same, whatever is asked, and there are fewer edges to try."""
        return structural_graph(self.model)

    def structural(self) -> frozenset[str]:
        """The edges whose weights can carry a signal to the logits."""
        return frozenset(edge.name for edge in self.structural_graph.edges)

    def measured(self, ablation: Ablation, length: int) -> frozenset[str]:
        """The structural edges each of which, patched alone, changes an output of some input of this length by more than `SEEN`."""
        engine = self.engine(ablation, length, self.structural_graph)
        return frozenset(edge.name for edge in engine.graph.edges if engine.change_without(edge) > SEEN)

    def _check_length(self, length: int) -> None:
        if whole_number(f"{self.name}: length", length, 1) > self.longest:
            raise CircuitGraphError(f"{self.name}: inputs of length {length}; it was compiled for at most {self.longest}")

    @staticmethod
    def _turned(prompts: Tokens) -> Tokens:
        return np.roll(prompts, 1 + len(prompts) // 2, axis=0)


@cache
def compiled_model(name: str) -> CompiledModel:
    """A compiled program, by a name of `COMPILED`. Raises `UnknownNameError` with the nearest names."""
    if name not in COMPILED:
        raise unknown_name("compiled model", name, COMPILED)
    described = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    weights, _ = read_file(_FOLDER / f"{name}.safetensors")
    rows = [described["labels"].index(label) for label in described["output_labels"]]
    return CompiledModel(
        model=_model(name, weights, np.eye(len(described["labels"]))[rows], is_causal=described["is_causal"]),
        source=described["source"],
        longest=described["longest"],
        **{field: tuple(described[field]) for field in ("alphabet", "vocabulary", "labels", "outputs")},
    )


def _model(name: str, stored: Mapping[str, ndarray], unembedding: Float[ndarray, "outputs d_model"], *, is_causal: bool) -> ReferenceModel:
    weights = {at: values.astype(np.float64) for at, values in stored.items()}

    def layer(at: str) -> ReferenceLayer:
        q, k, v, o = (weights[f"{at}.attention.{part}"] for part in "qkvo")
        attention = ReferenceAttention(q, k, v, o, is_causal=is_causal)
        return ReferenceLayer(attention, ReferenceMLP(weights[f"{at}.mlp.up"], weights[f"{at}.mlp.down"], "relu"))

    n_missing = max(0, len(unembedding) - len(weights["embedding"]))  # `hist` counts further than it has tokens; an answer must be one
    embedding = np.pad(weights["embedding"], ((0, n_missing), (0, 0)))
    layers = tuple(layer(f"layers.{i}") for i in range(sum(at.endswith("mlp.up") for at in weights)))
    return ReferenceModel(embedding, layers, unembedding, weights["positions"], name=name, splits_input=True)
