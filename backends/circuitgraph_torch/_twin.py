"""A module of the model with some of its submodules replaced."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping

from torch import nn


def twin(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy that shares all parameters, without hooks, with some submodules replaced. The original is not touched."""
    other = copy.copy(module)
    other.__dict__ = dict(module.__dict__)
    other.__dict__.pop("forward", None)  # wrappers of nnsight or accelerate
    other._forward_hooks, other._forward_pre_hooks = OrderedDict(), OrderedDict()
    other._modules = dict(module._modules)
    for name, child in module._modules.items():
        inside = {path.removeprefix(f"{name}."): new for path, new in replaced.items() if path.startswith(f"{name}.")}
        if name in replaced:
            other._modules[name] = replaced[name]
        elif inside and child is not None:
            other._modules[name] = twin(child, inside)
    return other
