"""The ends of the residual stream and its spine: embeddings, the list of blocks, the final norm, the unembedding, the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from circuitgraph._architecture import Norm
from circuitgraph._errors import TraceError
from circuitgraph_torch._find_joints import MissingJointError
from circuitgraph_torch._find_modules import is_linear, probe_norm
from circuitgraph_torch._find_numbers import agrees, scales, simplest
from circuitgraph_torch._observe import Call, Observation, Value


@dataclass(frozen=True, eq=False)
class Spine:
    """The calls of the blocks, in order, each with the stream that enters it and the stream that leaves it."""

    path: str
    blocks: tuple[Call, ...]
    streams: tuple[Value, ...]
    """One more than blocks: `streams[i]` enters block `i`."""

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.streams[0].tensor.shape[-1]


@dataclass(frozen=True)
class Embedding:
    """How the stream that enters block 0 is made of token (and position) embeddings."""

    tokens: str
    scale: float
    positions: str | None
    norm: Norm | None
    is_whole: bool
    """Whether nothing else is in the stream."""


@dataclass(frozen=True)
class Head:
    """How the stream that leaves the last block becomes logits."""

    final_norm: Norm | None
    unembedding: str
    scale: float
    softcap: float | None


def find_spine(seen: Observation) -> Spine:
    """The outermost module list of which every member hands its output to the next."""
    spines = [spine for path, module in seen.model.named_modules() if (spine := _spine(seen, path, module)) is not None]
    if not spines:
        raise MissingJointError(
            "no nn.ModuleList or nn.Sequential was called in which each member's output, of shape [batch, position, width], "
            "is the next one's input"
        )
    return min(spines, key=lambda spine: (spine.path.count("."), -len(spine.blocks)))


def _spine(seen: Observation, path: str, module: nn.Module) -> Spine | None:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
        return None
    calls = [seen.of(f"{path}.{name}" if path else name) for name, _ in module.named_children()]
    if any(len(call) != 1 for call in calls) or any(next(part.children(), None) is None for part in module):
        return None
    blocks = [call[0] for call in calls]
    outputs = [block.output for block in blocks if block.output is not None]
    shape = outputs[0].tensor.shape if outputs else ()
    if len(outputs) < len(blocks) or shape[:2] != seen.token_ids.shape or len(shape) != 3:
        return None
    first = next((value for value in blocks[0].inputs if value.tensor.shape == shape), None)
    streams = [first, *outputs]
    if first is None or any(not block.reads(stream.wire) for block, stream in zip(blocks[1:], outputs, strict=False)):
        return None
    return Spine(path, tuple(blocks), tuple(stream for stream in streams if stream is not None))


def find_embedding(seen: Observation, spine: Spine) -> Embedding:
    """Token embedding, its scale, learned positions and a norm on top, from what enters block 0."""
    outside = _outside(seen, spine)
    stream, norm = spine.streams[0], None
    for call in outside:
        if call.writes(stream.wire) and call.input is not None and (norm := probe_norm(call)) is not None:
            stream = call.input
            break
    tables = [call for call in outside if _is_lookup(call) and _output(call).shape[-1] == spine.d_model]
    tokens = [call for call in tables if _holds(call, seen.token_ids)]
    if not tokens:
        raise MissingJointError("no module with a weight [vocabulary, width] was called with the token ids")
    rows = _rows(tokens[0], seen.token_ids)
    # The input writer is whatever enters block 0, so a stream with more in it is no obstacle, only worth a note.
    for position in (None, *(call for call in tables if call not in tokens and _output(call).shape[-2:] == stream.tensor.shape[-2:])):
        parts = [rows] if position is None else [rows, _output(position)]
        found = scales(stream.tensor, None, parts)
        if found is not None and found[1:] in ((), (1.0,)):
            return Embedding(tokens[0].path, found[0], None if position is None else position.path, norm, is_whole=True)
    return Embedding(tokens[0].path, 1.0, None, norm, is_whole=False)


def find_head(seen: Observation, spine: Spine) -> Head:
    """Final norm, unembedding, and the scale or soft cap between the unembedding's output and the logits."""
    outside, stream, logits = _outside(seen, spine), spine.streams[-1], seen.logits
    norm, normed = None, stream.wire
    for call in outside:
        if call.reads(stream.wire) and call.output is not None and (norm := probe_norm(call)) is not None:
            normed = call.output.wire
            break
    readers = [call for call in outside if call.reads(normed) and is_linear(call)]
    unembeddings = [call for call in readers if call.output is not None and call.output.tensor.shape == logits.tensor.shape]
    if not unembeddings:
        after = f"the final norm {norm.path!r}" if norm else f"the last block {spine.blocks[-1].path!r}"
        what = f"it feeds {readers[0].path!r}, whose output is not the logits" if readers else "no linear module reads it"
        raise MissingJointError(
            f"the output of {after} should feed a linear module that gives the logits, of shape {tuple(logits.tensor.shape)}, but {what}"
        )
    assert unembeddings[0].output is not None
    scale, softcap = _logit_head(unembeddings[0].output.tensor, logits.tensor)
    return Head(norm, unembeddings[0].path, scale, softcap)


