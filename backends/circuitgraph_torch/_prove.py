"""The proof of a trace: what the replay says, beside what the untouched model says."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuitgraph._engine import Check, Source
from circuitgraph._errors import TraceError
from circuitgraph._metrics import NLL
from circuitgraph._pairs import PromptPairs
from circuitgraph_torch._batch import Parts
from circuitgraph_torch._calls import original_logits
from circuitgraph_torch._engine import TorchEngine
from circuitgraph_torch._forward import SourceRun
from circuitgraph_torch._modes import undisturbed
from circuitgraph_torch._prove_feeds import prove_feeds
from circuitgraph_torch._rounding import errors, judged, moved_by_rounding
from circuitgraph_torch._window import capture

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from circuitgraph._architecture import Architecture

# Largest difference allowed, over the largest value. Half-precision models round every sum of the stream.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Proof:
    """How far the replay is from the original on a sample of tokens, relative to the largest value, and how far it may be: more than usual
    where the model's own rounding moves it as far (see `judged`)."""

    residual_error: float
    logits_error: float
    largest_logit: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"writers add up to the final residual within {self.residual_error:.1e}, F(1) is the model's logits within "
            f"{self.logits_error:.1e} of the largest, {self.largest_logit:.3g} (tolerance {self.tolerance:.0e})"
        )


def prove(parts: Parts, *, n_prompts: int = 2, seed: int = 0) -> Proof:
    """Compare on random tokens. Raises `TraceError` that names the first module whose output the replay does not reproduce."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, parts.architecture.vocabulary, (n_prompts, min(12, parts.longest)))
    tolerance = _TOLERANCE.get(next(parts.model.parameters()).dtype, 1e-5)
    tokens = torch.from_numpy(ids).to(parts.device)
    paths = _component_paths(parts.architecture)
    seen = dict(zip(paths, capture(parts.model, paths, tokens), strict=True))
    original = original_logits(parts.model, tokens)
    if not bool(torch.isfinite(original).all()):
        raise TraceError("the model's logits are not finite on a sample of tokens, so nothing can be measured on it; check its weights")
    engine = _engine_on(parts, ids)
    values = engine.activations().batches[0]
    _check_components(parts, seen, values, tolerance)
    prove_feeds(parts)
    end = parts.architecture.blocks[-1].path
    ends, logits = errors(_streams(parts, values)[-1], seen[end]), errors(_logits(engine, np.ones(engine.graph.shape)), original)
    residual, residual_allowed = judged(ends, tolerance, lambda: moved_by_rounding(parts, lambda: capture(parts.model, [end], tokens)[0]))
    logits_error, logits_allowed = judged(logits, tolerance, lambda: moved_by_rounding(parts, lambda: original_logits(parts.model, tokens)))
    if not logits_error <= logits_allowed or not residual <= residual_allowed:
        raise TraceError(
            f"the replay differs from the model after the last block (residual {residual:.1e}, allowed {residual_allowed:.0e}; logits "
            f"{logits_error:.1e}, allowed {logits_allowed:.0e}): the final norm {parts.architecture.final_norm}, the unembedding or its "
            "scale and soft-capping"
        )
    return Proof(residual, logits_error, float(original.abs().max()), max(residual_allowed, logits_allowed))


def looks_back(parts: Parts) -> bool:
    """Whether other tokens in the second half of some prompts leave all logits of the first half as they are: to rounding, since experts
    get their tokens together; in half precision, where rounding is large, to the bit."""
    length = min(8, parts.longest)
    ids = np.random.default_rng(1).integers(0, parts.architecture.vocabulary, (2, 2, length))
    ids[1, :, : length // 2] = ids[0, :, : length // 2]
    one, other = (original_logits(parts.model, torch.from_numpy(some).to(parts.device))[:, : length // 2] for some in ids)
    rounding = 16 * torch.finfo(one.dtype).eps if one.element_size() >= 4 else 0.0
    return bool((errors(other, one) <= rounding).all())


def checks(parts: Parts, pairs: PromptPairs) -> Iterator[Check]:
    """The invariants of a trace on somebody's prompts, cheapest first."""
    tolerance = _TOLERANCE.get(next(parts.model.parameters()).dtype, 1e-5)
    engine = TorchEngine(parts, pairs, NLL(), Source())
    yield Check("F(1) is the model", "largest logit difference, relative", *_worst(parts, engine, pairs.clean, 1.0, tolerance))
    yield Check("F(0) is the source run", "largest logit difference, relative", *_worst(parts, engine, pairs.corrupted, 0.0, tolerance))
    # Hundreds of writers are added in another order than the model adds them: more rounding than the model's own.
    yield Check("readers are the sum of their writers", "largest difference, relative", _stream_error(parts, engine), 10 * tolerance)
    yield Check("padding changes nothing", "largest logit difference, relative", _padding_error(parts, pairs), tolerance)
    dead = _dead_readers(engine)
    what = f"of {len(parts.sites.graph.readers)} readers, those whose patch moves no prompt ({', '.join(dead[:8]) or 'none'})"
    yield Check("readers move the output", what, float(len(dead)), float(len(parts.sites.graph.readers) - 1))


