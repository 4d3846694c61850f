"""Watching the untouched model: one forward with every module call on record, and re-runs of single calls.

Two tensors are *the same wire* when they hold the same numbers at the time of the call, whatever their shape. Numbers are a better
witness than object identity: a view or a cast of a tensor is the same wire, and a tensor that was changed in place (Falcon adds the
attention's output to the MLP's that way) is another one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from circuitgraph._errors import TraceError
from circuitgraph_torch._find_joints import MissingJointError

Edit = Callable[[Tensor], Tensor]


class _SeenAllError(Exception):
    """Raised by a hook to end a re-run early."""


@dataclass(frozen=True, eq=False)
class Value:
    """What a tensor held at the time of a call: a clone on the CPU, and the wire that it belongs to."""

    tensor: Tensor
    wire: bytes


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its arguments as they were before (cloned), the tensors in them, and its first float output."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    output: Value | None

    @property
    def input(self) -> Value | None:
        """The first float tensor among the arguments."""
        return next((value for value in self.inputs if value.tensor.is_floating_point()), None)

    @property
    def depth(self) -> int:
        """How deep the module is nested."""
        return self.path.count(".")

    def reads(self, wire: bytes) -> bool:
        """Whether any tensor among the arguments is this wire."""
        return any(value.wire == wire for value in self.inputs)

    def writes(self, wire: bytes) -> bool:
        """Whether the output is this wire and the call made it, rather than handed it through."""
        return self.output is not None and self.output.wire == wire and not self.reads(wire)

    def is_inside(self, path: str) -> bool:
        """Whether the module lies below the one at `path`."""
        return self.path.startswith(f"{path}.") if path else bool(self.path)


@dataclass(frozen=True, eq=False)
class Observation:
    """All calls of one forward, in the order in which they ended, so that a part comes before the whole."""

    model: nn.Module
    token_ids: Tensor
    calls: tuple[Call, ...]

    @property
    def logits(self) -> Value:
        """The model's first float output."""
        output = self.calls[-1].output
        assert output is not None  # observe() refuses a model that returns no tensor
        return output

    def inside(self, path: str) -> list[Call]:
        """The calls of the modules below `path`."""
        return [call for call in self.calls if call.is_inside(path)]

    def of(self, path: str) -> list[Call]:
        """The calls of the module at `path`."""
        return [call for call in self.calls if call.path == path]


def observe(model: nn.Module, token_ids: Tensor) -> Observation:
    """Run the model once as it is, in evaluation mode and without gradients, and record every module call.

    Hooks and training flags are put back whatever happens. Raises `TraceError` if the model does not run on token ids.
    """
    calls: list[Call] = []
    pending: list[tuple[tuple[Any, ...], dict[str, Any], tuple[Value, ...]]] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = tuple(_snapshot(tensor) for tensor in _tensors((args, kwargs)))
        pending.append((_copied(args), _copied(kwargs), inputs))

    def after(path: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            first = _first_float(output)
            calls.append(Call(path, module, *pending.pop(), output=None if first is None else _snapshot(first)))

        return hook

    with _quiet(model), _hooked() as hooks:
        for path, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(module.register_forward_hook(after(path), with_kwargs=True))
        try:
            model(token_ids, **_options(model))
        except Exception as error:
            raise TraceError(_not_run(model, token_ids, error)) from error
    if not calls or calls[-1].path or calls[-1].output is None:
        raise TraceError(f"cannot trace {type(model).__name__}: its forward returns no tensor of floats, so there are no logits")
    return Observation(model, token_ids, tuple(calls))


def rerun(
    call: Call,
    watch: Sequence[Call],
    *,
    edits: Mapping[Call, Edit] | None = None,
    edit_input: tuple[bytes, Edit] | None = None,
) -> tuple[Tensor, ...]:
    """Repeat a recorded call, as far as needed, and return what the modules of `watch`, inside it, get as their input (on the CPU).

    `edits` replaces the outputs of modules, `edit_input` the call's own arguments that belong to a wire.
    """
    seen: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = _first_float((args, kwargs))
        if tensor is not None:
            seen.setdefault(module, tensor.detach().to("cpu", copy=True))
        if len(seen) == len({watched.module for watched in watch}):
            raise _SeenAllError

    def edited(tensor: Tensor) -> Tensor:
        if edit_input is not None and _wire(tensor) == edit_input[0]:
            return edit_input[1](tensor)
        return tensor

    args, kwargs = _mapped(_copied(call.args), edited), _mapped(_copied(call.kwargs), edited)
    with _quiet(call.module), _hooked() as hooks:
        for watched in watch:
            hooks.append(watched.module.register_forward_pre_hook(see, with_kwargs=True))
        for changed, edit in (edits or {}).items():
            hooks.append(changed.module.register_forward_hook(lambda _m, _a, out, edit=edit: edit(out)))
        try:
            call.module(*args, **kwargs)
        except _SeenAllError:
            pass
        except Exception as error:
            raise MissingJointError(f"{call.path!r} cannot be run again by itself ({type(error).__name__}: {error})") from error
    if any(watched.module not in seen for watched in watch):
        raise MissingJointError(f"{call.path!r} calls other modules when it is run again")
    return tuple(seen[watched.module] for watched in watch)


def apply(module: nn.Module, tensor: Tensor) -> Tensor | None:
    """A module's first float output on one tensor (moved to the module's device), or `None` if it does not take one."""
    owner = next((p for p in module.parameters() if p.is_floating_point()), None)
    with _quiet(module):
        try:
            output = _first_float(module(tensor if owner is None else tensor.to(owner.device)))
        except Exception:  # any failure means the same: this module is not a function of one tensor
            return None
    return None if output is None else output.detach().to("cpu")


def _options(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments beside the token ids: no key-value cache, where the model knows of one."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"use_cache": False} if "use_cache" in parameters or (takes_any and hasattr(model, "config")) else {}


def _not_run(model: nn.Module, token_ids: Tensor, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"cannot trace {type(model).__name__}: its forward does not run on token ids of shape {tuple(token_ids.shape)} alone "
        f"({type(error).__name__}: {reason}). A decoder-only language model maps token ids to logits; "
        f"if the vocabulary is the problem, hand over token_ids"
    )


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards every module's training flag is what it was."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _hooked() -> Iterator[list[Any]]:
    """A list of hook handles that are all removed in the end."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _snapshot(tensor: Tensor) -> Value:
    return Value(tensor.detach().to("cpu", copy=True), _wire(tensor))


def _wire(tensor: Tensor) -> bytes:
    """A fingerprint of the numbers; `float32` and the half precisions that convert to it exactly share their wires."""
    numbers = tensor.detach().cpu().contiguous()
    if not numbers.is_floating_point():
        numbers = numbers.to(torch.int64) if not numbers.is_complex() else torch.view_as_real(numbers)
    elif numbers.dtype != torch.float64:
        numbers = numbers.float()
    numbers = numbers.flatten() + 0  # -0.0 becomes 0.0
    return blake2b(numbers.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from _tensors(part)
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)


def _first_float(tree: Any) -> Tensor | None:
    return next((tensor for tensor in _tensors(tree) if tensor.is_floating_point()), None)


def _mapped(tree: Any, change: Edit) -> Any:
    """The same tuples, lists and dictionaries with every tensor changed; other objects are kept as they are."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) is dict:
        return {key: _mapped(part, change) for key, part in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_mapped(part, change) for part in tree)
    return tree


def _copied(tree: Any) -> Any:
    return _mapped(tree, lambda tensor: tensor.detach().clone())
