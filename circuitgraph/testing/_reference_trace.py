"""`ReferenceTrace`: a reference model as a backend's `trace` returns models, so that everything above a backend runs without one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._architecture import MLP, Architecture, Attention, Block, Norm, Projection
from circuitgraph._engine import Check, Source, SourceKind, check_source
from circuitgraph._graph import Graph
from circuitgraph._linear import LinearPrompt
from circuitgraph._metrics import Metric, check_answers, metric_named
from circuitgraph._pairs import PromptPairs, check_vocabulary
from circuitgraph._refinement import Refinement, joined, refined, refinements_record
from circuitgraph.testing._reference_engine import ReferenceEngine
from circuitgraph.testing._reference_linear import ReferenceLinearRun
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention, ReferenceLayer, ReferenceMLP, ReferenceNorm
from circuitgraph.testing._reference_refined import logit_weights, seen_by, width_of
from circuitgraph.testing._reference_run import Run, masked_run, source_values

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    Tokens = Int[ndarray, "prompts position"]

_TOLERANCE = 1e-10


@dataclass(frozen=True, eq=False)
class ReferenceTrace:
    """A `TracedModel` over a `ReferenceModel`."""

    model: ReferenceModel
    per_head_kv: bool = False
    tokenizer: Any | None = None

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def graph(self) -> Graph:
        return self.model.graph(per_head_kv=self.per_head_kv)

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {
            "id": self.name,
            "weights_sha256": self.model.weights_hash(),
            "dtype": "float64",
            "device": "cpu",
            "backend": "reference",
            "versions": {"numpy": np.__version__},
            **refinements_record(self.model.refinements),
        }

    @property
    def architecture(self) -> Architecture:
        model = self.model
        return Architecture(
            family="reference",
            d_model=model.embedding.shape[1],
            vocabulary=model.vocabulary,
            embedding="embedding",
            blocks=tuple(_block(layer, f"layers.{i}") for i, layer in enumerate(model.layers)),
            final_norm=_norm(model.final_norm, "final_norm"),
            unembedding="unembedding",
            embedding_scale=model.embedding_scale,
            positions=None if model.positions is None else "positions",
            logit_scale=model.logit_scale,
            logit_softcap=model.logit_softcap,
        )

    def bind(self, pairs: PromptPairs, metric: Metric | str, source: Source | SourceKind = "corrupted") -> ReferenceEngine:
        chosen = metric_named(metric)
        check_answers(chosen, pairs.wrong_answers)
        origin = source if isinstance(source, Source) else Source(source)
        for asked in (pairs, origin.data):
            if asked is not None:
                check_vocabulary(asked, self.model.vocabulary)
        check_source(origin, self.graph, self.model.embedding.shape[1])
        return ReferenceEngine(self.model, self.graph, pairs, chosen, origin)

    @property
    def refinements(self) -> tuple[Refinement, ...]:
        return self.model.refinements

    def logit_weights(self, refinement: Refinement, features: Sequence[int]) -> Float[ndarray, "features vocabulary"]:
        return logit_weights(self.model, refinement, features)

    def refined(self, refinements: Sequence[Refinement]) -> ReferenceTrace:
        refinements = joined(refinements, self.refinements)
        refined(self.graph, refinements)  # raises for a component that is not there
        for refinement in refinements:
            refinement.check_width(width_of(self.model, refinement), self.model.embedding.shape[1])
        return replace(self, model=replace(self.model, refinements=(*self.model.refinements, *refinements)))

    def seen_by(self, refinement: Refinement, pairs: PromptPairs) -> Iterator[Float[ndarray, "position width"]]:
        for tokens in (*pairs.clean, *pairs.corrupted):
            yield seen_by(self.model, refinement, tokens[None])[0]

    def linear_run(self, tokens: Sequence[int]) -> ReferenceLinearRun:
        return ReferenceLinearRun(self.model, self.graph, LinearPrompt.of(tokens, self.model.refinements, self.model.vocabulary))

    def logits(self, pairs: PromptPairs) -> Float[ndarray, "prompts vocabulary"]:
        check_vocabulary(pairs, self.model.vocabulary)
        return np.stack([self.model.forward(tokens[None])[0, -1] for tokens in pairs.clean])

    def checks(self, pairs: PromptPairs) -> Iterator[Check]:
        engine, ones = self.bind(pairs, "nll"), np.ones(self.graph.shape)
        both = [(clean[None], corrupted[None]) for clean, corrupted in zip(pairs.clean, pairs.corrupted, strict=True)]
        forward, run = self.model.forward, self._run
        error = _worst((run(*pair, ones).logits, forward(pair[0])[:, -1]) for pair in both)
        yield Check("F(1) is the model", "largest logit difference, relative", error, _TOLERANCE)
        error = _worst((run(*pair, 0 * ones).logits, forward(pair[1])[:, -1]) for pair in both)
        yield Check("F(0) is the source run", "largest logit difference, relative", error, _TOLERANCE)
        plain = [(run(*pair, ones), self.model.stream(pair[0])) for pair in both]
        heard = self.graph.visible[-1]
        error = _worst((found.values[:, heard].sum(1) + found.constant, stream) for found, stream in plain)
        yield Check("readers are the sum of their writers", "largest difference, relative", error, _TOLERANCE)
        error = _worst(part for pair in both[:4] for part in self._padded(pair))
        yield Check("padding changes nothing", "largest difference of what a writer says, relative", error, _TOLERANCE)
        dead = [reader.name for r, reader in enumerate(self.graph.readers) if _moves_nothing(engine, r)]
        what = f"of {len(self.graph.readers)} readers, those whose patch moves no prompt ({', '.join(dead[:8]) or 'none'})"
        yield Check("readers move the output", what, float(len(dead)), float(len(self.graph.readers) - 1))

    def _run(self, clean: Tokens, corrupted: Tokens, mask: Float[ndarray, "readers writers"]) -> Run:
        pair = PromptPairs(clean, corrupted, [0])
        source = source_values(self.model, self.graph, pair, Source("corrupted"))
        return masked_run(self.model, self.graph, self.model.inputs(clean), mask[None], source[0][None])

    def _padded(self, pair: tuple[Tokens, Tokens]) -> Iterator[tuple[Any, Any]]:
        """What writers say at a prompt's positions with tokens behind it, and without; nothing where the model has no more positions."""
        length, positions = pair[0].shape[1], self.model.positions
        n_pads = 3 if positions is None else min(3, len(positions) - length)
        if n_pads > 0:
            mask = np.random.default_rng(0).uniform(size=self.graph.shape)
            clean, corrupted = (np.pad(ids, ((0, 0), (0, n_pads))) for ids in pair)
            yield self._run(clean, corrupted, mask).values[:, :, :length], self._run(*pair, mask).values