def _worst(parts: Parts, engine: TorchEngine, prompts: object, mask: float, tolerance: float) -> tuple[float, float]:
    """Of relative logit differences between `F(mask)` and the untouched model the one that is worst for what is allowed, and that."""
    worst = 0.0, tolerance
    for batch, logits in engine.logits(np.full(engine.graph.shape, mask)):
        ids = torch.from_numpy(np.stack([prompts[int(i)] for i in batch.index])).to(parts.device)  # type: ignore[index]
        original = partial(original_logits, parts.model, ids)
        found = judged(errors(logits, original()), tolerance, partial(moved_by_rounding, parts, original))
        if np.isnan(found[0]) or found[0] / found[1] > worst[0] / worst[1]:
            worst = found
    return worst


def _stream_error(parts: Parts, engine: TorchEngine) -> float:
    """Each layer's input, as the original computes it, against the sum of the writers before it."""
    paths = [block.path for block in parts.architecture.blocks]
    worst = 0.0
    for batch, values in zip(engine.batches, engine.activations().batches, strict=True):
        ends = capture(parts.model, paths, torch.from_numpy(batch.live_ids).to(parts.device))
        for summed, end in zip(_streams(parts, values)[1:], ends, strict=True):
            worst = _larger(worst, _relative(summed, end))
    return worst


def _padding_error(parts: Parts, pairs: PromptPairs) -> float:
    """Of the first few prompts: tokens behind a prompt must not change the replay at the prompt's own positions, nor masked tokens
    before it the model, if it takes a mask and positions."""
    mask = np.random.default_rng(0).uniform(size=parts.sites.graph.shape)
    worst = 0.0
    for i in range(min(4, len(pairs))):
        one = pairs.select([i])
        n_pads = min(3, parts.longest - len(one.clean[0]))
        if n_pads < 1:
            continue
        longer = PromptPairs(clean=[_behind(one.clean[0], n_pads)], corrupted=[_behind(one.corrupted[0], n_pads)], answers=one.answers)
        expected, got = (_logits(TorchEngine(parts, p, NLL(), Source()), mask) for p in (one, longer))
        worst = _larger(worst, _relative(got[:, : expected.shape[1]], expected))
        worst = _larger(worst, _left_padding_error(parts, one.clean[0], n_pads))
    return worst


def _behind(ids: Int[ndarray, " position"], n_pads: int) -> Int[ndarray, " position"]:
    return np.append(ids, [0] * n_pads)


def _left_padding_error(parts: Parts, ids: Int[ndarray, " position"], n_pads: int) -> float:
    """The untouched model on a prompt with masked tokens before it and explicit positions, against the prompt alone."""
    accepted = inspect.signature(parts.model.forward).parameters
    if not {"attention_mask", "position_ids"} <= set(accepted):
        return 0.0
    tokens = torch.from_numpy(ids.copy()).to(parts.device)[None]
    zeros = tokens.new_zeros(1, n_pads)
    padded = {
        "attention_mask": torch.cat([zeros, torch.ones_like(tokens)], 1),
        "position_ids": torch.cat([zeros, torch.arange(len(ids), device=parts.device)[None]], 1),
    }
    with undisturbed(parts.model):
        got = parts.model(torch.cat([zeros, tokens], 1), **padded).logits[:, n_pads:]
    return _relative(got, original_logits(parts.model, tokens))


