"""What the untouched model hands to its parts: the input of the first block, and the arguments of every attention call.

Rotary tables, causal and sliding-window masks come out of the model's own forward, so no variant of them is written here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from circuitgraph._errors import TaskError, TraceError
from circuitgraph_torch._modes import undisturbed


@dataclass(frozen=True)
class AttentionCall:
    """One call's arguments at batch size 1; `hidden` is the tensor among them that the projections read."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other hidden states in their place."""

        def swap(value: Any) -> Any:
            return hidden if value is self.hidden else value

        return tuple(swap(a) for a in self.args), {name: swap(value) for name, value in self.kwargs.items()}


class _Enough(Exception):
    """Stops a forward once everything wanted has been seen."""


def forward_arguments(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Explicit positions and no cache, as far as the model's `forward` takes them."""
    accepted = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {}
    if "position_ids" in accepted:
        arguments["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    return arguments


def original_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The untouched model's logits, `[prompts, position, vocabulary]`."""
    with undisturbed(model), too_long(ids):
        out = model(ids, **forward_arguments(model, ids))
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if logits is None:
        logits = out[0]
    if not isinstance(logits, Tensor):
        raise TraceError(f"{type(model).__name__}: its forward returns {type(logits).__name__}, expected logits")
    return logits


def block_input(model: nn.Module, first_block: str, ids: Tensor) -> Tensor:
    """The embeddings as the first block receives them, positions and scales included, `[prompts, position, d_model]`."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_hidden(args, kwargs).detach().clone())
        raise _Enough

    _run_until(model, ids, [(first_block, look)])
    return seen[0]


def attention_calls(
    model: nn.Module, paths: Sequence[str], length: int, device: torch.device, *, silent: Sequence[str] = ()
) -> list[AttentionCall]:
    """How the model calls each attention module on a prompt of this length. The tokens themselves do not matter. Nor does what is made of
    them, so linear maps in modules that are `silent`, nearly all of the time, are left out."""
    calls: dict[str, AttentionCall] = {}

    def look_at(path: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[path] = AttentionCall(args, dict(kwargs), _hidden(args, kwargs))
            if len(calls) == len(paths):
                raise _Enough

        return look

    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    without_products: Any = _Silent(model, silent)  # PyTorch does not type its modes
    with without_products:
        _run_until(model, ids, [(path, look_at(path)) for path in paths])
    return [calls[path] for path in paths]


@contextmanager
def too_long(ids: Tensor) -> Iterator[None]:
    """A position or a token that the model has no embedding for is found out by an embedding's lookup."""
    try:
        yield
    except IndexError as error:
        raise TaskError(
            f"the model does not take prompts of {ids.shape[1]} tokens, or has no embedding for one of them ({error})"
        ) from error


def _run_until(model: nn.Module, ids: Tensor, hooks: Sequence[tuple[str, Callable[..., None]]]) -> None:
    handles = [model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True) for path, hook in hooks]
    try:
        with undisturbed(model), too_long(ids):
            model(ids, **forward_arguments(model, ids))
    except _Enough:
        return
    finally:
        for handle in handles:
            handle.remove()
    missing = [path for path, _ in hooks]
    if missing:
        raise TraceError(f"the model's forward ended without calling all of {missing[0]} ... {missing[-1]}")


class _Silent(TorchFunctionMode):
    """Linear maps of some modules say zeros and are not computed. (In a form that is not known here they are computed.)"""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        self._weights = {id(weight) for path in paths for weight in model.get_submodule(path).parameters() if weight.dim() == 2}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is functional.linear and len(args) >= 2 and id(args[1]) in self._weights:
            return args[0].new_zeros(*args[0].shape[:-1], len(args[1]))
        if func is torch.addmm and len(args) == 3 and id(args[2]) in self._weights:  # GPT-2's: the weight lies the other way
            return args[1].new_zeros(len(args[1]), args[2].shape[1])
        return func(*args, **(kwargs or {}))


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
            return value
    raise TraceError("a block or an attention module is called without hidden states [prompts, position, d_model]")
