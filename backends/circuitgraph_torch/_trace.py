"""`trace`: from a model to its graph, its engine and the proof that they are the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from circuitgraph._architecture import Architecture
from circuitgraph._dictionary import Dictionary
from circuitgraph._engine import Check, Source, SourceKind
from circuitgraph._errors import CircuitGraphError, TraceError, unknown_name
from circuitgraph._graph import Graph
from circuitgraph._linear import LinearPrompt
from circuitgraph._memory import MemoryBudget
from circuitgraph._metrics import NLL, Metric, metric_named
from circuitgraph._pairs import PromptPairs, check_vocabulary
from circuitgraph._refinement import Refinement, check_size, joined, refined, refinements_record
from circuitgraph._sites import Sites
from circuitgraph._training import DictionaryMeasures, Place, SAETraining
from circuitgraph_torch._activations import Activations
from circuitgraph_torch._batch import Batch, Parts
from circuitgraph_torch._calls import original_logits
from circuitgraph_torch._engine import TorchEngine
from circuitgraph_torch._find import find_architecture
from circuitgraph_torch._joints import ModelJoints
from circuitgraph_torch._linear import TorchLinearRun
from circuitgraph_torch._load import Loaded, load
from circuitgraph_torch._measures import measured
from circuitgraph_torch._modes import undisturbed
from circuitgraph_torch._places import spots
from circuitgraph_torch._prove import Proof, checks, looks_back, prove
from circuitgraph_torch._seen import logit_weights, seen_by, width_of
from circuitgraph_torch._training import Training

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

_SEEN_AT_ONCE = 8  # prompts
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class TorchModel:
    """A traced PyTorch model. `proof` says how far its replay is from the original."""

    name: str
    tokenizer: Any | None
    proof: Proof
    _parts: Parts
    refinements: tuple[Refinement, ...] = ()

    @property
    def graph(self) -> Graph:
        return self._parts.sites.graph

    @property
    def architecture(self) -> Architecture:
        return self._parts.architecture

    @property
    def module(self) -> nn.Module:
        """The model itself, untouched."""
        return self._parts.model

    @property
    def provenance(self) -> Mapping[str, Any]:
        import transformers

        parameter = next(self.module.parameters())
        return {
            "id": self.name,
            "weights_sha256": _weights_hash(self.module),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
            "backend": "torch",
            "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
            **refinements_record(self.refinements),
        }

    def bind(self, pairs: PromptPairs, metric: Metric | str, source: Source | SourceKind = "corrupted") -> TorchEngine:
        """An engine for these prompts. Raises `TaskError` when prompts, metric and model do not fit together."""
        wanted = source if isinstance(source, Source) else Source(source)
        return TorchEngine(self._parts, pairs, metric_named(metric), wanted)

    def refined(self, refinements: Sequence[Refinement]) -> TorchModel:
        parts, refinements = self._parts, joined(refinements, self.refinements)
        check_size(parts.sites.graph, refinements, parts.architecture.d_model, parts.budget)
        graph = refined(parts.sites.graph, refinements)
        with torch.no_grad():
            for refinement in refinements:
                refinement.check_width(width_of(parts, refinement), parts.architecture.d_model)
            joints = parts.joints.refined(refinements, next(self.module.parameters()))
        cut = replace(parts, joints=joints, sites=Sites.of(graph, len(parts.architecture.blocks)))
        return replace(self, _parts=cut, refinements=(*self.refinements, *refinements))

    def seen_by(self, refinement: Refinement, pairs: PromptPairs) -> Iterator[Float[ndarray, "position width"]]:
        check_vocabulary(pairs, self.architecture.vocabulary)
        for side in ("clean", "corrupted"):
            seen: dict[int, Float[ndarray, "position width"]] = {}
            for bucket in pairs.buckets():
                for part in bucket.cut(_SEEN_AT_ONCE):
                    ids = getattr(part, side)
                    with undisturbed(self.module):
                        rows = seen_by(self._parts, refinement, Batch(self._parts, part, NLL(), ids, ids))
                    seen |= zip(part.index.tolist(), rows.double().cpu().numpy(), strict=True)
            yield from (seen[prompt] for prompt in range(len(pairs)))

    def logit_weights(self, refinement: Refinement, features: Sequence[int]) -> Float[ndarray, "features vocabulary"]:
        with torch.no_grad():
            weights = logit_weights(self._parts, refinement, features).double().cpu().numpy()
        return weights - weights.mean(axis=1, keepdims=True)  # type: ignore[no-any-return]

    def linear_run(self, tokens: Sequence[int]) -> TorchLinearRun:
        """This model on one prompt, linear but for its MLPs. Raises `TaskError`, `CircuitGraphError`."""
        return TorchLinearRun(self._parts, LinearPrompt.of(tokens, self.refinements, self.architecture.vocabulary))

    def trainer(self, place: Place, prompts: Sequence[Int[ndarray, " position"]], settings: SAETraining) -> Training:
        """A dictionary's training at a place, before its first step. The model itself is run, unrefined, and not changed."""
        activations = Activations(self.module, spots(self.architecture, place), prompts, settings)
        return Training(place, activations, settings, name=f"{place.component}-{settings.activation}", model=self.name)

    def measured(
        self, place: Place, dictionary: Dictionary, prompts: Sequence[Int[ndarray, " position"]], *, first_position: int = 0
    ) -> DictionaryMeasures:
        """What a dictionary keeps of a place on these prompts."""
        return measured(self.module, spots(self.architecture, place), dictionary, prompts, first_position=first_position)

    def logits(self, pairs: PromptPairs) -> Float[ndarray, "prompts vocabulary"]:
        check_vocabulary(pairs, self.architecture.vocabulary)
        is_double = next(self.module.parameters()).dtype == torch.float64
        out = np.empty((len(pairs), self.architecture.vocabulary), dtype=np.float64 if is_double else np.float32)
        for bucket in pairs.buckets():
            ids = torch.from_numpy(bucket.clean).to(self._parts.device)
            out[bucket.index] = original_logits(self.module, ids)[:, -1].to(torch.float64 if is_double else torch.float32).cpu().numpy()
        return out

    def checks(self, pairs: PromptPairs) -> Iterator[Check]:
        check_vocabulary(pairs, self.architecture.vocabulary)
        return checks(self._parts, pairs)