def refuse_unfinite(seen: Observation) -> None:
    """Raise if the logits are not finite, naming the first module whose output is not."""
    if seen.logits.tensor.isfinite().all():
        return
    culprit = next(call for call in seen.calls if call.output is not None and not call.output.tensor.isfinite().all())
    broken = [name for name, parameter in culprit.module.named_parameters(recurse=False) if not parameter.isfinite().all()]
    cause = f"; its {broken[0]} has values that are not finite" if broken else ""
    name = f"module {culprit.path!r}" if culprit.path else "the model itself"
    raise TraceError(f"the model's logits are not finite; the first output with NaN or infinity is that of {name}{cause}")


def refuse_randomness(seen: Observation, again: Observation) -> None:
    """Raise if a second forward on the same tokens gives other logits."""
    if not agrees(seen.logits.tensor, again.logits.tensor, size=seen.logits.tensor.abs().amax()):
        raise TraceError(
            f"cannot trace {type(seen.model).__name__}: two forwards on the same tokens give different logits; "
            f"something random, such as dropout, is on even in evaluation mode"
        )


def check_causality(seen: Observation, changed: Observation) -> None:
    """Raise if changing the last token changed the logits at earlier positions."""
    before, after = (logits.tensor[:, :-1] for logits in (seen.logits, changed.logits))
    if not agrees(before, after, size=seen.logits.tensor.abs().amax()):
        raise MissingJointError("the last token changes the logits at earlier positions; circuitgraph traces decoders, not encoders")


def _outside(seen: Observation, spine: Spine) -> list[Call]:
    return [call for call in seen.calls if not any(call is block or call.is_inside(block.path) for block in spine.blocks)]


def _is_lookup(call: Call) -> bool:
    """Whether the call may have looked up rows of its weight (OPT computes its positions from a float mask, so any input will do)."""
    weight = getattr(call.module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and call.output is not None and not is_linear(call)


def _output(call: Call) -> Tensor:
    assert call.output is not None
    return call.output.tensor


def _holds(call: Call, token_ids: Tensor) -> bool:
    return any(torch.equal(value.tensor.flatten(), token_ids.cpu().flatten()) for value in call.inputs)


def _rows(call: Call, token_ids: Tensor) -> Tensor:
    weight: Tensor = call.module.weight  # type: ignore[assignment]  # a lookup has one
    return weight.detach()[token_ids.to(weight.device)].cpu()


def _logit_head(raw: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """Scale and soft cap with which `raw` becomes `logits`."""
    scaled = scales(logits, None, [raw])
    if scaled is not None:
        return scaled[0], None
    cap = _solve_cap(raw, logits)
    if cap is not None:
        return 1.0, cap
    raise MissingJointError("the logits are neither a multiple of the unembedding's output nor soft-capped: cap * tanh(output / cap)")


def _solve_cap(raw: Tensor, logits: Tensor) -> float | None:
    """The `cap` with `logits = cap * tanh(raw / cap)`, by bisection at the largest output, confirmed on all."""
    raw, target = raw.double(), logits.double()
    place = int(raw.abs().argmax())
    big, capped = float(raw.flatten()[place].abs()), float(target.flatten()[place].abs())

    def fits(cap: float) -> bool:
        return cap > 0 and agrees(logits.double(), cap * torch.tanh(raw / cap), size=raw, eps=torch.finfo(logits.dtype).eps * 2)

    low, high = capped, 1e6 * max(capped, 1e-6)
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if middle * math.tanh(big / middle) < capped else (low, middle)
    cap = simplest(low, fits)
    return cap if fits(cap) else None


def vocabulary_size(model: nn.Module, candidates: Sequence[int | None]) -> int | None:
    """How many tokens the model knows: the first size that is given, or the first lookup table's."""
    tables = (module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding))
    return next((size for size in (*candidates, *tables) if size), None)
