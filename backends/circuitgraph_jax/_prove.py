"""The proof of a trace: what the model that was built says, beside what the original says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from circuitgraph._architecture import Architecture
from circuitgraph._engine import Check, Source
from circuitgraph._errors import TraceError
from circuitgraph._metrics import NLL
from circuitgraph._pairs import PromptPairs
from circuitgraph_jax._batch import Parts
from circuitgraph_jax._devices import precisely
from circuitgraph_jax._engine import JaxEngine
from circuitgraph_jax._load import Checkpoint
from circuitgraph_jax._queries import plain_logits, source_streams

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    Logits = Callable[[Any], Float[ndarray, "prompts position vocabulary"]]

# Largest difference allowed, over the largest value. Half-precision models round every sum of the stream.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}


@dataclass(frozen=True)
class Proof:
    """How far the model is from the original on a sample of tokens, and its `F(1)` from itself, relative to the largest value.

    `original` names what it was compared with; `original_error` is None where there was nothing.
    """

    original: str
    original_error: float | None
    residual_error: float
    logits_error: float
    tolerance: float

    def __str__(self) -> str:
        off = "not compared" if self.original_error is None else f"logits within {self.original_error:.1e} of its largest"
        return (
            f"{self.original}: {off}; writers add up to the final residual within {self.residual_error:.1e}, F(1) is the model's logits "
            f"within {self.logits_error:.1e} (tolerance {self.tolerance:.0e})"
        )


def prove(parts: Parts, architecture: Architecture, checkpoint: Checkpoint, forward: Logits) -> Proof:
    """Compare on random tokens. Raises `TraceError`; warns when there is nothing to compare with."""
    ids = np.random.default_rng(0).integers(0, architecture.vocabulary, (2, min(12, longest(parts))))
    original, error, tolerance = _against_original(parts, checkpoint, forward, ids)
    logits = forward(ids)
    if not np.isfinite(logits).all():
        raise TraceError("the model's logits are not finite on a sample of tokens, so nothing can be measured on it; check its weights")
    engine = _engine_on(ids, architecture.vocabulary, parts)
    own = _TOLERANCE[str(parts.dtype)]
    residual = _stream_error(engine)
    replayed = relative(_logits(engine, np.ones(engine.graph.shape)), logits)
    if not residual <= 10 * own or not replayed <= max(own, tolerance):
        raise TraceError(
            f"F(1) differs from the model (residual {residual:.1e}, logits {replayed:.1e}, allowed {own:.0e}): a bug of circuitgraph"
        )
    return Proof(original, error, residual, replayed, tolerance)


def _against_original(
    parts: Parts, checkpoint: Checkpoint, forward: Logits, ids: Int[ndarray, "prompts position"]
) -> tuple[str, float | None, float]:
    """What the model was compared with, how far it is off, and how far it may be."""
    own = _TOLERANCE[str(parts.dtype)]
    built = _built(parts, ids)
    if checkpoint.forward is not None:
        name, error, tolerance = "the model handed over", relative(built, forward(ids)), own
    else:
        witness = checkpoint.witness()
        if witness is None:
            warnings.warn(
                f"{checkpoint.name}: there is nothing to prove the JAX model against: PyTorch is not installed, and no witness lies beside "
                "the weights; install circuitgraph[torch], or write one where PyTorch is: circuitgraph_torch.write_witness(folder)",
                stacklevel=4,
            )
            return "nothing", None, own
        name, tolerance = "the PyTorch original", max(own, _TOLERANCE.get(witness.dtype, own))
        error = relative(_built(parts, witness.tokens)[:, witness.positions], witness.logits)
    if not error <= tolerance:
        raise TraceError(
            f"{checkpoint.name}: the JAX model differs from {name}: logits by {error:.1e} of the largest, allowed {tolerance:.0e}; the "
            "description (its patterns, feed-forward layers, scales) does not fit the model: correct it and hand it over as architecture="
            + ("" if checkpoint.forward is not None else ", or use backend='torch', which runs the model's own code")
        )
    return name, error, tolerance


def checks(parts: Parts, pairs: PromptPairs, forward: Logits) -> Iterator[Check]:
    """The invariants of a trace on somebody's prompts, cheapest first."""
    tolerance = _TOLERANCE[str(parts.dtype)]
    engine = JaxEngine(parts, pairs, NLL(), Source())
    what = "largest logit difference, relative"
    yield Check("F(1) is the model", what, _worst(parts, engine, pairs.clean, 1.0, forward), tolerance)
    yield Check("F(0) is the source run", what, _worst(parts, engine, pairs.corrupted, 0.0, forward), tolerance)
    with precisely(parts.dtype):
        error = _stream_error(engine)
    # Hundreds of writers are added in another order than the model adds them: more rounding than the model's own.
    yield Check("readers are the sum of their writers", "largest difference, relative", error, 10 * tolerance)
    yield Check("padding changes nothing", what, _padding_error(parts, pairs), tolerance)
    dead = _dead_readers(engine)
    what = f"of {len(engine.graph.readers)} readers, those whose patch moves no prompt ({', '.join(dead[:8]) or 'none'})"
    yield Check("readers move the output", what, float(len(dead)), float(len(engine.graph.readers) - 1))