def trace(
    model: Any,
    *,
    architecture: Architecture | None = None,
    per_head_kv: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any | None = None,
    memory_budget: int | str = "auto",
) -> TorchModel:
    """Find a model's wiring, take it apart at its joints, and prove that the replay is the model.

    `model`: a Hugging Face id or folder, a GGUF file, a bundled `zoo:` name, an `nn.Module` or an nnsight model. `architecture`: a
    description to use instead of finding one. `dtype`, `device`: move the model first (a module that was handed over is moved too). Files
    in half precision are computed in float32 if no dtype is given; a module stays what it is.
    `memory_budget`: what its engines may compute with beside the weights, in bytes or as "8GB".
    Raises `TraceError` naming the joint that is missing, or the first module that differs.
    """
    loaded = load(model, tokenizer)
    is_named = isinstance(model, str | Path)
    module = _moved(loaded.model, device, _at_least_float32(loaded.model) if is_named and dtype is None else _dtype(dtype))
    budget = MemoryBudget.of(memory_budget, _free(next(module.parameters()).device))
    try:
        with undisturbed(module):
            return _proved(loaded, module, architecture, budget, per_head_kv=per_head_kv)
    except AttributeError as error:
        raise TraceError(f"the architecture description does not fit the model: {error}") from error
    except (RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TraceError(
            f"{type(module).__name__} cannot be replayed: it does not take prompts, or a batch, of another size than it was observed "
            f"with ({reason})"
        ) from error


def _proved(loaded: Loaded, module: nn.Module, architecture: Architecture | None, budget: MemoryBudget, *, per_head_kv: bool) -> TorchModel:
    found = find_architecture(module) if architecture is None else architecture
    joints = ModelJoints.of(module, found, per_head_kv=per_head_kv)
    parts = Parts(module, found, joints, Sites.of(found.graph(per_head_kv=per_head_kv), len(found.blocks)), MemoryBudget.unlimited())
    return TorchModel(loaded.name, loaded.tokenizer, prove(parts), replace(parts, budget=budget, looks_back=looks_back(parts)))


def _moved(module: nn.Module, device: str | torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    try:
        return module.to(device=device, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise CircuitGraphError(
            f"device {str(device)!r} has no room for the weights; ask for a narrower dtype, such as 'bfloat16', or leave the device out"
        ) from error
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CircuitGraphError(f"device {str(device)!r} cannot be used here: {reason}; leave it out, or use 'cpu'") from error


def _at_least_float32(module: nn.Module) -> torch.dtype:
    return torch.promote_types(next(module.parameters()).dtype, torch.float32)


def _free(device: torch.device) -> int | None:
    """Bytes that an accelerator has left; None on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return None if device.type == "cpu" else int(torch.mps.recommended_max_memory()) if device.type == "mps" else 1 << 32


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    if dtype not in _DTYPES:
        raise unknown_name("dtype", dtype, _DTYPES)
    return _DTYPES[dtype]


def _weights_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
