"""`trace`: from a checkpoint to its description, its engine and the proof that they are the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from circuitgraph._architecture import Architecture
from circuitgraph._engine import Check, Source, SourceKind
from circuitgraph._errors import CircuitGraphError, TraceError, unknown_name
from circuitgraph._graph import Graph
from circuitgraph._linear import LinearPrompt
from circuitgraph._memory import MemoryBudget
from circuitgraph._metrics import Metric, metric_named
from circuitgraph._pairs import PromptPairs, check_vocabulary
from circuitgraph._refinement import Refinement, check_size, joined, refined, refinements_record
from circuitgraph._sites import Sites
from circuitgraph._tensors import tensor
from circuitgraph_jax._batch import Parts
from circuitgraph_jax._build import build
from circuitgraph_jax._describe import describe, embedding_path
from circuitgraph_jax._devices import precisely
from circuitgraph_jax._engine import JaxEngine, check_lengths
from circuitgraph_jax._linear import JaxLinearRun
from circuitgraph_jax._load import Checkpoint, load, with_prefix
from circuitgraph_jax._prove import Proof, checks, prove
from circuitgraph_jax._queries import plain_logits
from circuitgraph_jax._seen import logit_weights, seen_by, width_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from circuitgraph_jax._decoder import Decoder

_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class JaxModel:
    """A traced model in JAX. `proof` says how far it is from the original."""

    name: str
    tokenizer: Any | None
    architecture: Architecture
    proof: Proof
    _parts: Parts
    _weights: Callable[[], str]
    _forward: Callable[[Any], Any] | None
    refinements: tuple[Refinement, ...] = ()

    @property
    def graph(self) -> Graph:
        return self._parts.sites.graph

    @property
    def module(self) -> Decoder:
        """The model as an Equinox module: `module(tokens)` are the logits of one prompt."""
        return self._parts.decoder

    @property
    def provenance(self) -> Mapping[str, Any]:
        import equinox

        return {
            "id": self.name,
            "weights_sha256": self._weights(),
            "dtype": str(self._parts.dtype),
            "device": jax.tree.leaves(self.module)[0].devices().copy().pop().platform,
            "backend": "jax",
            "proved_against": self.proof.original,
            "versions": {"jax": jax.__version__, "equinox": equinox.__version__},
            **refinements_record(self.refinements),
        }

    def bind(self, pairs: PromptPairs, metric: Metric | str, source: Source | SourceKind = "corrupted") -> JaxEngine:
        """An engine for these prompts. Raises `TaskError` when prompts, metric and model do not fit together."""
        wanted = source if isinstance(source, Source) else Source(source)
        return JaxEngine(self._parts, pairs, metric_named(metric), wanted)

    def refined(self, refinements: Sequence[Refinement]) -> JaxModel:
        parts, refinements = self._parts, joined(refinements, self.refinements)
        check_size(parts.sites.graph, refinements, parts.d_model, parts.budget)
        graph = refined(parts.sites.graph, refinements)
        for refinement in refinements:
            refinement.check_width(width_of(parts.decoder, refinement), parts.d_model)
        with precisely(parts.dtype):
            decoder = parts.decoder.refined(refinements, graph.visible)
        cut = replace(parts, decoder=decoder, sites=Sites.of(graph, len(self.architecture.blocks)))
        return replace(self, _parts=cut, refinements=(*self.refinements, *refinements))

    def seen_by(self, refinement: Refinement, pairs: PromptPairs) -> Iterator[Float[ndarray, "position width"]]:
        check_vocabulary(pairs, self.architecture.vocabulary)
        check_lengths(pairs, self._parts)
        return seen_by(self._parts, refinement, pairs)

    def logit_weights(self, refinement: Refinement, features: Sequence[int]) -> Float[ndarray, "features vocabulary"]:
        with precisely(self._parts.dtype):
            weights = np.asarray(logit_weights(self.module, refinement, features), dtype=np.float64)
        return weights - weights.mean(axis=1, keepdims=True)  # type: ignore[no-any-return]

    def linear_run(self, tokens: Sequence[int]) -> JaxLinearRun:
        """This model on one prompt, linear but for its MLPs. Raises `TaskError`, `CircuitGraphError`."""
        prompt = LinearPrompt.of(tokens, self.refinements, self.architecture.vocabulary)
        check_lengths(prompt.pairs, self._parts)
        return JaxLinearRun(self._parts, prompt)

    def logits(self, pairs: PromptPairs) -> Float[ndarray, "prompts vocabulary"]:
        check_vocabulary(pairs, self.architecture.vocabulary)
        check_lengths(pairs, self._parts)
        out = np.empty((len(pairs), self.architecture.vocabulary), dtype=self._parts.wide)
        with precisely(self._parts.dtype):
            for bucket in pairs.buckets():
                out[bucket.index] = self._original(bucket.clean)[:, -1]
        return out

    def checks(self, pairs: PromptPairs) -> Iterator[Check]:
        check_vocabulary(pairs, self.architecture.vocabulary)
        return checks(self._parts, pairs, self._original)

    def _original(self, ids: Any) -> Float[ndarray, "prompts position vocabulary"]:
        return untouched(self._parts, self._forward)(ids)


def trace(
    model: Any,
    *,
    architecture: Architecture | None = None,
    per_head_kv: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    devices: Sequence[jax.Device] | str | None = None,
    tokenizer: Any | None = None,
    memory_budget: int | str = "auto",
) -> JaxModel:
    """Build a model anew as an Equinox module, from its configuration and weights, and prove that it is the original.

    `model`: a Hugging Face id or folder, a GGUF file, a bundled `zoo:` name, a live PyTorch or nnsight model, or, with an `architecture`
    that describes it, an Equinox module or any other pytree of arrays. `dtype`: float32 unless the weights are float64. `devices`: what
    prompts and lanes are shared out to, or a platform such as "gpu"; all of the default platform unless given. `device`: the platform, by
    the name that every backend has for it. `memory_budget`: what its engines may compute with beside the weights, in bytes or as "8GB".
    Raises `TraceError` naming the joint that JAX does not have yet, the tensor that is missing, or how far the logits are off. Warns when
    there is nothing to prove the model against: no PyTorch, and no witness file beside the weights.
    """
    checkpoint = load(model, tokenizer)
    described, tensors = _described(checkpoint, architecture)
    chosen = _dtype(dtype, tensors, described)
    with precisely(chosen):
        decoder = build(described, tensors, per_head_kv=per_head_kv, dtype=chosen)
        where = _devices(device if devices is None else devices)
        budget = MemoryBudget.of(memory_budget, _free(where))
        parts = Parts(Sites.of(described.graph(per_head_kv=per_head_kv), len(described.blocks)), decoder, where, MemoryBudget.unlimited())
        proof = prove(parts, described, checkpoint, untouched(parts, checkpoint.forward))
    parts = replace(parts, budget=budget)
    return JaxModel(checkpoint.name, checkpoint.tokenizer, described, proof, parts, checkpoint.weights, checkpoint.forward)


def untouched(parts: Parts, forward: Callable[[Any], Any] | None) -> Callable[[Any], Float[ndarray, "prompts position vocabulary"]]:
    """The logits without a graph: those of somebody's own model, or of the one that was built."""

    def logits(ids: Any) -> Float[ndarray, "prompts position vocabulary"]:
        if forward is not None:
            return np.stack([np.asarray(forward(row), dtype=parts.wide) for row in np.asarray(ids, np.int32)])
        return np.asarray(plain_logits(parts.decoder, jnp.asarray(ids, jnp.int32)), dtype=parts.wide)

    return logits


