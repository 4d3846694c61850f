"""JAX against PyTorch: tiny random models of every family, random masks and prompts, every metric and every source.

`test_differential.py` asks both, and the numpy reference, with every metric and source on GPT-2 and Llama. Compiling is what costs here, so
examples of one model share their shapes: the prompts of most tests are as many and as long as those that a trace proves itself on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, Literal

import families
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lifted import lifted

import circuitgraph_jax
import circuitgraph_torch
from circuitgraph._engine import Algorithm, Engine, Source, SourceKind
from circuitgraph._graph import Graph
from circuitgraph._pairs import PromptPairs
from circuitgraph.algorithms import ACDC, EAP, ActivationPatching
from circuitgraph.testing import ReferenceValues, random_pairs

Dtype = Literal["float32", "float64"]
FAMILIES = [name for name in families.FAMILIES if name not in ("bloom", "mixtral", "qwen3_moe")]
TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "float64": 1e-8}  # of the largest value; a probability may be a small part of its logits
LEAST = 1e-6  # below, a metric is what cancellation leaves over: here, Gemma's KL under zero ablation is 3e-9, from logits of order 1
SHAPE = (12, 12)  # the lengths of a proof's prompts
MIXED = (6, 3, 6, 3, 6)  # several lengths, in no order; of one as many prompts as are run together, of the other fewer
MASKS = ("float", "binary", "sparse", "out of range", "from a late layer on")
seeds = st.integers(0, 2**16)
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # a seed does not get simpler by shrinking


@dataclass(frozen=True)
class Pair:
    """The same thing on both."""

    torch: Any
    jax: Any

    def bind(self, pairs: PromptPairs, metric: str = "logit_diff", source: Source | SourceKind = "corrupted") -> Pair:
        return Pair(self.torch.bind(pairs, metric, source), self.jax.bind(pairs, metric, source))

    def reversed(self) -> Pair:
        return Pair(self.torch.reversed(), self.jax.reversed())

    @property
    def graph(self) -> Graph:
        assert self.torch.graph == self.jax.graph
        return self.jax.graph  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[Engine]:
        return iter((self.torch, self.jax))


def precision(dtype: Dtype) -> AbstractContextManager[None]:
    return lifted() if dtype == "float64" else nullcontext()


@cache
def traced(family: str, dtype: Dtype = "float32", per_head_kv: bool = False) -> Pair:
    """To be called with `precision(dtype)`."""
    model = families.tiny(family, seed=FAMILIES.index(family), dtype=getattr(torch, dtype))
    both = (backend.trace(model, per_head_kv=per_head_kv) for backend in (circuitgraph_torch, circuitgraph_jax))
    return Pair(*both)


def pairs_of(seed: int, lengths: tuple[int, ...] = SHAPE) -> PromptPairs:
    return random_pairs(seed, lengths=lengths, vocabulary=families.VOCABULARY)


def mask_of(kind: str, seed: int, graph: Graph) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=graph.shape)
    if kind == "binary":
        return (mask < 0.5).astype(float)
    if kind == "sparse":
        return (mask < rng.choice([0.03, 0.97])).astype(float)
    if kind == "from a late layer on":
        mask[: rng.integers(graph.shape[0])] = 1
        return mask
    return 3 * mask - 1 if kind == "out of range" else mask


def agree(got: Any, expected: Any, dtype: Dtype = "float32") -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert np.isfinite(expected).all()
    error = np.abs(got - expected).max() / max(np.abs(expected).max(), LEAST)
    assert error <= TOLERANCE[dtype], f"off by {error:.1e} of the largest value"


def agree_on_values(both: Pair, mask: np.ndarray | None, dtype: Dtype = "float32", **options: Any) -> None:
    expected, got = (engine.activations(mask, **options) for engine in both)
    assert len(got) == len(expected)
    for prompt in range(len(expected)):
        agree(got[prompt], expected[prompt], dtype)


def agree_on_everything(both: Pair, masks: list[np.ndarray], dtype: Dtype = "float32", *, mix: float = 1.0, **options: Any) -> None:
    """All three queries on every mask; in float32 a sparse one leaves little but rounding of a KL's gradient, so there on the first."""
    expected, got = (engine.evaluate(np.stack(masks), **options) for engine in both)
    agree(got, expected, dtype)
    for mask in masks if dtype == "float64" else masks[:1]:
        agree_on_values(both, mask, dtype, **options)
        if both.jax.metric.is_differentiable:
            agree_on_gradient(both, mask, mix, dtype, **options)