def _dead_readers(engine: TorchEngine, n_lanes: int = 32) -> list[str]:
    readers = engine.graph.readers
    ones = np.ones(engine.graph.shape, dtype=np.float32)
    whole = engine.evaluate(ones[None])[0]
    model = _last_logits(engine, ones)
    dead = []
    for first in range(0, len(readers), n_lanes):
        lanes = range(first, min(first + n_lanes, len(readers)))
        masks = np.repeat(ones[None], len(lanes), axis=0)
        masks[np.arange(len(lanes)), lanes] = 0
        values = engine.evaluate(masks)
        # Lanes differ in rounding, so what moves nothing is run again from the input, like the model itself.
        near = [r for r, value in zip(lanes, values, strict=True) if np.allclose(value, whole, rtol=1e-4, atol=1e-5)]
        dead += [readers[r].name for r in near if torch.equal(_last_logits(engine, masks[r - first]), model)]
    return dead


def _last_logits(engine: TorchEngine, mask: Float[ndarray, "readers writers"]) -> Tensor:
    """`[prompts, vocabulary]`, batch by batch."""
    return torch.cat([logits[:, -1] for _, logits in engine.logits(mask)])


def _component_paths(architecture: Architecture) -> list[str]:
    paths: list[str] = []
    for block in architecture.blocks:
        if block.attention:
            paths.append(block.attention.post_norm.path if block.attention.post_norm else block.attention.o)
        if block.mlp:
            paths.append(block.mlp.post_norm.path if block.mlp.post_norm else block.mlp.modules[-1])
        paths.append(block.path)
    return paths


def _check_components(parts: Parts, seen: dict[str, Tensor], values: Tensor, tolerance: float) -> None:
    """Raises `TraceError` at the first attention or MLP whose writers do not add up to what the original's module said."""
    for block, layer, joint in zip(parts.architecture.blocks, parts.sites.layers, parts.joints.layers, strict=True):
        found: list[tuple[str, Tensor, float]] = []
        if block.attention and joint.attention:
            heads = values[layer.attention_writers.start : layer.attention_writers.stop].sum(0)
            constant = joint.attention.constant
            path = block.attention.post_norm.path if block.attention.post_norm else block.attention.o
            found.append((path, heads if constant is None else heads + constant, block.attention.scale))
        if block.mlp:
            path = block.mlp.post_norm.path if block.mlp.post_norm else block.mlp.modules[-1]
            found.append((path, values[layer.mlp_writers.start], block.mlp.scale))
        for path, written, scale in found:
            error = _relative(written, seen[path].reshape(written.shape) * scale)
            # A component is compared with its own size, which may be far below the stream's: allow for that.
            if not error <= 10 * tolerance:
                raise TraceError(
                    f"the replay differs from the model at {path}: relative difference {error:.1e}, allowed {10 * tolerance:.0e}; "
                    f"check how the description wires {block.path}"
                )


def _streams(parts: Parts, values: Tensor) -> list[Tensor]:
    """The sums of what writers say before each layer and after the last, constants included, `[prompts, position, d_model]`."""
    run = SourceRun(values, parts.joints, parts.sites)
    return [run.stream(number) for number in range(len(parts.sites.layers) + 1)]


def _engine_on(parts: Parts, ids: Int[ndarray, "prompts position"]) -> TorchEngine:
    other = (ids + 1) % parts.architecture.vocabulary
    return TorchEngine(parts, PromptPairs(clean=ids, corrupted=other, answers=ids[:, 0]), NLL(), Source())


def _logits(engine: TorchEngine, mask: Float[ndarray, "readers writers"]) -> Tensor:
    """Of an engine with one batch, `[prompts, position, vocabulary]`."""
    ((_, logits),) = engine.logits(mask)
    return logits


def _relative(got: Tensor, expected: Tensor) -> float:
    return float(errors(got, expected).max())


def _larger(a: float, b: float) -> float:
    return b if np.isnan(b) else max(a, b)  # max(a, nan) would hide the NaN