def _worst(pairs: Iterable[tuple[Any, Any]]) -> float:
    """The largest difference of two arrays over the largest value of the second; NaN if there is one."""
    return float(np.max([0.0, *(np.abs(got - expected).max() / np.abs(expected).max() for got, expected in pairs)]))


def _moves_nothing(engine: ReferenceEngine, reader: int) -> bool:
    masks = np.ones((2, *engine.graph.shape))
    masks[1, reader] = 0
    whole, patched = engine.evaluate(masks)
    return bool(np.array_equal(whole, patched))


def _block(layer: ReferenceLayer, path: str) -> Block:
    return Block(
        path=path,
        attention=None if layer.attention is None else _attention(layer.attention, f"{path}.attention"),
        mlp=None if layer.mlp is None else _mlp(layer.mlp, f"{path}.mlp"),
        parallel=layer.is_parallel,
    )


def _attention(attention: ReferenceAttention, path: str) -> Attention:
    return Attention(
        path=path,
        q=_projection(attention.q, f"{path}.q"),
        k=_projection(attention.k, f"{path}.k"),
        v=_projection(attention.v, f"{path}.v"),
        o=f"{path}.o",
        norm=_norm(attention.norm, f"{path}_norm"),
        post_norm=_norm(attention.post_norm, f"{path}_post_norm"),
        scale=attention.scale,
    )


def _mlp(mlp: ReferenceMLP, path: str) -> MLP:
    return MLP(
        modules=(path,),
        norm=_norm(mlp.norm, f"{path}_norm"),
        post_norm=_norm(mlp.post_norm, f"{path}_post_norm"),
        scale=mlp.scale,
    )


def _norm(norm: ReferenceNorm | None, path: str) -> Norm | None:
    return None if norm is None else Norm(path, norm.kind, norm.eps)


def _projection(weight: Float[ndarray, "heads d_head d_model"], path: str) -> Projection:
    heads, d_head, _ = weight.shape
    return Projection(path, d_head, tuple(h * d_head for h in range(heads)))