def agree_on_gradient(both: Pair, mask: np.ndarray, mix: float, dtype: Dtype = "float32", **options: Any) -> None:
    expected, got = (engine.gradient(mask, mix=mix, **options) for engine in both)
    agree(got, expected, dtype)


# The numbers of a family are compared in float64, below. This is about the dtype, and others ask these in it too.
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@settings(max_examples=2, phases=PHASES)
@given(seed=seeds, kinds=st.permutations(MASKS))
def test_some_families_in_float32(family: str, seed: int, kinds: list[str]) -> None:
    both = traced(family).bind(pairs_of(seed))
    agree_on_everything(both, [mask_of(kind, seed, both.graph) for kind in kinds[:3]], mix=0.3)
    agree_on_values(both, None)


# In float64, families take turns at the metrics and sources, each of which is compiled for: the 22 that JAX has to compile anew go through
# all 20 combinations, and those that are built as another one ask what it asks.
SOURCES = ("corrupted", "zero", "mean", "mean-per-position")
BUILT_AS = {**dict.fromkeys(("mistral", "phi3", "smollm3", "granite"), "llama"), "gemma3_multimodal": "gemma3"}
COMBINATIONS = [*product(("kl", "nll", "prob_diff", "accuracy", "logit_diff"), SOURCES)]  # the KL of the last families is near 0
TURN_OF = dict(zip((family for family in FAMILIES if family not in BUILT_AS), COMBINATIONS + COMBINATIONS[4:], strict=False))
TURNS = [(family, *TURN_OF[BUILT_AS.get(family, family)]) for family in FAMILIES]


@pytest.mark.parametrize(("family", "metric", "source"), TURNS, ids=["-".join(turn) for turn in TURNS])
@settings(max_examples=2, phases=PHASES)
@given(seed=seeds, kinds=st.permutations(MASKS))
def test_every_family_in_float64(family: str, metric: str, source: SourceKind, seed: int, kinds: list[str]) -> None:
    with precision("float64"):
        both = traced(family, "float64").bind(pairs_of(seed), metric, source)
        masks = [mask_of(kind, seed, both.graph) for kind in kinds[:3]]
        agree_on_everything(both, masks, "float64")
        agree_on_values(both, None, "float64")
        if not both.jax.metric.is_differentiable:
            agree_on_gradient(traced(family, "float64").bind(pairs_of(seed)), masks[0], 1.0, "float64")


@pytest.mark.parametrize(
    ("metric", "source"), [("prob_diff", "zero"), ("nll", "mean"), ("kl", "corrupted"), ("accuracy", "mean-per-position")]
)
def test_metrics_and_sources_in_float32(metric: str, source: SourceKind) -> None:
    both = traced("llama").bind(pairs_of(1), metric, source)
    agree_on_everything(both, [mask_of("float", 1, both.graph)])


@pytest.mark.parametrize(("family", "dtype"), [("gpt_neo", "float32"), ("gemma2", "float64"), ("gpt_neox", "float64")])
def test_gradients_of_every_kind(family: str, dtype: Dtype) -> None:
    """At the model and under masks; with the source run known already, and before."""
    with precision(dtype):
        both = traced(family, dtype).bind(pairs_of(5))
        everything = np.ones(both.graph.shape)
        for mask, mix in [(everything, 1.0), (everything, 0.3), (everything, 1.0), *((mask_of(k, 5, both.graph), 0.3) for k in MASKS)]:
            agree_on_gradient(both, mask, mix, dtype)


@settings(max_examples=6, phases=PHASES)
@given(seed=seeds, source=st.sampled_from(["corrupted", "mean", "mean-per-position"]), has_data=st.booleans())
def test_several_lengths_in_one_engine(seed: int, source: SourceKind, has_data: bool) -> None:
    data = pairs_of(seed + 1, (6, 6, 3, 6, 3, 6)) if has_data and source != "corrupted" else None
    both = traced("llama").bind(pairs_of(seed, MIXED), "logit_diff", Source(source, data))
    agree_on_everything(both, [mask_of(kind, seed, both.graph) for kind in ("float", "binary")])
    agree_on_values(both, None)