def _described(checkpoint: Checkpoint, architecture: Architecture | None) -> tuple[Architecture, Mapping[str, Any]]:
    """The description, and the tensors by the names it uses."""
    tensors, config = checkpoint.tensors, checkpoint.config or {}
    if architecture is None and checkpoint.config is None:
        raise TraceError(
            f"{checkpoint.name} has no configuration that says how it is built; hand over architecture=Architecture(...), whose paths lead "
            f"to its arrays: {', '.join(list(tensors)[:3])} ..."
        )
    if architecture is not None:
        return architecture, with_prefix(tensors, architecture.embedding)
    named = with_prefix(tensors, embedding_path(config))
    if config.get("tie_word_embeddings"):
        named["lm_head.weight"] = tensor(named, f"{embedding_path(config)}.weight")  # whatever the file holds
    return describe(config, {name: value.shape for name, value in named.items()}), named


def _dtype(dtype: str | None, tensors: Mapping[str, Any], architecture: Architecture) -> str:
    if dtype is None:
        return "float64" if tensor(tensors, f"{architecture.embedding}.weight").dtype == np.float64 else "float32"
    if dtype not in _DTYPES:
        raise unknown_name("dtype", dtype, _DTYPES)
    return dtype


def _devices(devices: Sequence[jax.Device] | str | None) -> tuple[jax.Device, ...]:
    if devices is not None and not isinstance(devices, str):
        if not devices:
            raise CircuitGraphError("devices: none given; expected some of jax.devices(), or leave it out")
        return tuple(devices)
    try:
        return tuple(jax.devices(devices))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise CircuitGraphError(f"devices {devices!r} cannot be used here: {reason}; leave it out, or use 'cpu'") from error


def _free(devices: tuple[jax.Device, ...]) -> int | None:
    """Bytes that the devices have left together; None where they do not say, as CPUs do not."""
    known = [stats for device in devices if (stats := device.memory_stats())]
    return sum(stats["bytes_limit"] - stats["bytes_in_use"] for stats in known) if known else None