def longest(parts: Parts) -> int:
    """How many tokens a prompt may have where positions are learned; else more than anyone will ask for."""
    return 1 << 20 if parts.decoder.positions is None else len(parts.decoder.positions)


def _built(parts: Parts, ids: Int[ndarray, "prompts position"]) -> Float[ndarray, "prompts position vocabulary"]:
    return np.asarray(plain_logits(parts.decoder, jnp.asarray(ids, jnp.int32)), dtype=parts.wide)


def _worst(parts: Parts, engine: JaxEngine, prompts: Any, mask: float, forward: Logits) -> float:
    """Largest relative logit difference between `F(mask)` and the untouched model on these prompts."""
    errors = [0.0]
    for batch, logits in engine.logits(np.full(engine.graph.shape, mask)):
        with precisely(parts.dtype):
            errors.append(relative(logits.astype(parts.wide), forward(np.stack([prompts[int(i)] for i in batch.index]))))
    return float(np.max(errors))


def _stream_error(engine: JaxEngine) -> float:
    """The stream before each layer, as the model adds it up, against the sum of the writers before it."""
    errors = [0.0]
    for batch in engine.batches:
        run = batch.live
        summed = source_streams(batch.decoder, run.values)
        starts = np.concatenate([np.asarray(part) for part in summed.starts] + [np.asarray(summed.end)[:, None]], axis=1)
        errors.append(relative(starts, np.asarray(run.streams)))
    return float(np.max(errors))


def _padding_error(parts: Parts, pairs: PromptPairs) -> float:
    """Of a few prompts of one length: tokens behind a prompt must not change the run at the prompt's own positions."""
    room = longest(parts)
    fitting = [bucket for bucket in pairs.buckets() if bucket.clean.shape[1] < room]
    if not fitting:
        return 0.0
    some = pairs.select(fitting[0].index[:4])
    n_pads = min(3, room - len(some.clean[0]))
    clean, corrupted = ([_behind(ids, n_pads) for ids in prompts] for prompts in (some.clean, some.corrupted))
    longer = PromptPairs(clean, corrupted, some.answers)
    mask = np.random.default_rng(0).uniform(size=parts.sites.graph.shape)
    expected, got = (_logits(JaxEngine(parts, prompts, NLL(), Source()), mask) for prompts in (some, longer))
    return relative(got[:, : expected.shape[1]], expected)


def _behind(ids: Int[ndarray, " position"], n_pads: int) -> Int[ndarray, " position"]:
    return np.append(ids, [0] * n_pads)


def _dead_readers(engine: JaxEngine, n_lanes: int = 32) -> list[str]:
    readers = engine.graph.readers
    ones = np.ones(engine.graph.shape, dtype=np.float32)
    whole = engine.evaluate(ones[None])[0]
    dead = []
    for first in range(0, len(readers), n_lanes):
        lanes = range(first, min(first + n_lanes, len(readers)))
        masks = np.repeat(ones[None], len(lanes), axis=0)
        masks[np.arange(len(lanes)), lanes] = 0
        values = engine.evaluate(masks)
        # Lanes differ in rounding, so what moves nothing is asked again by itself.
        near = [r for r, value in zip(lanes, values, strict=True) if np.allclose(value, whole, rtol=1e-4, atol=1e-5)]
        dead += [readers[r].name for r in near if np.allclose(engine.evaluate(masks[[r - first]])[0], whole, rtol=1e-6, atol=1e-7)]
    return dead


def _engine_on(ids: Int[ndarray, "prompts position"], vocabulary: int, parts: Parts) -> JaxEngine:
    other = (ids + 1) % vocabulary
    return JaxEngine(parts, PromptPairs(clean=ids, corrupted=other, answers=ids[:, 0]), NLL(), Source())


def _logits(engine: JaxEngine, mask: Float[ndarray, "readers writers"]) -> Float[ndarray, "prompts position vocabulary"]:
    """Of an engine with prompts of one length."""
    return np.concatenate([logits for _, logits in engine.logits(mask)])


def relative(got: Float[ndarray, ...], expected: Float[ndarray, ...]) -> float:
    """The largest difference, over the largest value expected."""
    largest = float(np.abs(expected).max())
    return float(np.abs(got.astype(np.float64) - expected).max()) / max(largest, 1e-30)