@pytest.mark.parametrize("family", ["llama", "falcon_grouped"])
@settings(max_examples=3, phases=PHASES)
@given(seed=seeds, kind=st.sampled_from(MASKS))
def test_heads_with_keys_and_values_of_their_own(family: str, seed: int, kind: str) -> None:
    both = traced(family, per_head_kv=True).bind(pairs_of(seed))
    assert sum(reader.kind == "k" for reader in both.graph.readers) == sum(reader.kind == "q" for reader in both.graph.readers)
    agree_on_gradient(both, np.ones(both.graph.shape), 1.0)
    agree_on_everything(both, [mask_of(kind, seed, both.graph)])


@pytest.mark.parametrize(("metric", "source"), [("kl", "corrupted"), ("logit_diff", "mean"), ("logit_diff", "mean-per-position")])
def test_reversed(metric: str, source: SourceKind) -> None:
    bound = traced("llama").bind(pairs_of(2), metric, source)
    both = bound.reversed()
    agree_on_everything(both, [mask_of(kind, 2, both.graph) for kind in ("float", "sparse")])
    agree_on_values(both, None)
    mask = mask_of("binary", 2, both.graph)[None]
    agree(both.reversed().jax.evaluate(mask), bound.jax.evaluate(mask))
    assert np.abs(both.jax.evaluate(mask) - bound.jax.evaluate(mask)).max() > 1e-3


@pytest.mark.parametrize("kind", ["its own", "the other's", "its own, of other batches", "somebody's"])
def test_source_values_of_every_kind(kind: str) -> None:
    """On both engines; what they patch in is not what they are bound to, and prompts of one length are not next to each other."""
    pairs = pairs_of(3, MIXED)
    both = traced("llama").bind(pairs)
    mask = mask_of("float", 3, both.graph)
    said = Pair(*(engine.reversed().activations(mask) for engine in both))
    plain = ReferenceValues(tuple(said.torch[i] for i in range(len(pairs))))
    if kind == "its own, of other batches":
        shuffled = both.torch.reversed().activations(mask), _in_other_batches(both.jax, mask)
        said = Pair(*shuffled)
    ours = {"its own": said, "the other's": Pair(said.jax, said.torch), "somebody's": Pair(plain, plain)}.get(kind, said)
    expected = both.torch.evaluate(mask[None], source=plain)
    agree(both.jax.evaluate(mask[None], source=ours.jax), expected)
    agree(both.torch.evaluate(mask[None], source=ours.torch), expected)
    agree(both.jax.gradient(mask, source=ours.jax, mix=0.3), both.torch.gradient(mask, source=plain, mix=0.3))
    got, wanted = both.jax.activations(mask, source=ours.jax), both.torch.activations(mask, source=plain)
    for prompt in range(len(pairs)):
        agree(got[prompt], wanted[prompt])
    assert np.abs(both.torch.evaluate(mask[None]) - expected).max() > 1e-3


def _in_other_batches(engine: Any, mask: np.ndarray) -> Any:
    """The same values, in as many batches, but rows of a batch the other way round."""
    values = engine.reversed().activations(mask)
    places = tuple((batch, len(values.batches[batch]) - 1 - row) for batch, row in values.places)
    return type(values)(tuple(batch[::-1] for batch in values.batches), places)


ALGORITHMS: list[tuple[Algorithm, str]] = [
    (EAP(), "logit_diff"),
    (ActivationPatching(max_lanes=4), "logit_diff"),
    (ActivationPatching(direction="denoising", level="node", max_lanes=4), "kl"),
    (ACDC(threshold=0.02, max_lanes=4), "kl"),
    (ACDC(threshold=0.2, max_lanes=4), "kl"),
    (ACDC(threshold=0.02, max_lanes=4), "logit_diff"),
    (ACDC(threshold=0.2, max_lanes=4), "logit_diff"),
]


# gpt_neo is in two stacks, which compile twice as long.
CIRCUITS = [*product(("gpt_neox", "gemma2"), ALGORITHMS), *(("gpt_neo", ALGORITHMS[number]) for number in (1, 3))]


@pytest.mark.parametrize(("family", "algorithm", "metric"), [(family, *asked) for family, asked in CIRCUITS], ids=str)
def test_the_same_circuits(family: str, algorithm: Algorithm, metric: str) -> None:
    expected, got = (algorithm.run(engine) for engine in traced(family).bind(pairs_of(4), metric))
    if isinstance(algorithm, ACDC):
        assert expected.record["smallest_margin"] > 2e-5, "a decision too close for float32 to settle: choose another threshold"
        assert [d[0] for d in got.record["decisions"]] == [d[0] for d in expected.record["decisions"]]
    assert np.array_equal(got.mask, expected.mask)
    agree(got.scores, expected.scores)
