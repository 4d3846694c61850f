"""`ReferenceTrace`: a reference model as a backend's `trace` returns models, so that everything above a backend runs without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._architecture import MLP, Architecture, Attention, Block, Norm, Projection
from circuitgraph._engine import Check, Source, SourceKind
from circuitgraph._graph import Graph
from circuitgraph._metrics import Metric, check_answers, metric_named
from circuitgraph._pairs import PromptPairs, check_vocabulary
from circuitgraph.testing._reference_engine import ReferenceEngine, masked_run, source_values
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention, ReferenceLayer, ReferenceMLP, ReferenceNorm

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class ReferenceTrace:
    """A `TracedModel` over a `ReferenceModel`."""

    model: ReferenceModel
    per_head_kv: bool = False

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def graph(self) -> Graph:
        return self.model.graph(per_head_kv=self.per_head_kv)

    @property
    def tokenizer(self) -> None:
        return None

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {"model": self.name, "weights_sha256": self.model.weights_hash(), "dtype": "float64", "backend": "reference"}

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
        return ReferenceEngine(self.model, self.graph, pairs, chosen, origin)

    def logits(self, pairs: PromptPairs) -> Float[ndarray, "prompts vocabulary"]:
        return np.stack([self.model.forward(tokens[None])[0, -1] for tokens in pairs.clean])

    def checks(self, pairs: PromptPairs) -> Iterator[Check]:
        yield self._check("F(1)", "the model's logits differ by at most", pairs, np.ones(self.graph.shape), self.logits(pairs))
        corrupted = np.stack([self.model.forward(tokens[None])[0, -1] for tokens in pairs.corrupted])
        yield self._check("F(0)", "the corrupted run's logits differ by at most", pairs, np.zeros(self.graph.shape), corrupted)

    def _check(self, name: str, what: str, pairs: PromptPairs, mask: Float[ndarray, "readers writers"], expected: Any) -> Check:
        source = source_values(self.model, self.graph, pairs, Source("corrupted"))
        logits = [
            masked_run(self.model, self.graph, self.model.embed(tokens[None]), mask, source[i][None]).logits
            for i, tokens in enumerate(pairs.clean)
        ]
        error = np.abs(np.concatenate([row for row in logits if row is not None]) - expected).max()
        return Check(name, what, float(error), float(1e-10 * np.abs(expected).max()))


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
        norm=_norm(attention.norm, f"{path}.norm"),
        post_norm=_norm(attention.post_norm, f"{path}.post_norm"),
        scale=attention.scale,
    )


def _mlp(mlp: ReferenceMLP, path: str) -> MLP:
    return MLP(
        modules=(path,),
        norm=_norm(mlp.norm, f"{path}.norm"),
        post_norm=_norm(mlp.post_norm, f"{path}.post_norm"),
        scale=mlp.scale,
    )


def _norm(norm: ReferenceNorm | None, path: str) -> Norm | None:
    return None if norm is None else Norm(path, norm.kind, norm.eps)


def _projection(weight: Float[ndarray, "heads d_head d_model"], path: str) -> Projection:
    heads, d_head, _ = weight.shape
    return Projection(path, d_head, tuple(h * d_head for h in range(heads)))
