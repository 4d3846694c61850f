"""A GPU that is not there, as far as a program can tell: tensors that say they are on `cuda:0`, computed by the CPU.

They refuse what a GPU's tensors refuse, to meet tensors of the CPU, so code that runs here mixes no devices, and takes the ways that
are not a CPU's. What only a GPU can show, its own kernels and how fast they are, is not shown. PyTorch's fake tensors know devices too, but
hold no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import arg_tree_leaves, tree_map

GPU, MEMORY = torch.device("cuda", 0), 1 << 33
_CPU = torch.device("cpu")
_aten: Any = torch.ops.aten
_BETWEEN_DEVICES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default)


class OnGPU(torch.Tensor):
    """Numbers of the CPU that say they are on the GPU. (PyTorch is told `meta`, a device that it knows without a driver.)"""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGPU:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "layout": held.layout}
        made: OnGPU = torch.Tensor._make_wrapper_subclass(cls, held.size(), device="meta", **layout)  # type: ignore[attr-defined]
        made.held = held
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return _computed(function, tuple(args), dict(kwargs or {}))


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In here `device="cuda"` can be used. Models must have been made before, since what is made on `meta` in here is on the GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (MEMORY, MEMORY))
        was_swapped = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter cannot change its type otherwise
        try:
            with _Made(), _Asked():
                yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(was_swapped)


class _Made(TorchDispatchMode):
    """What is made on the GPU, or moved to it, is one of its tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        if _is_gpu(options.get("device")) or any(isinstance(value, OnGPU) for value in arg_tree_leaves(*args, **options)):
            return _computed(function, tuple(args), options)
        return function(*args, **options)


class _Asked(TorchFunctionMode):
    """Calls that PyTorch answers without asking what a tensor is."""

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and _is_gpu(options.get("device")):
            return function(*args, **{**options, "device": _CPU}).to(GPU)
        if function is torch.Tensor.to:
            return function(*_moved_to(args), **{**options, **({"device": GPU} if _is_gpu(options.get("device")) else {})})
        if args and isinstance(args[0], OnGPU):
            if function is torch.Tensor.tolist:
                return args[0].detach().held.tolist()
            if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                return function(args[0], _index(args[1]), *args[2:])
        return function(*args, **options)


def _moved_to(args: Sequence[Any]) -> list[Any]:
    """Arguments of `to`, with another tensor's device and dtype spelled out."""
    spelled = [part for one in args[1:] for part in ((one.device, one.dtype) if isinstance(one, torch.Tensor) else (one,))]
    return [args[0], *(GPU if isinstance(one, str | torch.device) and _is_gpu(one) else one for one in spelled)]


def _index(at: Any) -> Any:
    if isinstance(at, tuple):
        return tuple(map(_index, at))
    return torch.tensor(at).to(GPU) if isinstance(at, list) else at


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _computed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _check_devices(function, args, kwargs)
    if function is _aten._fused_sdp_choice.default:
        return 0  # attention by its formula: the kernels of a CPU are not those of a GPU
    if function is _aten.bmm.dtype:  # which a CPU does not know
        return OnGPU(torch.bmm(*(one.held.to(args[2]) for one in args[:2])))
    here = {**kwargs, "device": _CPU} if kwargs.get("device") is not None else kwargs
    found = function(*tree_map(_held, args), **tree_map(_held, here))
    is_fetched = "device" in here and not _is_gpu(kwargs["device"])
    if function is _aten._local_scalar_dense.default or is_fetched or (function is _aten.copy_.default and not isinstance(args[0], OnGPU)):
        return found
    made = tree_map(lambda value: OnGPU(value) if isinstance(value, torch.Tensor) else value, found)
    return return_and_correct_aliasing(function, args, kwargs, made)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGPU) else value


def _check_devices(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The CPU's tensors may be copied, be an index, or be a single number; a bare tensor of `meta` would be one that got lost."""
    tensors = [one for one in arg_tree_leaves(*args, **kwargs) if isinstance(one, torch.Tensor)]
    others = [one for one in tensors if not isinstance(one, OnGPU)]
    if len(others) == len(tensors) or function in _BETWEEN_DEVICES:
        return
    indices = [id(one) for one in args[1] if one is not None] if function in _INDEXED and isinstance(args[0], OnGPU) else []
    for one in others:
        if one.is_meta or (one.dim() > 0 and id(one) not in indices):
            raise RuntimeError(f"Expected all tensors to be on the same device: {function} has {tuple(one.shape)} on {one.device}")
